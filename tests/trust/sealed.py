"""Masks and states of a step, whose files have digests, written small and read after damage."""

import random
from pathlib import Path

import torch

from moe_unlearn.checkpoint import states
from moe_unlearn.masks import WeightMask
from moe_unlearn.ops.bits import pack_bits
from tests.support.damage import FORMS, damaged


def write_mask(folder):
    draw = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(shape, generator=draw) < 0.6 for name, shape in {"a": (3, 70), "b.weight": (33,)}.items()}
    shapes = {name: tuple(k.shape) for name, k in kept.items()}
    WeightMask(shapes, {name: pack_bits(k) for name, k in kept.items()}, keep=0.6).save(folder / "mask")


def write_state(folder):
    cache = {"keys": ["ab" * 32, "cd" * 32], "values": torch.rand(2, 5)}
    prepared = {"done": ["trace", "wagle"], "kl_floor": 1e-5, "selected": torch.eye(3).bool(), "token_weights": cache}
    states.save_state(folder, "unlearn", {"recipe": {"name": "combined"}, "steps": 3, "prepared": prepared})


KINDS = {
    "mask": (write_mask, lambda folder: WeightMask.load(folder / "mask")),
    "state": (write_state, lambda folder: states.load_state(folder, "unlearn")),
}


def damage(kind: str, trials: int, folder: Path) -> int:
    """Damage each file of a kind so often; return how often the reader refused it, naming it.

    Damage that changes no byte does not count; AssertionError where the reader takes what is damaged.
    """
    write, read = KINDS[kind]
    write(folder)
    read(folder)
    draw, refused = random.Random(trials), 0
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for trial in range(trials):
            form = draw.choice(FORMS)
            if (content := damaged(whole, form, draw)) == whole:
                continue
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
            try:
                read(folder)
            except (ValueError, FileNotFoundError) as error:
                assert path.stem in str(error)
                refused += 1
            else:
                raise AssertionError(f"silent: {path.name}, {form} ({trial})")
        path.write_bytes(whole)
    return refused
