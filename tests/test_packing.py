"""`packing`: rows share the rows of a model's call, and every number stays that of rows of their own."""

import copy

import pytest
import torch
from torch import distributed
from transformers import TrainingArguments

from moe_unlearn.data import Example, batches, collate, train_tokenizer
from moe_unlearn.model.capture import collect_routing
from moe_unlearn.model.head import decoder_of, final_hidden_states
from moe_unlearn.model.packing import call_of, share_rows
from moe_unlearn.model.states import layer_states
from moe_unlearn.runs.run import Run
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trace import routing_frequencies
from moe_unlearn.trainer import UnlearnTrainer
from moe_unlearn.wagle import weight_mask
from tests.support.forked_ranks import found_on
from tests.support.models import TINY_MODELS, tiny_olmoe
from tests.support.packed_rows import check_equal
from tests.support.steps import VOCAB, made_of, recipe, weights

pytestmark = pytest.mark.quick
LIMIT = 20


@pytest.fixture(scope="module")
def model():
    """A model in float64: what another row adds to a token is seen at once, what rounding adds is not."""
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB, output_router_logits=True).eval().double()


def examples(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in lengths]
    return [Example(ids, [-100] * (i % 3) + ids[i % 3 :], i % 3) for i, ids in enumerate(rows)]


def side(*lengths, seed=0, packing=None, answers=()):
    made = collate(examples(*lengths, seed=seed), range(len(lengths)), packing=packing)
    refused = collate(examples(*answers, seed=9), range(len(answers))) if answers else {}
    return made | {f"idk_{key}": value for key, value in refused.items() if key != "index"}


@pytest.fixture
def calls(model):
    """The keywords of the decoder's calls."""
    seen = []
    handle = decoder_of(model).register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    yield seen
    handle.remove()


def test_rows_share_the_narrowest_rows_without_much_padding():
    assert share_rows([3, 3, 3, 3], 100) == [[0], [1], [2], [3]]  # nothing to gain
    assert share_rows([9, 1, 5, 5, 8, 2], 10) == [[0, 1], [4, 5], [2, 3]]
    assert share_rows([40, 3], 10) == [[0], [1]]  # a long row is no reason to refuse
    lengths = torch.randint(1, 65, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    shared = share_rows(lengths, 256)
    assert sorted(i for row in shared for i in row) == list(range(64))
    widths = [sum(lengths[i] for i in row) for row in shared]
    assert max(widths) <= 256 and sum(lengths) >= 31 / 32 * len(shared) * max(widths)


def test_a_packed_call(model, calls):
    batch = side(4, 3, 2, 5, packing=8)
    rows = {key: value for key, value in batch.items() if key != "packing"}
    states, alone = final_hidden_states(model, batch), final_hidden_states(model, rows)
    packed, _ = calls
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2]]
    assert "attention_mask" not in packed
    attended = batch["attention_mask"].bool()
    call = call_of(batch)
    assert torch.equal(packed["input_ids"].flatten()[call.order()], batch["input_ids"][attended])
    torch.testing.assert_close(states[attended], alone[attended])
    assert not states[~attended].any()
    torch.testing.assert_close(layer_states(model, batch, 0)[attended], layer_states(model, rows, 0)[attended])
    taken = attended.flatten()
    assert torch.equal(collect_routing(model, batch)[:, taken], collect_routing(model, rows)[:, taken])


def test_padding_on_the_left_is_padding(model):
    batch = side(4, 3, 2, 5, packing=8)
    flipped = {key: value.flip(1) if value.dim() == 2 else value for key, value in batch.items()}
    attended = flipped["attention_mask"].bool()
    states = final_hidden_states(model, flipped)
    del flipped["packing"]
    # transformers counts padding on the left into the positions, whose rotation it computes in float32
    torch.testing.assert_close(states[attended].float(), final_hidden_states(model, flipped)[attended].float())


@pytest.mark.parametrize(
    "changes",
    [
        {"position_ids": torch.arange(5).expand(2, -1)},
        {"attention_mask": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 0, 0, 0]])},
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])},
    ],
)
def test_rows_that_cannot_be_laid_end_to_end_have_a_call_of_their_own(model, calls, changes):
    final_hidden_states(model, side(5, 2, packing=8) | changes)
    [given] = calls
    assert given["attention_mask"].shape == (2, 5)


