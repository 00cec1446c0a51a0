"""Measure adapters on experts, forward and backward: factors kept aside against PEFT's sum of weights.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_adapters [--rank 8] [--tokens 256 1024] [--dtype float32] [--divide 4]

One layer of OLMoE-1B-7B's experts, its widths divided by 4, with LoRA on both weights. All contenders are the same
module under the same adapters, in turns, so that ratios within one run compare them. Times are of this process on the
processor, which other programs do not lengthen; memory is the most that tensors take beyond weights and inputs.
"""

import argparse
import copy
import statistics
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import OlmoeConfig, OlmoeForCausalLM

from benchmarks import shapes
from benchmarks.shapes import Geometry
from moe_unlearn.config import Recipe
from moe_unlearn.experts import NAME, enable
from moe_unlearn.model.adapters import adapted

OURS = "factors aside (moe_unlearn)"
SUM = "PEFT's sum, moe_unlearn's experts"
GROUPED = "PEFT's sum, transformers grouped_mm"


def contenders(geometry: Geometry, tokens: int, rank: int, dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    """Return a forward and backward pass of the layer by contender; each returns output and gradients."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.inner,
        num_experts=geometry.experts,
        num_experts_per_tok=geometry.top_k,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    recipe = Recipe.from_dict({"adapter": {"r": rank, "targets": "experts"}})
    model = adapted(OlmoeForCausalLM(config).to(dtype).eval(), recipe)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    x = torch.randn(tokens, geometry.hidden).to(dtype).requires_grad_()
    index = shapes.routing("uniform", tokens, geometry)
    weights = torch.rand(tokens, geometry.top_k).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, geometry.hidden).to(dtype)

    def passes(model: nn.Module) -> Callable[[], list[Tensor]]:
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
        trained = [p for p in layer.parameters() if p.requires_grad]

        def both() -> list[Tensor]:
            out = layer(x, index, weights)
            return [out.detach(), *torch.autograd.grad(out, [x, weights, *trained], upstream)]

        return both

    made = {name: copy.deepcopy(model) for name in (OURS, SUM, GROUPED)}
    enable(made[OURS])
    made[SUM].set_experts_implementation(NAME)
    made[GROUPED].set_experts_implementation("grouped_mm")
    return {name: passes(own) for name, own in made.items()}


class _Most(TorchDispatchMode):
    """The most bytes of storages made inside that live at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return out

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measured(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median of the processor's seconds of each, in turns, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if i:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(own) for name, own in seconds.items()}


def differences(works: dict[str, Callable[[], list[Tensor]]]) -> dict[str, float]:
    """Return for each but ours the largest distance of its results from ours, over the norm of its own."""
    results = {name: work() for name, work in works.items()}
    ours = results.pop(OURS)
    return {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(ours, own, strict=True))
        for name, own in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--divide", type=int, default=4, help="by what the widths are divided")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    geometry = shapes.OLMOE.narrow(options.divide)
    print(f"{geometry.name}, rank {options.rank}, {options.dtype}, {torch.get_num_threads()} threads")
    for tokens in options.tokens:
        works = contenders(geometry, tokens, options.rank, getattr(torch, options.dtype))
        apart = differences(works)
        seconds = measured(works, options.rounds)
        for name, work in works.items():
            with _Most() as most:
                work()
            ratio = f"{seconds[name] / seconds[OURS]:.2f} times ours" if name != OURS else "-"
            off = f", results {apart[name]:.1e} apart" if name in apart else ""
            time_ = f"{seconds[name] * 1e3:8.1f} ms of processor time"
            print(f"{tokens:>6} tokens  {name:<38} {time_}  {ratio:>18}  {most.most / 2**20:7.1f} MiB{off}")


if __name__ == "__main__":
    main()
