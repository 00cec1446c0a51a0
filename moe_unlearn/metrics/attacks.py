"""Run membership inference attacks, which ask whether a model shows that it was trained on a document.

Each attack gives a row a score, which is larger the less the row looks as if it was trained on; p_t is the
probability of labelled token t given those to its left:

    mia_loss             -mean log p_t
    mia_min_k            minus the mean of the lowest 40 % of log p_t (Shi et al., arXiv 2310.16789)
    mia_min_k_plus_plus  the same of (log p_t - mu_t) / sigma_t, mean and standard deviation of log p over the
                         vocabulary weighted by p, sigma_t^2 at least 1e-6 (Zhang et al., arXiv 2404.02936)
    mia_zlib             mia_loss over the number of bytes to which zlib compresses the text of the labelled tokens
                         (Carlini et al., arXiv 2012.07805)
    mia_gradnorm         2-norm of the gradient of -mean log p_t, averaged over the parameters that have one, of those
                         that require one (Wang et al., arXiv 2402.17012); takes a backward pass a row, and memory
                         for these gradients
    mia_reference        mia_loss minus that of a reference model, which was not trained on the rows (Carlini et al.)

A result is the AUC of the scores, forget against holdout. `agg_value` and `auc` follow open-unlearning: 1 for a model
that knows the forget rows by heart, 0.5 for one that never saw them. `auc_muse` is MUSE's, 1 minus that. The
benchmark decides which tokens are labelled; with `drop_last` (`conventions`) the last of them counts for mia_loss,
mia_zlib and mia_reference only, as in open-unlearning.

Two results compare `mia_min_k` with the retrained model's, from a reference run, in percent: `privleak` compares the
MUSE AUCs, `rel_diff` open-unlearning's. Without a reference run `privleak_unseen` compares with 0.5, the AUC of a
model that never saw the rows. open-unlearning falls back on 0.5 silently; with its ways, so do `privleak` and
`rel_diff`.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Example, pad_token_id
from moe_unlearn.metrics.conventions import Conventions, without_end
from moe_unlearn.metrics.left_out import Kept, labelled, marks
from moe_unlearn.metrics.privacy import auc, lowest, min_k, privleak, rel_diff
from moe_unlearn.metrics.results import Evaluation, Result, by_index
from moe_unlearn.metrics.scoring import TokenScores, token_scores
from moe_unlearn.metrics.workers import check_whole, share
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.ops.token_loss import IGNORED
from moe_unlearn.prepare.reference import model_digest
from moe_unlearn.ranks import local

UNSEEN = 0.5
#: a model, or what makes it when it is needed
ReferenceModel = nn.Module | Callable[[], nn.Module]


def membership(
    run: Evaluation,
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence,
    sides: dict[str, Kept],
    *,
    fraction: float,
    ways: Conventions,
    batch_size: int,
    gradient_norm: bool = False,
    reference_model: ReferenceModel | None = None,
) -> None:
    """Add the attacks on the forget and holdout examples made of `rows`, and the comparisons of their AUC.

    A row is left out of all attacks if no token of it counts in one of them. `mia_gradnorm` is added with
    `gradient_norm`, `mia_reference` with a `reference_model`; one that is made by a function is let go afterwards.
    """
    pad, known = pad_token_id(tokenizer), {}

    def both(example: Example) -> tuple[Example, Example]:
        return example, labelled(without_end(example, tokenizer, ways) if ways.drop_last else example)

    sides = {name: kept.then(both) for name, kept in sides.items()}
    examples = {name: [whole for whole, _ in kept.values] for name, kept in sides.items()}
    counted = {name: [part for _, part in kept.values] for name, kept in sides.items()}

    sources = {"whole": (model, examples), "counted": (model, counted)}

    def scores(which: str) -> dict[str, list[TokenScores]]:
        if which not in known:
            of, own = sources[which]
            if which == "counted" and not ways.drop_last:
                return scores("whole")
            known[which] = {
                name: token_scores(of, side, batch_size=batch_size, pad_id=pad, standard=which != "reference")
                for name, side in own.items()
            }
        return known[which]

    def add(name: str, score: Callable[[str], torch.Tensor | list[float]], data: object = rows) -> None:
        def measured() -> Result:
            found = {side: torch.as_tensor(score(side), dtype=torch.float64) for side in sides}
            value, values = auc(found["forget"], found["holdout"]), {}
            for side, kept in sides.items():
                own = kept.placed({"value_by_index": by_index([{"score": v} for v in found[side].tolist()])})
                values[side] = {"value_by_index": own["value_by_index"]}
            return {"agg_value": value, "auc": value, "auc_muse": 1 - value, **values, **marks(*sides.values())}

        run.add(f"mia_{name}", data, measured)

    def standard(side: str) -> list[torch.Tensor]:
        return [s.standard[s.counted] for s in scores("counted")[side] if s.standard is not None]

    def loss(side: str, which: str = "whole") -> torch.Tensor:
        return -min_k(scores(which)[side], 1.0)

    add("loss", loss)
    add("min_k", lambda side: -min_k(scores("counted")[side], fraction))
    add("min_k_plus_plus", lambda side: -lowest(standard(side), fraction))
    add("zlib", lambda side: loss(side) / torch.tensor([compressed(e, tokenizer) for e in examples[side]]))
    if gradient_norm:
        # which parameters the mean is over is no part of the model's digest
        trained = sorted(name for name, p in local(model).named_parameters() if p.requires_grad)
        add("gradnorm", lambda side: gradient_norms(model, counted[side]), [rows, trained])
    if reference_model is not None:
        made = reference_model if isinstance(reference_model, nn.Module) else reference_model()
        sources["reference"] = (made, examples)
        add("reference", lambda side: loss(side) - loss(side, "reference"), [rows, model_digest(made)])
        del sources["reference"], made
    _compare(run, ways)


def check_asked(
    gradient_norm: bool, reference_model: ReferenceModel | None, forget: Sequence, holdout: Sequence
) -> None:
    """Check that there are forget and holdout rows for the attacks that were asked for; ValueError otherwise."""
    for name, asked in (("gradient norms", gradient_norm), ("a reference model", reference_model is not None)):
        if asked and not (len(forget) and len(holdout)):
            raise ValueError(
                f"the attack by {name} compares forget with holdout rows; got {len(forget)} forget and {len(holdout)} "
                "holdout"
            )


def _compare(run: Evaluation, ways: Conventions) -> None:
    ours, reference = run.results["mia_min_k"]["agg_value"], run.from_reference("mia_min_k")

    def add(key: str, compare: Callable[[float], float | None], theirs: float) -> None:
        value = {"agg_value": compare(theirs), "auc_muse": 1 - ours, "auc_muse_retrained": 1 - theirs}
        run.add(key, [run.digest("mia_min_k"), theirs], lambda: value)

    add("privleak_unseen", lambda theirs: privleak(1 - ours, 1 - theirs), UNSEEN)
    unseen = ways.unseen_auc if reference is None else reference["agg_value"]
    if unseen is not None:
        add("privleak", lambda theirs: privleak(1 - ours, 1 - theirs), unseen)
        add("rel_diff", lambda theirs: rel_diff(ours, theirs), unseen)


def compressed(example: Example, tokenizer: Tokenizer) -> int:
    """Return the number of bytes to which zlib compresses the text of the labelled tokens."""
    ids = [label for label in example.labels if label != IGNORED]
    return len(zlib.compress(str(tokenizer.decode(ids, skip_special_tokens=True)).encode("utf-8")))


def gradient_norms(model: nn.Module, examples: Sequence[Example]) -> list[float]:
    """Return, for each example in order, the mean over parameters of the 2-norm of its mean loss's gradient.

    Parameters without a gradient are left out. The model runs in evaluation mode, with one backward pass an example;
    `grad` of no parameter is touched. Raises ValueError if an example carries no label or no parameter requires a
    gradient, and for sharded weights.
    """
    check_whole(model, "mia_gradnorm")
    plain = local(model)
    weights = [p for p in plain.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("mia_gradnorm needs parameters that require a gradient; got none: model.requires_grad_(True)")
    for number, example in enumerate(examples):
        if all(label == IGNORED for label in example.labels[1:]):
            raise ValueError(f"example {number}: expected at least one token with a label; got none")

    def compute(own: list[Example]) -> list[float]:
        found = []
        for example in own:
            ids = torch.tensor([example.input_ids], device=weights[0].device)
            labels = torch.tensor(example.labels[1:], device=ids.device)
            logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            norms = [g.norm().double() for g in gradients if g is not None]
            found.append(torch.stack([norm.to(ids.device) for norm in norms]).mean().item())
        return found

    with evaluation_mode(plain), torch.enable_grad():
        return share(plain, examples, compute)
