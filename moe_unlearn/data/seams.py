"""Find where a prompt ends within the tokens of the whole text.

Pieces that are encoded apart get other tokens at the seam than the whole text has: SentencePiece begins every piece
with a space, and the space at the end of "Answer: " is no part of the word that follows. So the whole text is
encoded, just as a user's text is, and then split: a token on both sides of the seam belongs to the later part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.config import SEAMS


@dataclass(frozen=True)
class Split:
    """Token ids of the parts of a text; together they are the tokens of the whole.

    `straddled` is true if a token stands on both sides of the first seam. `asked` is the first part encoded alone,
    with seam="separate" only.
    """

    parts: list[list[int]]
    straddled: bool
    asked: list[int] | None


def check(seam: str) -> None:
    """Raise ValueError unless `seam` is one of `SEAMS`."""
    if seam not in SEAMS:
        raise ValueError(f"expected seam {' or '.join(map(repr, SEAMS))}; got {seam!r}")


def split(tokenizer: Tokenizer, parts: Sequence[str], *, seam: str = "joint", special: bool = False) -> Split:
    """Encode `parts` as one text and split its tokens.

    With seam="joint" a part begins with the first token that reaches into it. With "separate", as in open-unlearning,
    the first part gets as many tokens as it has alone, so a token across the seam, or a different count there, shifts
    which tokens carry a loss. Special tokens spelled in the text stay text, unless a template wrote them (`special`).
    """
    text, bounds = "".join(parts), list(accumulate(map(len, parts[:-1])))
    seams = sorted({bound for bound in bounds if 0 < bound < len(text)})
    if not seams:
        ids = ids_of(tokenizer, text, special=special)
        found = {}
    elif getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, add_special_tokens=False, split_special_tokens=not special, return_offsets_mapping=True)
        ids, ends = made.input_ids, [end for _, end in made.offset_mapping]
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
            # offsets may leave out a token's leading space, so the token reaches back to where the one before it ends
            straddled = (ends[start - 1] if start else 0) < bounds[0]
    starts = [found.get(bound, len(ids) if bound else 0) for bound in bounds]
    if seam == "separate":
        asked = ids_of(tokenizer, parts[0], special=special)
        starts = [max(start, min(len(asked), len(ids))) for start in starts]
        starts[0] = min(len(asked), len(ids))
    return Split([ids[a:b] for a, b in pairwise([0, *starts, len(ids)])], straddled, asked)


def ids_of(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Return the tokens of a text, none added around it; special tokens that it spells stay text unless `special`."""
    ids: list[int] = (
        tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids if text else []
    )
    return ids


def continued(tokenizer: Tokenizer, prompt: list[int], text: str) -> list[int]:
    """Return the tokens that `text` has behind the tokens `prompt` when both are encoded as one text."""
    found = split(tokenizer, [str(tokenizer.decode(prompt, skip_special_tokens=True)), text])
    return ids_of(tokenizer, text) if found.straddled else found.parts[1]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens two rows have in common."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared
