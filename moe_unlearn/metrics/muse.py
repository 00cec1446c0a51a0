"""Evaluate MUSE (arXiv 2407.06460): verbatim and knowledge memorisation, privacy leakage, utility preservation.

    forget_verbmem_ROUGE   VerbMem: mean ROUGE-L F1 of the greedy continuation of forget prompts, in [0, 1]
    forget_knowmem_ROUGE   KnowMem: mean ROUGE-L F1 of the greedy answers to questions about the forget set
    retain_knowmem_ROUGE   UtilPreserv: the same about the retain set
    mia_min_k              AUC of the Min-40 % score, forget against holdout (see below); `attacks` describes other
                           attacks and the numbers made from them
    privleak               100 (A - A_retrained) / A_retrained, in percent; needs the retrained model's run
    extraction_strength, exact_memorization   on the verbatim prompts and continuations
    extraction_strength_open_unlearning       the same by its formula, where a wrong last token counts as extracted;
                                              with its `like` the plain name has this value

Names and units are open-unlearning's; MUSE prints the first three times 100. There are two conventions for the AUC.
open-unlearning's `mia_min_k` (also `auc`) is the chance that a forget document is likelier than a holdout document,
and so 1 for a model that knows them by heart. MUSE's A, here `auc_muse`, is 1 minus that. Both projects compute
PrivLeak from MUSE's: 0 is a model like the retrained one, and negative means under-unlearned.

`conventions` lists where the two and this package differ (ROUGE with or without stemming, seams, ends);
`conventions.like(NAME, MuseSettings)` gives settings that follow one of them in everything.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Chat, DocumentError, Example, pad_token_id
from moe_unlearn.metrics.answers import QUESTION, continuation, fitting, pair, room, rouge, text_example, texts
from moe_unlearn.metrics.attacks import ReferenceModel, check_asked, membership
from moe_unlearn.metrics.conventions import OURS, Conventions, truth, without_end
from moe_unlearn.metrics.left_out import Kept, keep, labelled
from moe_unlearn.metrics.memorization import exact_memorization, extraction_strength
from moe_unlearn.metrics.results import Evaluation, Result, mean_result
from moe_unlearn.metrics.scoring import TokenScores, token_scores

CUT_AT = ("\n\n", "\nQuestion", "Question:")


@dataclass(frozen=True, kw_only=True)
class MuseData:
    """Rows of MUSE's files; a metric whose rows are absent is not computed.

    `verbmem` has the fields `prompt`, `gt`. `forget_qa`, `retain_qa` and their few-shot examples `*_icl` have
    `question`, `answer`. `forget` and `holdout` (of the folder privleak) have `text`.
    """

    verbmem: Sequence = ()
    forget_qa: Sequence = ()
    forget_qa_icl: Sequence = ()
    retain_qa: Sequence = ()
    retain_qa_icl: Sequence = ()
    forget: Sequence = ()
    holdout: Sequence = ()


@dataclass(frozen=True, kw_only=True)
class MuseSettings:
    """Settings that MUSE's numbers depend on beside model and data; lengths in tokens.

    `chat` asks through the tokenizer's chat template instead of `question`. `max_length` cuts documents. `like` names
    the project whose ways are followed (`conventions`).
    """

    verbmem_tokens: int = 128
    knowmem_tokens: int = 32
    use_stemmer: bool = True
    question: str = QUESTION
    chat: bool | Chat = False
    min_k: float = 0.4
    max_length: int = 2048
    like: Conventions = OURS


def evaluate_muse(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: MuseData,
    *,
    settings: MuseSettings | None = None,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    reference_run: str | Path | None = None,
    batch_size: int = 32,
    gradient_norm: bool = False,
    reference_model: ReferenceModel | None = None,
) -> dict[str, float | None]:
    """Return the summary of all results that `data` allows; files and cache are as in `results.Evaluation`.

    `reference_run` is the folder of the retrained model's evaluation on the same data with the same settings; without
    it there is no `privleak`. `gradient_norm` and `reference_model` add their `attacks`. `privleak` is None where the
    retrained model's AUC is 0 (MUSE).

    Rows that the model or the tokenizer cannot take, such as prompts that exceed the model's context, are left out of
    their set (`left_out`). Raises ValueError for rows without their fields, for nothing to measure, for
    `gradient_norm` or `reference_model` without forget and holdout texts, for tokens that the models do not have, for
    a set of which no row is left, and for a reference run that does not fit.
    """
    settings = settings or MuseSettings()
    check_asked(gradient_norm, reference_model, data.forget, data.holdout)
    run = Evaluation(
        "MUSE", model, tokenizer, asdict(settings), out=out, cache_dir=cache_dir, reference_run=reference_run
    )
    # all rows are checked, and made into examples, before the first forward pass
    qa = {
        side: (texts(rows, ("question", "answer"), f"{side}_qa"), _shots(icl, f"{side}_qa_icl"))
        for side, rows, icl in (
            ("forget", data.forget_qa, data.forget_qa_icl),
            ("retain", data.retain_qa, data.retain_qa_icl),
        )
        if len(rows)
    }
    verbatim = texts(data.verbmem, ("prompt", "gt"), "verbmem") if len(data.verbmem) else []
    if bool(len(data.forget)) != bool(len(data.holdout)):
        raise ValueError(f"privleak needs both sides; got {len(data.forget)} forget and {len(data.holdout)} holdout")
    whole = [
        texts(rows, ("text",), side) for side, rows in (("forget", data.forget), ("holdout", data.holdout)) if len(rows)
    ]
    if not (qa or verbatim or whole):
        raise ValueError("expected rows of at least one of MUSE's sets; got none")
    if run.reference is not None and not whole:
        raise ValueError("a reference run is for privleak, which needs forget and holdout texts; got none")
    asked = {
        side: keep(f"{side}_qa", rows, partial(_question, model, tokenizer, shots, settings))
        for side, (rows, shots) in qa.items()
    }
    continued = keep("verbmem", verbatim, partial(_continuation, model, tokenizer, settings)) if verbatim else None
    sides = {
        side: keep(side, rows, partial(_text, model, tokenizer, settings))
        for side, rows in zip(("forget", "holdout"), whole, strict=False)
    }
    for side, (rows, shots) in qa.items():
        run.add(
            f"{side}_knowmem_ROUGE",
            [rows, shots],
            partial(_knowmem, model, tokenizer, rows, asked[side], settings, batch_size),
        )
    if continued is not None:
        _verbatim(run, model, tokenizer, verbatim, continued, settings, batch_size)
    if sides:
        membership(
            run,
            model,
            tokenizer,
            whole,
            sides,
            fraction=settings.min_k,
            ways=settings.like,
            batch_size=batch_size,
            gradient_norm=gradient_norm,
            reference_model=reference_model,
        )
    return run.summary


def _shots(rows: Sequence, where: str) -> list[dict]:
    return texts(rows, ("question", "answer"), where) if len(rows) else []


def _question(model: nn.Module, tokenizer: Tokenizer, shots: list[dict], settings: MuseSettings, row: dict) -> Example:
    shown = "".join(f"{settings.question.format(question=s['question'])}{s['answer']}\n\n" for s in shots)
    prompt = shown + (row["question"] if settings.chat else settings.question.format(question=row["question"]))
    example = pair(tokenizer, prompt, row["answer"], room(model, 2**31), chat=settings.chat, ways=settings.like)
    return fitting(model, example, settings.knowmem_tokens)


def _knowmem(
    model: nn.Module, tokenizer: Tokenizer, rows: Sequence[dict], asked: Kept, settings: MuseSettings, batch_size: int
) -> Result:
    pairs = zip(asked.values, asked.of(rows), strict=True)
    truths = [truth(tokenizer, example, row["answer"], settings.like) for example, row in pairs]
    return asked.placed(
        rouge(
            model,
            tokenizer,
            asked.values,
            truths,
            key="rougeL_f1",
            cut_at=CUT_AT,
            new_tokens=settings.knowmem_tokens,
            use_stemmer=settings.use_stemmer,
            batch_size=batch_size,
            ways=settings.like,
        )
    )


def _continuation(model: nn.Module, tokenizer: Tokenizer, settings: MuseSettings, row: dict) -> Example:
    limit, cut = room(model, settings.max_length), settings.verbmem_tokens
    example = continuation(tokenizer, row["prompt"], row["gt"], limit, cut, settings.like)
    return fitting(model, example, cut)


def _verbatim(
    run: Evaluation,
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[dict],
    continued: Kept,
    settings: MuseSettings,
    batch_size: int,
) -> None:
    cut, ways = settings.verbmem_tokens, settings.like

    def verbmem() -> Result:
        pairs = zip(continued.values, continued.of(rows), strict=True)
        truths = [truth(tokenizer, example, row["gt"], ways, tokens=cut) for example, row in pairs]
        return continued.placed(
            rouge(
                model,
                tokenizer,
                continued.values,
                truths,
                key="rougeL_f1",
                new_tokens=cut,
                use_stemmer=settings.use_stemmer,
                batch_size=batch_size,
                ways=ways,
            )
        )

    run.add("forget_verbmem_ROUGE", rows, verbmem)
    if ways.drop_last:
        continued = continued.then(lambda example: without_end(example, tokenizer, ways))
    memorised(run, model, tokenizer, rows, continued, ways, batch_size)


def memorised(
    run: Evaluation,
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[dict],
    kept: Kept,
    ways: Conventions,
    batch_size: int,
) -> None:
    """Add `extraction_strength`, ours and open-unlearning's, and `exact_memorization`, from one pass over `kept`.

    With open-unlearning's `like`, its value has the usual name and ours is left out.
    """
    kept = kept.then(labelled)
    scores: list[TokenScores] = []

    def measured(metric: Callable[[TokenScores], float | None]) -> Result:
        if not scores:
            scores.extend(token_scores(model, kept.values, batch_size=batch_size, pad_id=pad_token_id(tokenizer)))
        return kept.placed(mean_result([{"score": metric(score)} for score in scores], "score"))

    theirs = partial(extraction_strength, like_open_unlearning=True)
    run.add("extraction_strength", rows, lambda: measured(theirs if ways.last_extracted else extraction_strength))
    if not ways.last_extracted:
        run.add("extraction_strength_open_unlearning", rows, lambda: measured(theirs))
    run.add("exact_memorization", rows, lambda: measured(exact_memorization))


def _text(model: nn.Module, tokenizer: Tokenizer, settings: MuseSettings, row: dict) -> Example:
    example = text_example(model, tokenizer, row["text"], settings.max_length, settings.like)
    if len(example) - settings.like.drop_last < 2:
        raise DocumentError(f"expected a text of at least two tokens; got {row['text']!r}")
    return example
