"""Where a prompt ends within the tokens of the whole.

Pieces encoded apart are other tokens than the whole has at the seam: SentencePiece begins every piece with a space,
and the space at the end of "Answer: " is no part of the word that follows. So the whole is encoded, as a user's text
is, and split: a token on both sides of the seam belongs to the later part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from moe_unlearn.config import SEAMS


@dataclass(frozen=True)
class Split:
    """Token ids of the parts of a text, which together are those of the whole.

    `straddled`: a token stands on both sides of the first seam. `asked` is the first part encoded alone, with
    seam="separate" only.
    """

    parts: list[list[int]]
    straddled: bool
    asked: list[int] | None


def check(seam: str) -> None:
    """Raise ValueError unless `seam` is one of `SEAMS`."""
    if seam not in SEAMS:
        raise ValueError(f"expected seam {' or '.join(map(repr, SEAMS))}; got {seam!r}")


def split(tokenizer, parts: Sequence[str], *, seam: str = "joint", special: bool = False) -> Split:
    """Encode `parts` as one text and split its tokens.

    With seam="joint" a part begins with the first token that reaches into it. With "separate", open-unlearning's way,
    the first part has as many tokens as it has alone, so that a token across the seam, or one more or less there,
    shifts what carries a loss. Special tokens that the text spells stay text, unless it is a template's (`special`).
    """
    text, bounds = "".join(parts), list(accumulate(map(len, parts[:-1])))
    seams = sorted({bound for bound in bounds if 0 < bound < len(text)})
    if not seams:
        ids = ids_of(tokenizer, text, special=special)
        found = {}
    elif getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, add_special_tokens=False, split_special_tokens=not special, return_offsets_mapping=True)
        ids, ends = made["input_ids"], [end for _, end in made["offset_mapping"]]
        found = {bound: next((i for i, end in enumerate(ends) if end > bound), len(ids)) for bound in seams}
    else:
        ids, ends = ids_of(tokenizer, text, special=special), None
        found = {bound: _shared(ids, ids_of(tokenizer, text[:bound], special=special)) for bound in seams}
    straddled, asked = False, None
    if bounds[0] in found:
        start = found[bounds[0]]
        if ends is None:
            straddled = start < len(ids_of(tokenizer, parts[0], special=special))
        else:
            # offsets may leave out the space that a token begins with: it reaches back to where the last one ends
            straddled = (ends[start - 1] if start else 0) < bounds[0]
    starts = [found.get(bound, len(ids) if bound else 0) for bound in bounds]
    if seam == "separate":
        asked = ids_of(tokenizer, parts[0], special=special)
        starts = [max(start, min(len(asked), len(ids))) for start in starts]
        starts[0] = min(len(asked), len(ids))
    return Split([ids[a:b] for a, b in pairwise([0, *starts, len(ids)])], straddled, asked)


def ids_of(tokenizer, text: str, *, special: bool = False) -> list[int]:
    """The tokens of a text, none added around it; special tokens that it spells stay text unless `special`."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"] if text else []


def continued(tokenizer, prompt: list[int], text: str) -> list[int]:
    """The tokens of `text` behind the tokens `prompt`, as one text has them."""
    found = split(tokenizer, [tokenizer.decode(prompt, skip_special_tokens=True), text])
    return ids_of(tokenizer, text) if found.straddled else found.parts[1]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two rows have in common."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared
