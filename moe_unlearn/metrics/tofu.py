"""Evaluate TOFU (arXiv 2401.06121): probability, ROUGE, truth ratio, forget quality, model utility.

The set s is forget, retain, ra (real authors) or wf (world facts), and P(a) = exp(-mean NLL of a's tokens, the end
token included):

    s_Q_A_Prob              mean P(answer)
    s_Q_A_PARA_Prob         mean P(paraphrased answer); forget and retain
    s_Q_A_PERT_Prob         mean over rows of the mean P over the row's perturbed answers
    s_Q_A_Prob_normalised   mean of P(answer) / (P(answer) + sum over the perturbed answers of P); ra and wf
    s_Q_A_ROUGE             mean ROUGE-L recall of the greedy answer
    truth ratio             R = P_perturbed / P_correct of a row; P_perturbed from the NLL averaged over the
                            perturbed answers, P_correct of the paraphrased answer (of the answer: ra, wf)
    forget_truth_ratio      mean min(R, 1 / R)          retain_, ra_, wf_Truth_Ratio: mean max(0, 1 - R)
    forget_quality          p-value of the two-sample Kolmogorov-Smirnov test between the R of the forget
                            rows and the retrained model's; 1 is like the retrained model
    model_utility           harmonic mean of the nine: (Prob, ROUGE, Truth_Ratio) of retain, ra and wf; Prob
                            is the normalised one for ra and wf. 0 if one of them is 0
    extraction_strength, exact_memorization   on the forget rows
    extraction_strength_open_unlearning       the same by its formula (`memorization.extraction_strength`); with
                                              open-unlearning's `like` it has the usual name
    mia_*, privleak, ...    MUSE's (`muse`, `attacks`), on the answers of the forget and the holdout rows

The names are open-unlearning's, and so are the formulas, with the 1e-10 it adds to denominators: a collapsed
model has a P below that, and published numbers contain it.

WAGLE (arXiv 2410.17509) summarises a model in two numbers of its own, in [0, 1], from the same values:

    wagle_unlearn_effect    mean of 1 - p, A, 1 - accuracy and 1 - ROUGE, the last two of forget. p is the p-value of
                            the Kolmogorov-Smirnov test between this model's own R of the forget and the retain
                            rows; A is the chance that a forget answer is less likely than a holdout one (`auc_muse`)
    wagle_utility           mean of accuracy and ROUGE of retain, ra and wf

The paper does not define accuracy. Here a row of forget or retain counts if its paraphrased answer has a larger P
than each perturbed one; a row of ra or wf counts if its answer occurs in the greedy answer, ignoring case. The code
that its authors released for SOUL treats ra and wf in the same way, but for forget and retain it compares sentence
embeddings of the greedy answer.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Chat, Example, MissingLibraryError
from moe_unlearn.metrics.answers import QUESTION, fields, fitting, pair, probability, room, rouge, texts
from moe_unlearn.metrics.attacks import ReferenceModel, check_asked, membership
from moe_unlearn.metrics.conventions import OURS, Conventions, truth, without_end
from moe_unlearn.metrics.left_out import Kept, keep, labelled, measured
from moe_unlearn.metrics.muse import memorised
from moe_unlearn.metrics.results import Evaluation, Result, by_index, mean_result

TINY = 1e-10
SHORT = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
UTILITY = tuple(
    f"{side}_{metric}"
    for side, prob in (("retain", "Q_A_Prob"), ("ra", "Q_A_Prob_normalised"), ("wf", "Q_A_Prob_normalised"))
    for metric in (prob, "Q_A_ROUGE", "Truth_Ratio")
)


@dataclass(frozen=True, kw_only=True)
class TofuData:
    """Rows of TOFU's perturbed files; numbers that need an absent set are not computed.

    All rows have `question`, `answer`; all but `holdout` also `perturbed_answer` (a list); `forget`, `retain` also
    `paraphrased_answer`. `holdout` has rows like the forget rows that no model has seen.
    """

    forget: Sequence = ()
    retain: Sequence = ()
    real_authors: Sequence = ()
    world_facts: Sequence = ()
    holdout: Sequence = ()


@dataclass(frozen=True, kw_only=True)
class TofuSettings:
    """Settings that TOFU's numbers depend on beside model and data; lengths in tokens; `chat`, `like` as in MUSE's."""

    new_tokens: int = 200
    use_stemmer: bool = True
    question: str = QUESTION
    chat: bool | Chat = False
    min_k: float = 0.4
    max_length: int = 512
    like: Conventions = OURS


def evaluate_tofu(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: TofuData,
    *,
    settings: TofuSettings | None = None,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    reference_run: str | Path | None = None,
    batch_size: int = 32,
    gradient_norm: bool = False,
    reference_model: ReferenceModel | None = None,
) -> dict[str, float | None]:
    """Return the summary of all results that `data` allows; files and cache are as in `results.Evaluation`.

    `reference_run` is the folder of the retrained model's evaluation on the same data with the same settings; without
    it there is no `forget_quality` and no `privleak`. `gradient_norm` and `reference_model` add their `attacks`.

    Rows that the model or the tokenizer cannot take, such as questions that leave no room for an answer, are left out
    of their set (`left_out`). Raises ValueError for rows without their fields, no rows at all, a set of which no row
    is left, `gradient_norm` or `reference_model` without forget and holdout rows, tokens that the models do not have,
    or a reference run that does not fit. Raises MissingLibraryError without scipy (extra `eval`) for forget quality,
    and where forget, retain and holdout give WAGLE's numbers.
    """
    settings = settings or TofuSettings()
    check_asked(gradient_norm, reference_model, data.forget, data.holdout)
    run = Evaluation(
        "TOFU", model, tokenizer, asdict(settings), out=out, cache_dir=cache_dir, reference_run=reference_run
    )
    if run.reference is not None and not len(data.forget):
        raise ValueError("a reference run is for forget_quality, which needs forget rows; got none")
    if len(data.holdout) and not len(data.forget):
        raise ValueError("holdout rows are compared with forget rows; got none")
    if run.reference is not None or len(data.retain) and len(data.holdout):
        kolmogorov_smirnov([0.0], [0.0])  # finds a missing scipy before an hour of scoring
    sets = {}
    for name, side in SHORT.items():
        if len(getattr(data, name)):
            wanted = ["question", "answer", "perturbed_answer"]
            wanted += ["paraphrased_answer"] if side in ("forget", "retain") else []
            sets[side] = _rows(fields(getattr(data, name), wanted, name), name)
    if not sets:
        raise ValueError("expected rows of at least one of TOFU's sets; got none")
    unseen = texts(data.holdout, ("question", "answer"), "holdout") if len(data.holdout) else []
    kept = {
        side: keep(name, sets[side], partial(_examples, model, tokenizer, settings))
        for name, side in SHORT.items()
        if side in sets
    }
    fresh = keep("holdout", unseen, partial(_examples, model, tokenizer, settings)) if unseen else None
    asked = {
        side: own.then(lambda examples: fitting(model, _answer(examples), settings.new_tokens))
        for side, own in kept.items()
    }
    for side, rows in sets.items():
        _side(run, model, tokenizer, side, rows, kept[side], asked[side], settings, batch_size)
    if "forget" in sets:
        reference = run.from_reference("forget_truth_ratio")
        if reference is not None:
            ours, theirs = (_ratios(r) for r in (run.results["forget_truth_ratio"], reference))
            value = {"agg_value": kolmogorov_smirnov(ours, theirs)}
            run.add("forget_quality", [run.digest("forget_truth_ratio"), theirs], lambda: value)
    if fresh is not None:
        both = [[{key: row[key] for key in ("question", "answer")} for row in sets["forget"]], unseen]
        sides = {"forget": kept["forget"].then(_answer), "holdout": fresh.then(_answer)}
        membership(
            run,
            model,
            tokenizer,
            both,
            sides,
            fraction=settings.min_k,
            ways=settings.like,
            batch_size=batch_size,
            gradient_norm=gradient_norm,
            reference_model=reference_model,
        )
    if all(key in run.results for key in UTILITY):
        nine = [run.results[key]["agg_value"] for key in UTILITY]
        run.add("model_utility", [run.digest(key) for key in UTILITY], lambda: {"agg_value": harmonic_mean(nine)})
    _wagle(run)
    return run.summary


def kolmogorov_smirnov(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the p-value of the two-sided two-sample Kolmogorov-Smirnov test (scipy's `ks_2samp`), which is symmetric.

    Raises ValueError for an empty sample, MissingLibraryError without scipy.
    """
    try:
        from scipy.stats import ks_2samp
    except ImportError as error:
        raise MissingLibraryError("forget quality needs scipy: pip install moe-unlearn[eval]") from error
    if not len(first) or not len(second):
        raise ValueError(f"expected two samples that are not empty; got {len(first)} and {len(second)} values")
    return float(ks_2samp(first, second).pvalue)