OBJECTIVES = {
    "graddiff": [],
    "npo": [],
    "simnpo": [],
    "undial": [],
    "ceu": [],
    "idk_dpo": [],
    "level": [],
    "pdu": [],
    "rmu": [],
    "seuf-wmdp": [],
    "mollm": [],
    "graddiff ": ["retain.objective=kl", "retain.router_aux=0.1", "accumulate=1"],
    "trace": ["trace.refresh=online"],
    "combined": ["trace.per_layer=2"],
    "graddiff  ": ["forget.objective=idk_nll"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_that_of_rows_of_their_own(model, name):
    refused = (6, 4, 3) if "idk" in f"{name} {OBJECTIVES[name]}" or name == "level" else ()
    made, results = recipe(name.strip(), *OBJECTIVES[name]), []
    for packing in (None, LIMIT):
        own = copy.deepcopy(model)
        forget, retain = side(12, 4, 7, seed=1, packing=packing, answers=refused), side(9, 3, 14, 5, 2, seed=2)
        if packing is not None:
            retain |= {"packing": torch.full((5,), packing)}
        step = UnlearnStep(own, made)
        step.prepare([forget], [retain])
        shapes = []
        hook = decoder_of(own).register_forward_pre_hook(
            lambda module, args, given, shapes=shapes: shapes.append(given["input_ids"].numel()), with_kwargs=True
        )
        metrics = step(forget, retain)
        metrics.pop("grad_norm", None)  # known in the form that gradients have with so many tokens, or not
        results.append((metrics, weights(own), sum(shapes)))
        hook.remove()
    (theirs, expected, more), (ours, changed, fewer) = results
    assert fewer < 0.8 * more  # it was packed
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    for key, value in expected.items():
        torch.testing.assert_close(changed[key], value, rtol=1e-6, atol=1e-9)


def test_frequencies_and_masks_are_those_of_rows_of_their_own(model):
    sides = [[batches(examples(5, 11, 7, 3, seed=i), 3, packing=p) for i in (1, 2)] for p in (None, LIMIT)]
    assert all("packing" in batch for packed in sides[1] for batch in packed)
    expected, found = ([routing_frequencies(model, given) for given in of] for of in sides)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.counts, theirs.counts) and ours.tokens == theirs.tokens
    expected, found = (weight_mask(model, *of, keep=0.3, gamma=1.0) for of in sides)
    check_equal(found.packed, expected.packed)


def test_a_verified_step_follows_the_tokens_of_packed_rows(model):
    own = copy.deepcopy(model).float()
    forget, retain = side(12, 4, 7, seed=1, packing=LIMIT), side(9, 3, 14, 5, 2, seed=2, packing=LIMIT)
    step = UnlearnStep(own, recipe("graddiff"), verify=True)
    step.prepare([forget], [retain])
    step(forget, retain)
    assert step.verifier.summary().startswith("step 1: equals the plain step")


@pytest.mark.slow
def test_packed_rows_on_two_ranks_make_the_step_of_one(model, tmp_path):
    """Ranks have rows of their own number and length, and each packs its own."""
    pairs = [
        (side(12, 4, 7, seed=1, packing=LIMIT), side(9, 3, 14, 5, 2, seed=2, packing=LIMIT)),
        (side(6, 3, seed=3, packing=LIMIT), side(11, 4, 3, seed=4, packing=LIMIT)),
    ]

    def made(packed, rank=None):
        """Weights and losses after two steps, of a rank of two or of one process."""
        own = [
            [side if packed else {k: v for k, v in side.items() if k != "packing"} for side in pair] for pair in pairs
        ]
        group = None if rank is None else distributed.group.WORLD
        step = UnlearnStep(copy.deepcopy(model), recipe("graddiff"), process_group=group)
        step.prepare(*zip(*own, strict=True))
        for _ in range(2):
            if rank is None:
                metrics = made_of(step, own)
            else:
                metrics = step(*own[rank], sizes=step.sizes([own[rank]]))
        losses = [metrics[name] for name in ("forget_loss", "retain_loss")]
        return losses, {name: weight.tolist() for name, weight in weights(step.model).items()}

    first, second = found_on(2, tmp_path / "ranks", lambda rank: made(True, rank))
    assert first == second
    for packed in (True, False):
        losses, expected = made(packed)
        assert first[0] == pytest.approx(losses, rel=1e-6)
        for name, weight in expected.items():
            torch.testing.assert_close(torch.tensor(first[1][name]), torch.tensor(weight), rtol=1e-6, atol=1e-9)


def run_of(family, *overrides, lengths=(12, 4, 7, 20)):
    torch.manual_seed(0)
    made = recipe("graddiff", "batch_size=4", "steps=2", f"data.max_length={LIMIT}", *overrides)
    sides = (examples(*lengths, seed=seed) for seed in (1, 2))
    return Run(TINY_MODELS[family](), train_tokenizer(["a b"], 260), made, *sides)


def test_a_recipe_asks_for_it(tmp_path):
    logged, planned = [], []
    for wanted in ("false", "true"):
        run = run_of("olmoe", f"data.packing={wanted}")
        batches = [run.micro_batch(0)["forget"], run.batches("retain")[0]]
        assert all(("packing" in batch) == (wanted == "true") for batch in batches)
        planned.append(run.plan().memory["activations"])
        trainer = run.trainer(tmp_path / wanted)
        trainer.train()
        logged.append([entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry])
    assert logged[1] == pytest.approx(logged[0], rel=1e-4) and len(logged[0]) == 2
    assert planned[1] < planned[0]


def test_rows_of_a_trainer_are_packed_as_its_recipe_says(model, tmp_path):
    rows = {side: examples(5, 9, seed=seed) for seed, side in enumerate(("forget", "retain"))}
    made = recipe("graddiff", "data.packing=true", "data.max_length=31")
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    own = copy.deepcopy(model)
    tokenizer = train_tokenizer(["a b"], 260)
    trainer = UnlearnTrainer(own, arguments, made, rows, processing_class=tokenizer)
    assert trainer.data_collator.packing == 31


def test_a_model_that_mixes_packed_rows_is_refused():
    message = "GptOssForCausalLM with eager attention mixes packed examples.*data.packing=false in a recipe"
    with pytest.raises(ValueError, match=message):
        run_of("gpt_oss", "data.packing=true")
    run_of("gpt_oss")
