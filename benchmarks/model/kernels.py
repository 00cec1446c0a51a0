"""Build our kernels for the model, with the tiles that the ledger says were compiled.

A tile's sides, registers and shared memory are those of the newest Triton of the ledger; from them follow the blocks
that a multiprocessor holds. CUDA's come from its header. Bytes are those that must move: every operand once.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from benchmarks import stamp
from benchmarks.model.gpus import Gpu
from benchmarks.model.times import MMA_ON_HOPPER, Kernel, Problem, Product, Stream, Tile
from benchmarks.shapes import Geometry, routing
from moe_unlearn.regress import ledger
from moe_unlearn.triton_kernels import configs

# what the sides of a tile are called in the kernels: rows, columns and the step through the depth
_SIDES = (
    ("BLOCK_M", "BLOCK_P", "BLOCK_ROWS"),
    ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_DEPTH"),
    ("ROWS", "COLUMNS", "DEPTH"),
)
_RESERVED = 1024  # bytes of shared memory that a block takes for itself
_HIDDEN_SUMS = "token_loss_backward/_hidden_sums_kernel/token_loss: nll, kept, qwen3"
# bytes that AdamW with moments in bfloat16 moves for a weight: weight and both moments in and out, one bit of mask
UPDATE = 6 * 2 + 1 / 8


class Layer(NamedTuple):
    """An expert layer at a number of tokens; rows: those of each expert."""

    geometry: Geometry
    tokens: int
    rows: tuple[int, ...]

    @classmethod
    def routed(cls, geometry: Geometry, tokens: int, name: str = "uniform") -> "Layer":
        """Return the layer under a routing of the benchmarks."""
        index = routing(name, tokens, geometry)
        return cls(geometry, tokens, tuple(index.flatten().bincount(minlength=geometry.experts).tolist()))

    @property
    def slots(self) -> int:
        """Return the routed rows of all experts."""
        return self.tokens * self.geometry.top_k

    @property
    def x(self) -> float:
        """Return the bytes of the hidden states."""
        return 2.0 * self.tokens * self.geometry.hidden

    @property
    def a(self) -> float:
        """Return the bytes of the activations of all slots."""
        return 2.0 * self.slots * self.geometry.inner

    @property
    def y(self) -> float:
        """Return the bytes of the outputs of all slots."""
        return 2.0 * self.slots * self.geometry.hidden

    @property
    def weights(self) -> float:
        """Return the bytes of one of the three weights of all experts."""
        return 2.0 * self.geometry.experts * self.geometry.hidden * self.geometry.inner

    def by_rows(self, columns: int, depth: int) -> list[Problem]:
        """Return a product of each expert's rows."""
        return [Problem(rows, columns, depth) for rows in self.rows]

    def by_depth(self, rows: int, columns: int, share: float = 1.0) -> list[Problem]:
        """Return a weight gradient of each of the first experts, `share` of all."""
        return [Problem(rows, columns, depth) for depth in self.rows[: round(share * len(self.rows))]]


@cache
def _entries(architecture: str) -> ledger.Entries:
    compilers = [name for name in ledger.read() if name.startswith("triton")]
    newest = max(compilers, key=lambda name: [int(part) for part in name.split()[1].split(".")])
    return ledger.read()[newest][architecture]


def compiled(gpu: Gpu, name: str, *, persistent: bool = True, loads: int = 0, halves: bool = False) -> Tile:
    """Return the tile of an entry of the ledger; halves: it multiplies gate and up, and counts columns of one."""
    entry = _entries(gpu.architecture)[name]
    config = dict(word.split("=", 1) for word in entry["config"].split() if "=" in word)
    rows, columns, depth = next(
        tuple(int(config[side]) for side in sides) for sides in _SIDES if all(side in config for side in sides)
    )
    slow = gpu.architecture == "sm_90" and entry["hmma"] and not entry["hgmma"]
    return Tile(
        rows,
        columns * (2 if halves else 1),
        depth,
        in_flight=1 if persistent else resident(gpu, entry, 32 * int(config["num_warps"])),
        persistent=persistent,
        loads=loads,
        rate=MMA_ON_HOPPER if slow else 1.0,
    )