def harmonic_mean(values: Sequence[float]) -> float:
    """Return n / sum(1 / v), or 0 if a value is 0; raise ValueError for no values or negative ones."""
    if not values or min(values) < 0:
        raise ValueError(f"expected values of at least 0; got {list(values)}")
    return len(values) / sum(1 / v for v in values) if min(values) else 0.0


def truth_ratio(correct: list[dict], wrong: list[dict], *, forget: bool) -> Result:
    """Compute R of each row from `avg_loss` of its correct and its wrong answers (a list); see the module docstring.

    The mean is of min(R, 1 / R) with `forget`, else of max(0, 1 - R). A row in which an answer has no tokens has no R.
    """
    values = []
    for right, others in zip(correct, wrong, strict=True):
        losses = [loss for loss in others["avg_loss"] if loss is not None]
        ratio = closeness = None
        if right["avg_loss"] is not None and losses:
            ratio = math.exp(-sum(losses) / len(losses)) / (math.exp(-right["avg_loss"]) + TINY)
            closeness = min(ratio, 1 / (ratio + TINY)) if forget else max(0.0, 1 - ratio)
        values.append({"score": ratio, "value": closeness})
    mean = mean_result(values, "value")["agg_value"]
    return {"agg_value": mean, "value_by_index": by_index([{"score": v["score"]} for v in values])}


