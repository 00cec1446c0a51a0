"""Look inside: can layers still tell a forgotten document from an unseen one, and do they still know its next token?

    probe   a linear probe (`probe.out_of_fold`) of each layer's hidden states, the mean over a document's positions,
            forget against holdout, split by document. The verdict rests on the mean of the layers' scores, each scaled
            to spread 1, and only against a retrained model: texts differ by more than what was trained on
    lens    the rank of the true next token when a layer's hidden states go through the final norm and the *former*
            model's head, -log(rank) on average over labelled tokens; a head that was taught to keep silent is passed by

The verdict of the lens rests on the last layer, whose scale the former model's own states give; the other layers make
a curve.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn.audit.attack import Attack, Outcome, Sides, Target, Values, Variant, mean
from moe_unlearn.audit.probe import FOLDS, out_of_fold
from moe_unlearn.data import Example, batches
from moe_unlearn.metrics.privacy import auc
from moe_unlearn.metrics.scoring import evaluating
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.head import decoder_of, head_of
from moe_unlearn.ranks import local


def _run(target: Target) -> Outcome:
    ranks, means = {}, {}
    for side, rows in target.rows.items():
        ranks[side], means[side] = _inside(target, rows)
    layers = len(ranks["forget"])
    variants = {
        "lens": Variant("states of the last layer through the former head", {"lens": _layer(ranks, layers - 1)})
    }
    more: dict = {"ranks": {side: [mean(own) for own in ranks[side]] for side in ranks}}
    positive = torch.arange(len(target.rows["forget"]) + len(target.rows["holdout"])) < len(target.rows["forget"])
    if min(len(target.rows["forget"]), len(target.rows["holdout"])) >= FOLDS:
        scores = [
            out_of_fold(
                torch.cat([means["forget"][layer], means["holdout"][layer]]), positive, seed=target.settings.seed
            )
            for layer in range(layers)
        ]
        together = torch.stack([own / own.std().clamp_min(1e-12) for own in scores]).mean(0)
        sides = {"forget": together[positive].tolist(), "holdout": together[~positive].tolist()}
        variants["probe"] = Variant("a linear probe of every layer", {"probe": sides})
        more["probes"] = [auc(own[~positive], own[positive]) for own in scores]
    return Outcome(variants, more)


def lens_of(target: Target) -> Sides:
    """Return the lens scores of the last layer by side: of the former model itself they are the scale."""
    return _layer({side: _inside(target, rows)[0] for side, rows in target.rows.items()}, -1)


def _inside(target: Target, rows: Sequence[Example]) -> tuple[list[Values], list[Tensor]]:
    """Return of each layer, embeddings first, the lens scores of documents, and their mean states [n, H] float32."""
    model = local(target.model)
    device = next(model.parameters()).device
    former = head_of(local(target.before))
    weight, bias = (None if own is None else own.detach().to(device) for own in (former.weight, former.bias))
    assert weight is not None
    ranks: list[Values] = []
    means: list[list[Tensor]] = []
    with evaluating(model):
        for batch in batches(rows, target.batch_size, pad_id=target.pad_id):
            batch = {key: value.to(device) for key, value in batch.items()}
            counted = target_mask(batch)
            for layer, (states, normed) in enumerate(_states(model, batch)):
                if layer == len(ranks):
                    ranks.append([])
                    means.append([])
                for row, mask in enumerate(counted):
                    logits = nn.functional.linear(normed[row, mask], weight, bias)
                    true = batch["input_ids"][row, 1:][mask[:-1]]
                    above = (logits > logits.gather(1, true[:, None])).sum(1)
                    ranks[layer].append(-(above + 1).double().log().mean().item())
                    attended = batch["attention_mask"][row].bool()
                    means[layer].append(states[row, attended].float().mean(0).cpu())
    return ranks, [torch.stack(own) for own in means]


def _states(model: nn.Module, batch: dict) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the hidden states [B, S, H] of the embeddings and of each layer, and the same after the final norm."""
    decoder: Any = decoder_of(model)
    out = decoder(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
        use_cache=False,
    )
    *inner, last = out.hidden_states
    norm = getattr(decoder, "norm", None) or nn.Identity()
    for states in inner:
        yield states, norm(states)
    yield last, last  # transformers norms the last states itself


def _layer(ranks: dict[str, list[Values]], layer: int) -> Sides:
    return {side: own[layer] for side, own in ranks.items()}


ATTACK = Attack(
    "inside",
    "Looking inside",
    "Probes ask hidden states whether a document was trained on, and the former head reads the next token off them.",
    _run,
)
