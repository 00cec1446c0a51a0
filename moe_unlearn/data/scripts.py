"""Split text of any script into words: runs between spaces, or single characters where a script writes no spaces."""

import unicodedata
from collections.abc import Iterator
from functools import lru_cache

# how the Unicode names of letters begin in scripts that put no space between words
SPACELESS = (
    "CJK ",
    "IDEOGRAPHIC ",
    "HIRAGANA ",
    "KATAKANA ",
    "KATAKANA-HIRAGANA ",
    "BOPOMOFO ",
    "YI ",
    "TANGUT ",
    "NUSHU ",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
    "TAI ",
    "NEW TAI ",
    "BALINESE ",
    "JAVANESE ",
)
_ZERO_WIDTH_SPACE = "\u200b"
_REPLACEMENT = "\ufffd"  # stands for bytes that spell no character
_PICTURES = range(0x1F000, 0x1FB00)  # the blocks of emoji, of which Python's tables of Unicode may not know all


def unicode_words(text: str, *, digits: bool = True) -> Iterator[tuple[str, int, int]]:
    """Yield (word, start, end) for each word of `text`, spelled as it stands at text[start:end].

    A word is a longest run of letters, digits and the marks on them (Unicode categories L, N, M); without `digits` a
    digit ends it. Invisible format characters (joiners, soft hyphens; not the zero-width space) do not end a word and
    are left out of it. In scripts that put no space between words (`SPACELESS`) every letter is a word, together with
    its marks, and so is every symbol (category S, and emoji) that is not ASCII.
    """
    word, start, end, alone = "", 0, 0, False
    for i, character in enumerate(text):
        kind = _kind(character, digits)
        # a letter that stands alone ends the word before it and takes only marks
        if word and (kind in ("end", "alone") or (alone and kind == "part")):
            yield word, start, end
            word = ""
        if kind in ("part", "alone") or (kind == "mark" and word):
            if not word:
                start, alone = i, kind == "alone"
            word, end = word + character, i + 1
    if word:
        yield word, start, end


@lru_cache(65536)
def spaceless(character: str) -> bool:
    """Return whether the character belongs to a script that puts no space between words."""
    return unicodedata.name(character, "").startswith(SPACELESS)


@lru_cache(65536)
def _kind(character: str, digits: bool) -> str:
    """Return what the character does to a word: "part" or "mark" of it, a word "alone", its "end", or "" (nothing)."""
    category = unicodedata.category(character)
    if category[0] == "M":
        return "mark"
    if category[0] == "L" or (digits and category[0] == "N"):
        return "alone" if spaceless(character) else "part"
    if (category[0] == "S" and not character.isascii() and character != _REPLACEMENT) or ord(character) in _PICTURES:
        return "alone"
    return "" if category == "Cf" and character != _ZERO_WIDTH_SPACE else "end"