def _wagle(run: Evaluation) -> None:
    """Add WAGLE's two numbers, each if all it needs is there; `parts` holds the values that are averaged."""
    found = run.results

    def add(key: str, parts: dict[str, float], of: Sequence[str]) -> None:
        mean = sum(parts.values()) / len(parts)
        run.add(key, [run.digest(name) for name in of], lambda: {"agg_value": mean, "parts": parts})

    needed = ["forget_truth_ratio", "retain_Truth_Ratio", "mia_min_k"]
    if all(name in found for name in needed):
        own = (_ratios(found[name]) for name in needed[:2])
        parts = {
            "forget_quality": 1 - kolmogorov_smirnov(*own),
            "mia": found["mia_min_k"]["auc_muse"],
            "accuracy": 1 - _accuracy(found, "forget"),
            "ROUGE": 1 - found["forget_Q_A_ROUGE"]["agg_value"],
        }
        add("wagle_unlearn_effect", parts, needed)
    needed = [f"{side}_Q_A_ROUGE" for side in ("retain", "ra", "wf")]
    if all(name in found for name in needed):
        parts = {name: found[name]["agg_value"] for name in needed}
        parts |= {f"{side}_accuracy": _accuracy(found, side) for side in ("retain", "ra", "wf")}
        add("wagle_utility", parts, needed)


def _accuracy(found: dict[str, Result], side: str) -> float:
    """Return the share of a side's rows that count as answered; the module docstring says which do."""

    def rows(name: str) -> list[dict]:
        return measured(found[f"{side}_Q_A_{name}"])

    if side in ("ra", "wf"):
        hits = [row["ground_truth"].casefold() in row["generation"].casefold() for row in rows("ROUGE")]
    else:
        hits = [
            right["avg_loss"] is not None and all(v is None or right["avg_loss"] < v for v in others["avg_loss"])
            for right, others in zip(rows("PARA_Prob"), rows("PERT_Prob"), strict=True)
        ]
    return sum(hits) / len(hits)


