"""Run a relearning attack: measure how fast fine-tuning on forget data brings back what was unlearned."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moe_unlearn.data import Example, batches
from moe_unlearn.metrics.privacy import nll
from moe_unlearn.metrics.scoring import evaluating, token_scores
from moe_unlearn.metrics.workers import check_whole
from moe_unlearn.ranks import local

Measure = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class RelearningCurve:
    """Measurements along an attack: `values[i]` was measured after `steps[i]` steps, and the first is 0."""

    steps: list[int]
    values: list[dict[str, float]]

    def steps_until(self, name: str, bound: float) -> int | None:
        """Return the first measured step at which `name` reaches `bound` from its value at step 0, else None.

        Returns 0 if the value equals `bound` from the start.
        """
        start = self.values[0][name]
        for step, value in zip(self.steps, self.values, strict=True):
            if value[name] == bound or (value[name] < bound) != (start < bound):
                return step
        return None

    def to_dict(self) -> dict:
        """Return plain values that JSON takes."""
        return {"steps": self.steps, "values": self.values}


def relearning_attack(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    steps: int = 50,
    lr: float = 1e-4,
    batch_size: int = 8,
    every: int = 5,
    pad_id: int = 0,
    seed: int = 0,
    measure: Measure | None = None,
) -> RelearningCurve:
    """Fine-tune a copy of `model` on `examples` and measure it at step 0, every `every` steps and at the end.

    The attacker trains all weights with AdamW (no decay) at a constant `lr` on the mean NLL of the labelled
    tokens; the order of the examples depends on `seed` alone. `measure(copy)` gives the values, by default
    `nll`, the forget NLL in nats a token. The model, its gradients and the random state are left as they were.
    The copy and its optimizer take three more times the weights' memory. Every rank makes the same attack.

    Raises ValueError for no examples, examples without labels, steps or `every` below 1, or sharded weights.
    """
    check_whole(model, "the relearning attack")
    if steps < 1 or every < 1:
        raise ValueError(f"expected at least one step, measured every 1 or more; got {steps} and {every}")
    # an example without labels teaches nothing, and a batch of them would have a mean over no tokens
    examples = [example for example in examples if any(label != -100 for label in example.labels[1:])]
    if not examples:
        raise ValueError("expected examples with at least one labelled token to relearn; got none")
    if measure is None:

        def measure(attacked: nn.Module) -> dict[str, float]:
            return {"nll": nll(token_scores(attacked, examples, batch_size=batch_size, pad_id=pad_id))}

    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    # weights made in a caller's inference mode could not be trained
    with torch.random.fork_rng(devices=sorted(devices)), torch.inference_mode(False), torch.enable_grad():
        attacked = copy.deepcopy(local(model))
        for parameter in attacked.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.grad = None
        return _attack(attacked, examples, steps, lr, batch_size, every, pad_id, seed, measure)


def _attack(
    attacked: nn.Module,
    examples: Sequence[Example],
    steps: int,
    lr: float,
    batch_size: int,
    every: int,
    pad_id: int,
    seed: int,
    measure: Measure,
) -> RelearningCurve:
    optimizer = torch.optim.AdamW(attacked.parameters(), lr, weight_decay=0.0)
    device = next(attacked.parameters()).device
    curve = RelearningCurve([0], [_measured(attacked, measure)])
    per_epoch = math.ceil(len(examples) / batch_size)
    attacked.eval()  # no dropout: only the order of the examples is random
    epoch: Sequence = ()
    for step in range(steps):
        if step % per_epoch == 0:
            epoch = batches(examples, batch_size, pad_id=pad_id, seed=seed, epoch=step // per_epoch)
        batch = {k: v.to(device) for k, v in epoch[step % per_epoch].items() if k != "index"}
        attacked(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.steps.append(step + 1)
            curve.values.append(_measured(attacked, measure))
    return curve


def _measured(attacked: nn.Module, measure: Measure) -> dict[str, float]:
    with evaluating(attacked):
        return measure(attacked)
