"""A run put together once: its batches, the order of its rows, and what it refuses."""

import itertools

import pytest
import torch

from moe_unlearn import data
from moe_unlearn.benchmark import tiny_models
from moe_unlearn.config import Recipe
from moe_unlearn.data.pairs import carry_loss
from moe_unlearn.runs.run import SIDES, Run

pytestmark = pytest.mark.quick

TEXTS = [f"the {a} {b} sat on the {c}" for a in ("red", "old") for b in ("cat", "dog", "owl") for c in ("mat", "hill")]
TOKENIZER = data.train_tokenizer(TEXTS, 270)
EXAMPLES = data.encode([data.Document("", text) for text in TEXTS], TOKENIZER, 32)
SMALL = tiny_models.Settings(hidden_size=16, intermediate_size=8, layers=1, heads=2, experts=4, top_k=2, max_length=32)


def run_of(*overrides, recipe="npo", forget=EXAMPLES[:5], retain=EXAMPLES[5:], seed=0):
    made = Recipe.load(recipe, ["batch_size=2", "steps=2", f"seed={seed}", *overrides])
    model = tiny_models.tiny_olmoe(len(TOKENIZER), settings=SMALL)
    return Run(model, TOKENIZER, made, {"forget": forget, "retain": retain})


def order(run, count):
    return [run.micro_batch(i)["forget"]["index"].tolist() for i in range(count)]


def test_a_side_has_every_row_once_and_in_order():
    run = run_of()
    for side, count in zip(SIDES, (5, 7), strict=True):
        batches = run.batches(side)
        assert list(itertools.chain(*(b["index"].tolist() for b in batches))) == list(range(count))
        assert [len(b["input_ids"]) for b in batches] == [2] * (count // 2) + [1]


def test_the_seed_alone_orders_the_forget_rows_anew_every_epoch():
    first = order(run_of(), 6)
    assert [len(batch) for batch in first] == [2, 2, 1] * 2
    epochs = [list(itertools.chain(*first[:3])), list(itertools.chain(*first[3:]))]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(5))
    assert order(run_of("retain_per_forget=1.4"), 6) == first != order(run_of(seed=1), 6)
    run = run_of()
    assert run.micro_batch(4)["forget"]["index"].tolist() == first[4], "whatever was asked for before"
    partners = [run.micro_batch(i)["retain"]["index"].tolist() for i in (0, 1, 2)]
    assert len(set(itertools.chain(*partners))) == 5, "no retain row twice before all have come"


def test_examples_in_a_file_give_the_weights_of_those_in_memory(tmp_path):
    """Everything that reads rows: refusals, references, statistics, mask, pairs, epochs and drawn rows."""
    documents = [data.Document("", text, f"{i}:") for i, text in enumerate(TEXTS)]
    sides = {"forget": documents[:5], "retain": documents[5:]}
    settings = ["forget.objective=idk_dpo", "trace.allow_empty=true", "retain_per_forget=1.5", "data.retain_rows=6"]

    def trained(kind, encoded):
        torch.manual_seed(0)
        run = run_of("steps=4", *settings, recipe="combined", **{side: encoded(own) for side, own in sides.items()})
        trainer = run.trainer(tmp_path / kind)
        trainer.train()
        return [*run.model.parameters()], trainer.unlearn_step.prepared.rows, trainer.state.log_history[:-1]

    weights, *others = trained("memory", lambda own: data.encode(own, TOKENIZER, 32))
    same, *theirs = trained("file", lambda own: data.stored(own, TOKENIZER, max_length=32))
    assert all(map(torch.equal, weights, same))
    assert theirs == others


def test_the_plan_knows_the_batches_and_changes_no_weight():
    run = run_of("trace.allow_empty=true", recipe="trace")
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    assert "TRACE" in str(run.plan())
    assert all(p.equal(before[name]) for name, p in run.model.named_parameters())


def test_a_set_without_loss_is_refused():
    silent = data.Example([5, 6], [5, -100], 0)
    assert carry_loss([silent, EXAMPLES[0]]) and not carry_loss([silent]) and not carry_loss([])
    for side in SIDES:
        with pytest.raises(ValueError, match=f"the {side} set carries no loss: all its labels are -100"):
            run_of(**{side: [silent]})


def test_what_the_recipe_needs_of_the_rows_is_checked():
    with pytest.raises(ValueError, match="example 0 has no prompt to refuse"):
        run_of(recipe="idk_dpo")