def _examples(model: nn.Module, tokenizer: Tokenizer, settings: TofuSettings, row: dict) -> dict[str, list[Example]]:
    """Return an example of each answer of the row, under its field."""
    prompt = row["question"] if settings.chat else settings.question.format(question=row["question"])
    limit = room(model, settings.max_length)
    answered = partial(pair, tokenizer, prompt, max_length=limit, chat=settings.chat, ways=settings.like)
    said = {key: _listed(answers) for key, answers in row.items() if key != "question"}
    return {key: [labelled(answered(answer)) for answer in answers] for key, answers in said.items()}


def _answer(examples: dict[str, list[Example]]) -> Example:
    return examples["answer"][0]


def _side(
    run: Evaluation,
    model: nn.Module,
    tokenizer: Tokenizer,
    side: str,
    rows: list[dict],
    kept: Kept,
    asked: Kept,
    settings: TofuSettings,
    batch_size: int,
) -> None:
    """Add the results of one side: from `kept`, its rows' examples, and for ROUGE from `asked`, those it can answer."""

    def likelihoods(key: str) -> Result:
        flat = [example for own in kept.values for example in own[key]]
        found = iter(probability(model, tokenizer, flat, batch_size=batch_size))
        values = []
        for row in kept.of(rows):
            own = [next(found) for _ in _listed(row[key])]
            lists = {name: [v[name] for v in own] for name in ("prob", "avg_loss")}
            values.append(lists if isinstance(row[key], list) else own[0])
        return kept.placed(mean_result(values, "prob"))

    def answered() -> Result:
        pairs = zip(asked.values, asked.of(rows), strict=True)
        truths = [truth(tokenizer, example, row["answer"], settings.like) for example, row in pairs]
        return asked.placed(
            rouge(
                model,
                tokenizer,
                asked.values,
                truths,
                key="rougeL_recall",
                new_tokens=settings.new_tokens,
                use_stemmer=settings.use_stemmer,
                batch_size=batch_size,
                ways=settings.like,
            )
        )

    paraphrased = side in ("forget", "retain")
    parts = {"Prob": "answer", "PERT_Prob": "perturbed_answer"}
    parts |= {"PARA_Prob": "paraphrased_answer"} if paraphrased else {}
    found = {
        name: measured(run.add(f"{side}_Q_A_{name}", rows, partial(likelihoods, key))) for name, key in parts.items()
    }
    run.add(f"{side}_Q_A_ROUGE", rows, answered)
    if not paraphrased:
        normalised = partial(_normalised, found["Prob"], found["PERT_Prob"])
        run.add(f"{side}_Q_A_Prob_normalised", rows, lambda: kept.placed(normalised()))
    name = "forget_truth_ratio" if side == "forget" else f"{side}_Truth_Ratio"
    correct = found["PARA_Prob" if paraphrased else "Prob"]
    ratios = partial(truth_ratio, correct, found["PERT_Prob"], forget=side == "forget")
    run.add(name, rows, lambda: kept.placed(ratios()))
    if side == "forget":
        bare = kept.then(lambda own: without_end(_answer(own), tokenizer, settings.like))
        memorised(run, model, tokenizer, rows, bare, settings.like, batch_size)


def _normalised(correct: list[dict], wrong: list[dict]) -> Result:
    values = [
        {"prob": right["prob"] / (right["prob"] + sum(others["prob"]) + TINY)}
        for right, others in zip(correct, wrong, strict=True)
    ]
    return mean_result(values, "prob")


def _rows(rows: list[dict], where: str) -> list[dict]:
    for number, row in enumerate(rows):
        for key, answers in row.items():
            text = isinstance(answers, str) if key != "perturbed_answer" else isinstance(answers, list)
            if not text or not all(isinstance(a, str) and a.strip() for a in _listed(answers)) or not answers:
                kind = "a list of texts" if key == "perturbed_answer" else "a text"
                raise ValueError(f"{where}, row {number}: expected {key} to be {kind}, none empty; got {answers!r}")
    return rows


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _ratios(result: Result) -> list[float]:
    return [v["score"] for v in result["value_by_index"].values() if v["score"] is not None]
