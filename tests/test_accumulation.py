"""A step is that of all its rows in one batch, however they are cut into micro-batches."""

import copy

import pytest
import torch

from moe_unlearn import data as rows_of
from moe_unlearn.benchmark.suite import unlearning
from moe_unlearn.config import Recipe
from moe_unlearn.data import Example, ForgetRetainDataset
from moe_unlearn.errors import RetainBudgetError
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.models import tiny_olmoe
from tests.support.steps import SMALL, VOCAB, changed, made_of, recipe, weights
from tests.support.tokenizers import TOKENIZERS
from tests.support.training import arguments

pytestmark = pytest.mark.quick
FORGET, RETAIN = (4, 30, 6, 20), (25, 5, 8, 40)
# two orders of sums in float64, through a model and a step
CLOSE = 2.0**-30
CASES = {
    "ga with retain": ("graddiff", ["forget.gamma=0.5"]),
    "ga": ("ga", []),
    "npo": ("npo", []),
    "simnpo": ("simnpo", []),
    "idk_dpo": ("idk_dpo", []),
    "idk_nll": ("idk_dpo", ["forget.objective=idk_nll"]),
    "level": ("graddiff", ["forget.objective=level"]),
    "level of sequences": ("graddiff", ["forget.objective=level", "forget.unit=sequence"]),
    "level, mollm": ("level", ["mollm.kl_floor=0"]),
    "ceu": ("ceu", []),
    "undial": ("undial", []),
    "pdu": ("pdu", ["retain.alpha=1.0"]),
    "kl": ("kl_min", []),
    "rmu": ("rmu", []),
    "rmu, tokens kept": ("rmu", ["retain.objective=nll"]),
    "seuf": ("seuf", []),
    "trace": ("trace", []),
    "trace on-line": ("trace", ["trace.refresh=online"]),
    "wagle": ("wagle", []),
    "mollm": ("mollm", ["mollm.kl_floor=0"]),
    "three levers": ("combined", ["mollm.kl_floor=0"]),
}


def examples(lengths, seed):
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]
    return [Example(row, [-100, *row[1:]], 1) for row in ids]


def cut(examples, size, refused=None):
    """The examples in batches of `size`, each row known by its number."""
    made = []
    for i in range(0, len(examples), size):
        batch = rows_of.collate(examples[i : i + size], range(i, i + size))
        if refused is not None:
            answers = rows_of.collate(refused[i : i + size], range(i, i + size))
            batch |= {f"idk_{key}": answers[key] for key in ("input_ids", "attention_mask", "labels")}
        made.append(batch)
    return made


def pairs_of(size):
    forget = cut(examples(FORGET, 1), size, examples((9, 5, 12, 7), 3))
    return list(zip(forget, cut(examples(RETAIN, 2), size), strict=True))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).double().eval()


def made(name, *overrides):
    return recipe(name, "optimizer.name=sgd", *overrides, lr=1e-2)


def updated(model, settings, size):
    """The update of a step in micro-batches of `size`, away from the reference, and its metrics."""
    step = UnlearnStep(copy.deepcopy(model), settings)
    step.prepare(*zip(*pairs_of(4), strict=True))
    with torch.no_grad():
        for i, p in enumerate(step.model.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    before = weights(step.model)
    metrics = made_of(step, pairs_of(size))
    return {name: after - before[name] for name, after in weights(step.model).items()}, metrics


def change(model, after):
    """Return what a run changed in the model's weights."""
    return {name: after[name] - p.detach() for name, p in model.named_parameters()}


def check_same(one, other):
    assert any(expected.any() for expected in one.values())
    for name, expected in one.items():
        assert float((expected - other[name]).abs().max()) <= CLOSE * float(expected.abs().max()), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow(but=4)
def test_micro_batches_make_the_step_of_one_batch(case, model):
    name, overrides = CASES[case]
    (whole, expected), *others = (updated(model, made(name, *overrides), size) for size in (4, 2, 1))
    for made_so, metrics in others:
        check_same(whole, made_so)
        assert metrics == pytest.approx(expected, rel=CLOSE, abs=CLOSE)


@pytest.mark.parametrize("name", ["rmu", "pdu"])
def test_positions_that_a_batch_names_are_weighed_by_their_number(name, model):
    step, found = UnlearnStep(copy.deepcopy(model), made(name)), []
    step.prepare(*zip(*pairs_of(4), strict=True))
    for size in (4, 1):
        pairs = pairs_of(size)
        for pair in pairs:
            for batch in pair:  # every other position of long rows, all of short ones
                every = torch.arange(batch["input_ids"].shape[1]) % 2 == 0
                long = batch["attention_mask"].sum(1, keepdim=True) > 10
                batch["state_mask"] = batch["attention_mask"].bool() & (every | ~long)
        found.append(made_of(step, pairs))
        step.model.load_state_dict(model.state_dict())
    assert found[0] == pytest.approx(found[1], rel=CLOSE)


@pytest.mark.slow
def test_the_trainer_weighs_tokens_too(model, tmp_path):
    dataset = ForgetRetainDataset(examples(FORGET, 1), examples(RETAIN, 2), seed=0)
    settings = Recipe.load("graddiff", [*SMALL.get("graddiff", []), "optimizer.name=sgd", "forget.gamma=0.5"])
    found, logged = [], []
    for size, count in ((4, 1), (2, 2), (1, 4)):
        options = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=count, lr_scheduler_type="constant")
        options.per_device_train_batch_size = size
        trainer = UnlearnTrainer(copy.deepcopy(model), options, settings, dataset)
        trainer.train()
        found.append(change(model, weights(trainer.model)))
        logged.append([entry for entry in trainer.state.log_history if "forget_loss" in entry])
        assert len(logged[-1]) == 2
    for made_so, entries in zip(found[1:], logged[1:], strict=True):
        check_same(found[0], made_so)
        for one, other in zip(logged[0], entries, strict=True):
            for name in ("loss", "forget_loss", "retain_loss", "grad_norm"):
                assert one[name] == pytest.approx(other[name], rel=1e-6), name


