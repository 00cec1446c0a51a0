"""Choose the documents of an audit: rows that can be measured, none of them on two sides, none that was trained on."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from moe_unlearn.data import Example
from moe_unlearn.ops.token_loss import IGNORED


@dataclass(frozen=True)
class Chosen:
    """Documents by side, and a line for each kind of row that was left out."""

    rows: dict[str, list[Example]]
    left_out: list[str]


def content_of(row: Example) -> tuple[int, ...]:
    """Return what identifies a row whatever is labelled of it: its tokens."""
    return tuple(row.input_ids)


def choose(given: Mapping[str, Iterable[Example]], trained: Collection[tuple[int, ...]] = ()) -> Chosen:
    """Return the rows of forget, retain and holdout that an audit measures, each once.

    Rows without a labelled token behind the first are left out, and so are holdout rows that are forget or retain rows
    too, or whose content is in `trained`, what the model is known to have been trained on: they are not unseen. Raises
    ValueError if nothing of a side is left.
    """
    sides = {side: [*rows] for side, rows in given.items()}
    seen = {content_of(row) for side, rows in sides.items() if side != "holdout" for row in rows} | set(trained)
    chosen: dict[str, list[Example]] = {}
    left_out: list[str] = []
    for side, own in sides.items():
        labelled = [row for row in own if any(label != IGNORED for label in row.labels[1:])]
        unique = list({content_of(row): row for row in labelled}.values())
        kept = [row for row in unique if side != "holdout" or content_of(row) not in seen]
        reasons = {
            "have no labelled token": len(own) - len(labelled),
            "are there twice": len(labelled) - len(unique),
            "were trained on, and are no unseen text": len(unique) - len(kept),
        }
        told = [f"{count} {side} rows {why}" for why, count in reasons.items() if count]
        if not kept:
            raise ValueError(f"{side}: expected documents to audit with; got {'; '.join(told) or 'none'}")
        chosen[side], left_out = kept, left_out + told
    return Chosen(chosen, left_out)