def resident(gpu: Gpu, entry: dict, threads: int) -> int:
    """Return how many blocks a multiprocessor holds: as many as its registers and its shared memory allow."""
    registers = -(-entry["registers"] // 8) * 8 * threads
    return max(1, min(gpu.registers // registers, gpu.shared_bytes // (entry["shared_bytes"] + _RESERVED)))


def expert_forward(layer: Layer, gpu: Gpu, impl: str = "triton") -> list[Kernel]:
    """Return the launches of `expert_mlp`'s forward pass."""
    g, x, a, weights = layer.geometry, layer.x, layer.a, layer.weights
    products = layer.by_rows(2 * g.inner, g.hidden)
    return [
        Product("gate_up", mlp_tile("gate_up", gpu, impl), products, 3, x + 2 * weights + 3 * a, special=1),
        *_linear("down", layer, gpu, impl, g.inner, weights),
    ]


def _linear(name: str, layer: Layer, gpu: Gpu, impl: str, depth: int, weights: float) -> list[Kernel]:
    moved = 2.0 * layer.slots * depth + weights + layer.y
    return [
        Product(name, mlp_tile(name, gpu, impl), layer.by_rows(layer.geometry.hidden, depth), 2, moved),
        Stream("sum over k", layer.y + layer.x),
    ]


def expert_dgrad(layer: Layer, gpu: Gpu, impl: str = "triton") -> list[Kernel]:
    """Return the launches of `expert_mlp`'s backward pass, with the factors of all weight gradients."""
    g, n = layer.geometry, layer.slots
    a, weights = layer.a, layer.weights
    tile = mlp_tile("dz", gpu, impl)
    partial = 4.0 * n * -(-g.inner // tile.columns)
    products = layer.by_rows(g.inner, g.hidden)
    return [
        Product("dz", tile, products, 10, layer.x + weights + 5 * a + partial, special=2),
        Stream("d_weights", partial + 4.0 * n, loads=3),
        *_linear("d_x", layer, gpu, impl, 2 * g.inner, 2 * weights),
    ]


def mlp_tile(product: str, gpu: Gpu, impl: str) -> Tile:
    """Return the tile of one of `expert_mlp`'s products.

    In Triton find_tile comes before the rows, and where they have weights or are gathered their numbers. The product
    hides the numbers of other rows, and the weights. In CUDA a producer looks up all of it a tile ahead.
    """
    if impl == "cuda":
        return cuda_product(gathered=product in ("gate_up", "dz"))
    entry, loads = {
        "gate_up": ("expert_mlp/_gate_up_kernel/qwen3", 2),
        "down": ("expert_mlp/_linear_kernel/qwen3", 2),
        "dz": ("expert_mlp_backward/_activation_gradient_kernel/expert_mlp: qwen3", 2),
        "d_x": ("expert_mlp/_linear_kernel/qwen3 #2", 1),
    }[product]
    return compiled(gpu, entry, loads=loads, halves=product == "gate_up")


def cuda_product(*, gathered: bool) -> Tile:
    """Return the tile of csrc/cuda/product_plan.cuh: two consumers take turns, and pairs of blocks share the weights.

    A pair splits the columns of the last of an odd number of row tiles, and shares its rows unless they are gathered.
    """
    sides = _constants("product_plan.cuh", "rows", "half", "depth")
    return Tile(sides["rows"], 2 * sides["half"], sides["depth"], in_flight=2, cluster=2, alone=gathered)


def expert_wgrad(layer: Layer, gpu: Gpu, impl: str, update: bool, share: float = 1.0) -> list[Kernel]:
    """Return the launches of both weight gradients: stored, or applied by AdamW under a mask."""
    g = layer.geometry
    stored, found = UPDATE if update else 2.0, []
    for name, rows, columns in (("gate_up", 2 * g.inner, g.hidden), ("down", g.hidden, g.inner)):
        problems = layer.by_depth(rows, columns, share)
        factors = 2.0 * share * layer.slots * (rows + columns)
        if impl == "cuda":
            tile = cuda_wgrad()
        elif update:
            tile = compiled(gpu, "expert_wgrad_update/_update_kernel/adamw bf16", persistent=False, loads=2)
        else:
            of = "store" if name == "gate_up" else "store down"
            tile = compiled(gpu, f"expert_wgrad/_store_kernel/{of}", persistent=False, loads=2)
        moved = factors + stored * len(problems) * rows * columns
        found.append(Product(f"wgrad of {name}", tile, problems, stored, moved))
    return found


def cuda_wgrad() -> Tile:
    """Return the tile of csrc/cuda/expert_wgrad.cuh: two consumers take turns, and pairs of blocks share a factor."""
    sides = _constants("expert_wgrad.cuh", "length", "depth")
    return Tile(sides["length"], sides["length"], sides["depth"], in_flight=2, cluster=2)


def _constants(header: str, *names: str) -> dict[str, int]:
    """Return constants of a header of csrc/cuda by their names."""
    text = (stamp.ROOT / "csrc" / "cuda" / header).read_text(encoding="utf-8")
    return {
        name: int(re.search(rf"static constexpr int (?:\w+ = [^;]*?, )?{name} = (\d+)\b", text)[1]) for name in names
    }


def route(layer: Layer) -> list[Kernel]:
    """Return the two launches of Triton's `route`, which wait for memory; loads as its kernels chain them."""
    index, rows = 8.0 * layer.slots, 4.0 * layer.slots
    return [Stream("count", index, loads=4), Stream("scatter", index + rows, loads=12)]


def token_loss(tokens: int, hidden: int, vocabulary: int, gpu: Gpu) -> list[Kernel]:
    """Return the launches of `token_loss`, nll with a frozen head, forward and backward; no row is computed again."""
    h, head = 2.0 * tokens * hidden, 2.0 * vocabulary * hidden
    logits = compiled(gpu, "token_loss/_partials_kernel/nll, kept, qwen3", persistent=False, loads=3)
    arch = configs.tiles_of(int(gpu.architecture.removeprefix("sm_")))
    config = configs.token_loss(tokens, vocabulary, torch.bfloat16, arch, False, False, True, True)
    found: list[Kernel] = [
        Stream("select", 12.0 * tokens, loads=3),
        Stream("gather", 2 * h, loads=2),
        Stream("logits of labels", 2 * h, loads=3),
    ]
    for rows in _spans(tokens, config.kept_rows):
        exponentials, part = 2.0 * rows * vocabulary, h * rows / tokens
        sums, moved = _hidden_sums(gpu, config, rows, hidden, vocabulary)
        found += [
            # exponentials once for the sum; a row's factor and the rounding are no special functions
            Product("logits", logits, [Problem(rows, vocabulary, hidden)], 2, part + head + exponentials, special=1),
            Stream("merge", 12.0 * rows * math.ceil(vocabulary / logits.columns), loads=4),
            Stream("nothing again", 0.0, loads=4),
            Stream("clear", 14.0 * rows, loads=3),
            sums,
            Stream("direction", moved + 8.0 * rows * hidden, loads=4),
        ]
    return [*found, Stream("scale", 3 * h, loads=3)]


def token_loss_kl(tokens: int, hidden: int, vocabulary: int, gpu: Gpu, *, kept: bool) -> list[Kernel]:
    """Return the launches of `token_loss`, kl with one frozen head for both, forward and backward.

    kept: the forward keeps two numbers of 16 bits for each pair of logits; else the backward computes both again. A
    tile's two products count as one that is twice as deep, which reads the head's tile twice from L2.
    """
    h, head = 2.0 * tokens * hidden, 2.0 * vocabulary * hidden
    arch = configs.tiles_of(int(gpu.architecture.removeprefix("sm_")))
    config = configs.token_loss(tokens, vocabulary, torch.bfloat16, arch, True, False, True, kept)
    entry = f"token_loss/_partials_kernel/kl, {'kept, ' if kept else ''}qwen3"
    logits = compiled(gpu, entry, persistent=False, loads=2)
    select, gather = Stream("select", 12.0 * tokens, loads=3), Stream("gather", 2 * h, loads=2)

    def both(name: str, tile: Tile, rows: int, columns: int, stored: int, special: int) -> Kernel:
        moved = 2 * h * rows / tokens + head * columns / vocabulary + stored * rows * columns
        return Product(name, tile, [Problem(rows, columns, 2 * hidden)], stored, moved, special=special)

    def merge(rows: int) -> Kernel:
        return Stream("merge", 20.0 * rows * math.ceil(vocabulary / (logits.columns * config.tiles_per_split)), loads=4)

    if kept:
        found: list[Kernel] = [select, gather, gather]
        for rows in _spans(tokens, config.kept_rows):
            sums, moved = _hidden_sums(gpu, config, rows, hidden, vocabulary)
            found += [
                both("logits", logits, rows, vocabulary, 4, 2),
                merge(rows),
                Stream("difference", 6.0 * rows * vocabulary, loads=3),
                sums,
                Stream("direction", moved + 8.0 * rows * hidden, loads=4),
            ]
        return [*found, Stream("scale", 3 * h, loads=3)]
    again = compiled(gpu, "token_loss_backward/_dlogits_kernel/token_loss: kl, qwen3", persistent=False, loads=3)
    found = [select, gather, gather, both("logits", logits, tokens, vocabulary, 0, 2), merge(tokens)]
    found += [select, gather, gather]
    for columns in _spans(vocabulary, config.chunk):
        sums, moved = _hidden_sums(gpu, config, tokens, hidden, columns)
        found += [both("logits again", again, tokens, columns, 2, 2), sums, Stream("sums before", moved)]
    return [*found, Stream("scatter", 3 * h, loads=3)]


def _spans(whole: int, most: int) -> list[int]:
    """Return the lengths of the parts that something is cut into, `most` and a rest."""
    return [min(most, whole - first) for first in range(0, whole, most)]


def _hidden_sums(gpu: Gpu, config: configs.TokenLoss, rows: int, hidden: int, columns: int) -> tuple[Kernel, float]:
    """Return the product of dl/dz [rows, columns] and a part of the head, and the bytes of its float32 sums."""
    tile = compiled(gpu, _HIDDEN_SUMS, persistent=False, loads=1)
    splits = max(1, config.split_tiles // (math.ceil(rows / tile.rows) * math.ceil(hidden / tile.columns)))
    sums = 4.0 * splits * rows * hidden
    once = Problem(rows, hidden, columns // splits, splits)
    return Product("sums", tile, [once], 4, 2.0 * columns * (rows + hidden) + sums), sums


def flops(kernels: Sequence[Kernel]) -> float:
    """Return the FLOP that count of some launches."""
    return sum(kernel.flops for kernel in kernels if isinstance(kernel, Product))
