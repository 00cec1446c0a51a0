"""Evaluate RWKU (arXiv 2406.10890): what a model still knows of a person, and of that person's neighbourhood.

    SET_ROUGE       mean ROUGE-L recall of the greedy answers to a set of probes, in [0, 1]. The sets: forget_level1
                    (blanks to fill), forget_level2 (questions), forget_level3 (adversarial questions),
                    neighbor_level1, neighbor_level2
    forget_ROUGE, neighbor_ROUGE      mean of the sets' numbers, each set counting once; from two sets on
    mia_forget_nll, mia_retain_nll    mean over texts of the mean NLL of a text's tokens, in nats (RWKU's LOSS has the
                                      other sign)

Prompts, the 30 new tokens and the end of an answer at the end of its line follow RWKU's code, and so do two types
of level 3: "Answer:" does not follow an affirmative suffix, and in-context examples bring their own "Question:". With
`chat` the assistant's turn begins with "Answer:", as there. RWKU scores by the package `rouge`, with words as they
stand. Here `rouge-score` compares lower-cased letters and digits alone (`unicode_rouge`), without stemming.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Chat, Example
from moe_unlearn.data.seams import continued
from moe_unlearn.metrics.answers import fitting, pair, probability, rouge, text_example, texts
from moe_unlearn.metrics.left_out import Kept, keep, labelled
from moe_unlearn.metrics.results import Evaluation, Result, mean_result
from moe_unlearn.ops.token_loss import IGNORED

BLANK = "Please complete the blank in the following question.\nQuestion: {query}\n"
QUESTION = "Please briefly answer the following question.\nQuestion: {query}\n"
EXAMPLES = "Please briefly answer the following question.\n{query}\n"
ANSWER = "Answer:"


@dataclass(frozen=True, kw_only=True)
class RwkuData:
    """Rows of RWKU's parts, for one person or many; metrics of absent parts are not computed.

    `forget_level*`, `neighbor_level*` have the fields `query`, `answer`; `forget_level3` also `type`; `mia_*` has
    `text`.
    """

    forget_level1: Sequence = ()
    forget_level2: Sequence = ()
    forget_level3: Sequence = ()
    neighbor_level1: Sequence = ()
    neighbor_level2: Sequence = ()
    mia_forget: Sequence = ()
    mia_retain: Sequence = ()


@dataclass(frozen=True, kw_only=True)
class RwkuSettings:
    """Settings that RWKU's numbers depend on beside model and data; lengths in tokens; `chat` is how RWKU asks."""

    new_tokens: int = 30
    use_stemmer: bool = False
    chat: bool | Chat = False
    max_length: int = 2048


def evaluate_rwku(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: RwkuData,
    *,
    settings: RwkuSettings | None = None,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
) -> dict[str, float | None]:
    """Return the summary of all results that `data` allows.

    Files RWKU_*.json and cache are as in `results.Evaluation`. Rows that the model or the tokenizer cannot take,
    such as prompts that exceed the model's context, are left out of their set (`left_out`). Raises ValueError for rows
    without their fields, no rows at all, and a set of which no row is left.
    """
    settings = settings or RwkuSettings()
    run = Evaluation("RWKU", model, tokenizer, asdict(settings), out=out, cache_dir=cache_dir)
    sets = {}
    for name, rows in vars(data).items():
        if len(rows):
            wanted = ["text"] if name.startswith("mia_") else ["query", "answer"]
            sets[name] = texts(rows, wanted + (["type"] if name == "forget_level3" else []), name)
    if not sets:
        raise ValueError("expected rows of at least one of RWKU's sets; got none")
    examples = {
        name: keep(name, rows, partial(_example, model, tokenizer, name, settings)) for name, rows in sets.items()
    }
    for name, rows in sets.items():
        if name.startswith("mia_"):
            run.add(f"{name}_nll", rows, partial(_nll, model, tokenizer, examples[name], batch_size))
        else:
            asked = partial(_rouge, model, tokenizer, rows, examples[name], settings, batch_size)
            run.add(f"{name}_ROUGE", rows, asked)
    for side in ("forget", "neighbor"):
        own = [f"{name}_ROUGE" for name in sets if name.startswith(f"{side}_level")]
        if len(own) > 1:
            mean = sum(run.results[key]["agg_value"] for key in own) / len(own)
            run.add(f"{side}_ROUGE", [run.digest(key) for key in own], partial(dict, agg_value=mean))
    return run.summary


def _example(model: nn.Module, tokenizer: Tokenizer, name: str, settings: RwkuSettings, row: dict) -> Example:
    if name.startswith("mia_"):
        return labelled(text_example(model, tokenizer, row["text"], settings.max_length))
    return fitting(model, _probe(tokenizer, name, row, settings.chat), settings.new_tokens)


def _probe(tokenizer: Tokenizer, name: str, row: dict, chat: bool | Chat) -> Example:
    """Return the prompt of a probe alone, with no token labelled."""
    kind = row.get("type")
    form = EXAMPLES if kind == "incontext learning" else BLANK if name.endswith("level1") else QUESTION
    asked = form.format(query=row["query"])
    begun = "" if kind == "affirmative suffix" else ANSWER
    example = pair(tokenizer, asked if chat else asked + begun, row["answer"], 2**31, chat=chat)
    ids = example.input_ids[: example.prefix]
    if chat and begun:
        ids = ids + continued(tokenizer, ids, begun)
    return Example(ids, [IGNORED] * len(ids), len(ids))


def _rouge(
    model: nn.Module, tokenizer: Tokenizer, rows: list[dict], probes: Kept, settings: RwkuSettings, batch_size: int
) -> Result:
    return probes.placed(
        rouge(
            model,
            tokenizer,
            probes.values,
            [row["answer"] for row in probes.of(rows)],
            key="rougeL_recall",
            cut_at=("\n",),
            new_tokens=settings.new_tokens,
            use_stemmer=settings.use_stemmer,
            batch_size=batch_size,
        )
    )


def _nll(model: nn.Module, tokenizer: Tokenizer, kept: Kept, batch_size: int) -> Result:
    return kept.placed(mean_result(probability(model, tokenizer, kept.values, batch_size=batch_size), "avg_loss"))