def test_a_benchmark_weighs_tokens_too(model):
    changes = []
    for size, count in ((4, 1), (1, 4)):
        settings = made("graddiff", "forget.gamma=0.5", f"batch_size={size}", f"accumulate={count}", "steps=2")

        def keep(progress):
            if progress.last:
                changes.append(change(model, weights(progress.unlearn_step.model)))

        unlearning(
            model,
            examples(FORGET, 1),
            examples(RETAIN, 2),
            [settings],
            ["nll"],
            tokenizer=TOKENIZERS["bytes"],
            baselines={},
            on_step=keep,
        )
    check_same(*changes)


def test_what_does_not_add_up_is_refused(model):
    step = UnlearnStep(copy.deepcopy(model), made("graddiff"))
    before = weights(step.model)
    pairs = pairs_of(1)
    sizes = step.sizes(pairs)
    assert sizes == {"forget": sum(FORGET) - 4, "retain": sum(RETAIN) - 4}
    step(*pairs[0], update=False)
    with pytest.raises(ValueError, match=r"of 3 forget, 24 retain and of 29 forget, 4 retain .* sizes=step.sizes\("):
        step(*pairs[1])
    with pytest.raises(ValueError, match="must have the same `sizes`"):
        step(*pairs[1], sizes=sizes)
    step(*pairs[0])  # as large as the one before
    for wrong, message in (
        ({"forget": 56, "retain": 70}, "got 56 forget, 70 retain for 4 micro-batches with 56 forget, 74 retain"),
        ({"forget": 60, "retain": 74}, "got 60 forget, 74 retain for 4 micro-batches with 56 forget, 74 retain"),
        ({"forget": 56}, "must say forget, retain"),
    ):
        with pytest.raises(ValueError, match=message):
            for i, pair in enumerate(pairs):
                step(*pair, update=i == 3, sizes=wrong)
        step.discard()
    with pytest.raises(ValueError, match="at least one micro-batch"):
        step.sizes([])
    step.accumulate(*pairs[0], last=True)
    with pytest.raises(RuntimeError, match="the last of its step"):
        step.accumulate(*pairs[0])
    assert len(changed(step.model, before)) == len(before) and step.steps == 1


def test_losses_that_stop_a_step_are_those_of_all_micro_batches(model):
    """One micro-batch is above the budget, its step is not; another step is, and leaves the weights."""
    step = UnlearnStep(copy.deepcopy(model), made("graddiff"))
    pairs, each = pairs_of(1), []
    for pair in pairs:
        each.append(step(*pair, update=False)["retain_loss"])
        step.discard()
    whole = made_of(step, pairs_of(4))["retain_loss"]
    assert max(each) > 1.001 * whole
    budgets = {1.001 * whole: None, 0.999 * whole: RetainBudgetError}
    for budget, error in budgets.items():
        step = UnlearnStep(copy.deepcopy(model), made("graddiff", f"retain_budget={budget}", "stop_forget_loss=1e9"))
        if error is None:
            assert made_of(step, pairs)["retain_loss"] == pytest.approx(whole, rel=CLOSE) and step.done
            continue
        with pytest.raises(error, match="weights unchanged"):
            made_of(step, pairs)
        assert not changed(step.model, weights(model)) and not step.tally.parts
