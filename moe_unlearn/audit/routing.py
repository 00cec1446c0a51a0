"""Send the tokens where they went before: unlearning of a Mixture-of-Experts may only have moved its router.

    router back     the former routers' weights and correction biases in this model
    routes forced   each token goes to the experts it visited in the former model, weighed by this model's router
    top-k +1, ...   one or two experts more or fewer for every token
    temperature     router logits over T, by which the weights of the experts move, and their choice where it is sampled

What returns under one of these was in the experts all along (GRIP, arXiv 2601.16905, where unlearning moves routes and
leaves the knowledge). Experts put back one by one and all together hold former weights, so that they say where the
knowledge was and have no verdict: `recovered` is a table layer x expert of the nats a token by which the former self
of that expert alone raises the log-likelihood of the forget documents, of the experts that these visit most.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn.audit.attack import Attack, Outcome, Sides, Target, Values, Variant, mean, reading
from moe_unlearn.audit.weights import restored, router_tensors
from moe_unlearn.data import batches
from moe_unlearn.experts import experts_modules
from moe_unlearn.metrics.routing import Routes as FormerRoutes
from moe_unlearn.metrics.routing import routes
from moe_unlearn.metrics.scoring import evaluating
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.head import token_losses
from moe_unlearn.ranks import local
from moe_unlearn.verify.forced_routing import Routes

TEMPERATURES = (0.5, 2.0)
MORE_EXPERTS = (-1, 1, 2)
_MEASURED = 32  # forget documents on which experts are put back one by one


def _run(target: Target) -> Outcome:
    variants = {"router back": Variant("former routers", _with_former_routers(target))}
    variants["routes forced"] = Variant("former routes, token by token", {"loglik": _forced(target)})
    for more in MORE_EXPERTS:
        with _more_experts(target, more) as possible:
            if possible:
                variants[f"top-k {more:+d}"] = Variant(f"{more:+d} experts a token", target.read())
    for temperature in TEMPERATURES:
        with restored(router_tensors(target.model).values()), torch.no_grad():
            for name, router in router_tensors(target.model).items():
                if not name.endswith("correction_bias"):
                    router.div_(temperature)
            variants[f"temperature {temperature:g}"] = Variant(f"router temperature {temperature:g}", target.read())
    table, together = _experts_back(target)
    variants |= together
    return Outcome(variants, {"recovered": table})


def _with_former_routers(target: Target) -> dict[str, Sides]:
    ours, former = router_tensors(target.model), router_tensors(target.before)
    with restored(ours.values()), torch.no_grad():
        for name, router in ours.items():
            router.copy_(former[name])
        return target.read()


def _forced(target: Target) -> Sides:
    """Return the log-likelihood of all documents with each token sent to the experts of the former model."""
    model, found = local(target.model), Sides()
    for side, rows in target.rows.items():
        former, taken, values = target.routes[side], Routes(model), Values()
        known = Routes(model)
        known.add(dict(zip(former.layers, former.top_k_index, strict=True)))
        device = next(model.parameters()).device
        for batch in batches(rows, target.batch_size, pad_id=target.pad_id):
            batch = {key: value.to(device) for key, value in batch.items()}
            with evaluating(model), taken.record(model, known):
                losses = token_losses(model, batch)
            values += [-own[mask].double().mean().item() for own, mask in zip(losses, target_mask(batch), strict=True)]
        found[side] = values
    return found


@contextlib.contextmanager
def _more_experts(target: Target, more: int) -> Iterator[bool]:
    """Let every router choose `more` experts a token inside; yield whether they do: some have their number built in."""
    routers: list[Any] = [
        module
        for module in local(target.model).modules()
        if isinstance(getattr(module, "top_k", None), int) and any(True for _ in module.parameters(recurse=False))
    ]
    former = target.routes["forget"]
    wanted = former.top_k_index.shape[2] + more
    if not routers or not 0 < wanted <= former.num_experts:
        yield False
        return
    try:
        for router in routers:
            router.top_k += more
        yield routes(target.model, target.rows["forget"][:1]).top_k_index.shape[2] == wanted
    finally:
        for router in routers:
            router.top_k -= more


def _experts_back(target: Target) -> tuple[list[list[float | None]], dict[str, Variant]]:
    """Return the table of what single experts bring back, and the variants in which several are put back together."""
    rows = target.rows["forget"][:_MEASURED]
    ours, former = (_experts(model) for model in (target.model, target.before))
    chosen = _most_visited(target.routes["forget"], target.settings.experts)
    table: list[list[float | None]] = [[None] * target.routes["forget"].num_experts for _ in ours]

    def put_back(places: Sequence[tuple[int, int]]) -> None:
        for layer, expert in places:
            for name, weight in ours[layer].items():
                weight[expert].copy_(former[layer][name][expert])

    def loglik() -> float:
        return mean(reading(target.scored(rows))["loglik"])

    known = loglik()
    for layer, expert in chosen:
        slices = [weight.detach()[expert] for weight in ours[layer].values()]
        with restored(slices), torch.no_grad():
            put_back([(layer, expert)])
            table[layer][expert] = loglik() - known
    every = [(layer, expert) for layer, row in enumerate(table) for expert in range(len(row))]
    variants = {}
    for name, label, places in (
        ("experts back", f"the {len(chosen)} experts that the documents visit most, as they were", chosen),
        ("all experts back", "all experts as they were", every),
    ):
        with restored(weight for layer in ours for weight in layer.values()), torch.no_grad():
            put_back(places)
            variants[name] = Variant(label, target.read(), judged=False)
    return table, variants


def _experts(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return the weights of each layer's experts by name, the experts in their first dimension."""
    layers = experts_modules(local(model)).values()
    return [{name: p for name, p in module.named_parameters() if p.dim() > 1} for module in layers]


def _most_visited(former: FormerRoutes, count: int) -> list[tuple[int, int]]:
    """Return layer and expert of those that the most tokens visited, in order."""
    hits = torch.stack(
        [torch.bincount(own.flatten().long(), minlength=former.num_experts) for own in former.top_k_index]
    )
    best = hits.flatten().sort(descending=True, stable=True).indices[: min(count, int((hits > 0).sum()))]
    return sorted(divmod(place, former.num_experts) for place in best.tolist())


def _refuses(target: Target) -> str:
    return "" if experts_modules(local(target.model)) else "the model has no Mixture-of-Experts layers"


ATTACK = Attack(
    "routing",
    "Former routes",
    "Tokens are sent where they went before, or elsewhere: knowledge that the router merely avoids comes back.",
    _run,
    refuses=_refuses,
)
