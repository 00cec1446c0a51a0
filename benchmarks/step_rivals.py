"""Run the unlearning step as a user has it today: transformers' `grouped_mm` experts, autograd, torch's AdamW.

    dense        makes every gradient of an expert weight, multiplies it by a dense mask and gives it to AdamW
    restricted   makes the same gradients, but takes out the trained experts' for an AdamW (torch's fused one) over
                 compact copies of their weights, which are written back after each step, as a skilled user would do

Losses are torch's cross_entropy over logits, references are cached, and forget and retain rows share one forward
pass where that is possible. Both rivals read what to train from a prepared `UnlearnStep`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid

from moe_unlearn import mollm
from moe_unlearn.experts import experts_modules
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.step import UnlearnStep

Batch = dict[str, Tensor]


class Rival:
    """Runs one step a call; `reference` is the step whose recipe, masks, selection and token weights are taken over."""

    def __init__(
        self, model: nn.Module, reference: UnlearnStep, forget: Batch, retain: Batch, *, restricted: bool = False
    ):
        self.model, self.recipe, self.forget, self.retain = model, reference.recipe, forget, retain
        flags = {name: p.requires_grad for name, p in reference.model.named_parameters()}
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        words = [reference.masks.get(name) for name, _ in named]
        self.masks: list[Tensor | None] = [None] * len(named)
        self.experts: list[Tensor | None] = [None] * len(named)
        if restricted:
            self.experts = [None if w is None else w.flatten(1).any(1).nonzero().squeeze(1) for w in words]
        else:
            self.masks = [None if w is None else _dense(w, p) for w, p in zip(words, self.parameters, strict=True)]
        self.compact = [
            p if e is None else nn.Parameter(p.data[e]) for p, e in zip(self.parameters, self.experts, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(self.compact, lr=self.recipe.optimizer.lr, weight_decay=0.0)
        self._cache(reference)

    @torch.no_grad()
    def _cache(self, reference: UnlearnStep) -> None:
        prepared = reference.prepared
        weights = None if prepared.token_weights is None else prepared.token_weights.get(self.retain)[:, :-1]
        self.token_weights = weights
        if self.recipe.forget.objective == "npo":
            self.reference = self._nll(self._logits(self.forget), self.forget).sum(1)
        if self.recipe.mollm is not None:
            self.reference = log_softmax(self._logits(self.retain)[:, :-1].float(), -1)
            self.kl_floor = prepared.kl_floor

    def _logits(self, batch: Batch) -> Tensor:
        return self.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits

    @staticmethod
    def _nll(logits: Tensor, batch: Batch) -> Tensor:
        targets = batch["labels"][:, 1:]
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none").view(
            targets.shape
        )

    def losses(self, *, joint: bool = True) -> dict[str, Tensor]:
        """Return the recipe's losses by name."""
        if joint and self.recipe.mollm is None:
            both = {k: torch.cat([self.forget[k], self.retain[k]]) for k in ("input_ids", "attention_mask")}
            own, other = self._logits(both).split([len(self.forget["labels"]), len(self.retain["labels"])])
        else:
            own, other = self._logits(self.forget), self._logits(self.retain)
        nll, settings = self._nll(own, self.forget), self.recipe.forget
        if settings.objective == "ga":
            forget = -nll.mean()
        elif settings.objective == "npo":
            forget = -2 / settings.beta * logsigmoid(-settings.beta * (self.reference - nll.sum(1))).mean()
        else:  # uce
            forget = -torch.log1p(-0.5 * (-nll).exp()).mean()
        per_token = self._nll(other, self.retain)
        retain = (per_token if self.token_weights is None else per_token * self.token_weights).mean()
        losses = {"forget": forget, "retain": retain}
        if self.recipe.mollm is not None:
            logprobs = log_softmax(other[:, :-1].float(), -1)
            losses["kl"] = (self.reference.exp() * (self.reference - logprobs)).sum(-1).mean()
        return losses

    def __call__(self, *, joint: bool = True, fused: bool | None = None) -> dict[str, float]:
        """Take one step and return its losses; `fused` is the argument of torch's AdamW."""
        losses = self.losses(joint=joint)
        gradients = self._common_descent(losses) if self.recipe.mollm is not None else self._gradient(losses)
        for p, gradient in zip(self.compact, gradients, strict=True):
            p.grad = gradient
        del gradients
        self.optimizer.param_groups[0]["fused"] = fused
        self.optimizer.step()
        for p, compact, experts in zip(self.parameters, self.compact, self.experts, strict=True):
            compact.grad = None
            if experts is not None:
                p.data.index_copy_(0, experts, compact.data)
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _gradient(self, losses: dict[str, Tensor]) -> list[Tensor | None]:
        return self._masked(self.recipe.forget.gamma * losses["forget"] + self.recipe.retain.alpha * losses["retain"])

    def _masked(self, loss: Tensor, *, retain_graph: bool = False) -> list[Tensor | None]:
        gradients = list(torch.autograd.grad(loss, self.parameters, retain_graph=retain_graph, allow_unused=True))
        for i, (mask, experts) in enumerate(zip(self.masks, self.experts, strict=True)):
            if gradients[i] is not None and mask is not None:
                gradients[i].mul_(mask)
            elif gradients[i] is not None and experts is not None:
                gradients[i] = gradients[i][experts]
        return gradients

    def _common_descent(self, losses: dict[str, Tensor]) -> list[Tensor | None]:
        settings, names = self.recipe.mollm, list(losses)
        # forget has a graph of its own; retain and KL share one
        sets = [self._masked(losses[name], retain_graph=name == "retain") for name in names]
        gram = torch.zeros(len(names), len(names), dtype=torch.float64)
        for gradients in zip(*sets, strict=True):
            for i, a in enumerate(gradients):
                for j, b in enumerate(gradients[: i + 1]):
                    if a is not None and b is not None:
                        gram[i, j] += (a * b).sum(dtype=torch.float32).double().cpu()
        gram = gram.tril() + gram.tril(-1).t()
        active = torch.ones(len(names), dtype=torch.bool)
        active[-1] = mollm.kl_active(float(losses["kl"].detach()), self.kl_floor, factor=settings.kl_floor)
        direction = mollm.common_descent(gram, normalize=settings.normalize, rescale=settings.rescale, active=active)
        coefficients, total = direction.coefficients.tolist(), sets[0]
        for i, gradient in enumerate(total):
            parts = [(c, own[i]) for c, own in zip(coefficients, sets, strict=True) if own[i] is not None]
            if not parts:
                continue
            (c, gradient), *others = parts
            gradient.mul_(c)
            for c, other in others:
                gradient.add_(other, alpha=c)
            total[i] = gradient
        return total


def _dense(words: Tensor, p: Tensor) -> Tensor:
    """Return the mask as bool, unpacked in parts so that nothing larger exists in between."""
    mask = torch.empty(p.shape, dtype=torch.bool, device=p.device)
    for part, own in zip(mask, words, strict=True) if p.dim() > 1 else [(mask, words)]:
        part.copy_(unpack_bits(own, p.shape[-1]))
    return mask


def free_experts(model: nn.Module) -> None:
    """Replace the experts by ones that cost nothing, neither in computation nor in the optimizer.

    No kernel can beat this.
    """
    for module in experts_modules(model).values():
        module.forward = lambda x, index, weights: x * weights.sum(1, keepdim=True).to(x.dtype)
