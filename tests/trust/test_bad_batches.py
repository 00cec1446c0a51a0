"""No bad batch is computed with, and none ends in an error of torch's own: one line names the side and the key."""

import threading

import pytest
import torch

from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, prepared, recipe, weights

NAN, INF = float("nan"), float("inf")
FLOAT, LONG = torch.float32, torch.int64


def put(key, value, place=(1, 2)):
    """Return the change that one number of a key is another."""

    def change(batch):
        dtype = LONG if isinstance(value, int) else FLOAT
        changed = batch[key].to(dtype).clone()
        changed[place] = value
        return {key: changed}

    return change


def kind(key, dtype):
    return lambda batch: {key: batch[key].to(dtype)}


def shape(key, reshape):
    return lambda batch: {key: reshape(batch[key])}


def add(key, make):
    return lambda batch: {key: make(*batch["input_ids"].shape)}


TENSORS = ("input_ids", "attention_mask", "labels")
SHAPES = {
    "longer": lambda t: torch.cat([t, t[:, :1]], 1),
    "shorter": lambda t: t[:, :-1],
    "fewer rows": lambda t: t[:-1],
    "flat": lambda t: t.flatten(),
    "deep": lambda t: t[..., None],
    "one number": lambda t: t[0, 0],
    "no column": lambda t: t[:, :0],
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "a list": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
}
BAD = {f"{key} {name}": shape(key, change) for key in TENSORS for name, change in SHAPES.items()}
BAD |= {f"{key} is missing": (lambda batch, key=key: {key: None}) for key in TENSORS}
for name, dtype in {"float": FLOAT, "half": torch.float16, "bool": torch.bool, "complex": torch.complex64}.items():
    BAD |= {f"{key} {name}": kind(key, dtype) for key in TENSORS if key != "attention_mask" or name == "complex"}
for value in (-1, -2, -99, -101, VOCAB, VOCAB + 1, 2**31, 2**62, -(2**62)):
    BAD[f"label {value}"] = put("labels", value, (0, 3))
    BAD[f"token {value}"] = put("input_ids", value)
BAD["token -100"] = put("input_ids", -100)
for value in (-1, -(2**62), -0.5, NAN, INF, -INF, torch.finfo(FLOAT).min):
    BAD[f"mask {value}"] = put("attention_mask", value)
BAD |= {
    "no label": lambda batch: {"labels": torch.full_like(batch["labels"], -100)},
    "a label at first alone": lambda batch: {"labels": batch["labels"].index_fill(1, torch.arange(1, 12), -100)},
    "nothing is attended": lambda batch: {"attention_mask": torch.zeros_like(batch["attention_mask"])},
    "no rows": lambda batch: {key: batch[key][:0] for key in TENSORS},
    "no columns": lambda batch: {key: batch[key][:, :0] for key in TENSORS},
    "one column": lambda batch: {key: batch[key][:, :1] for key in TENSORS},
    "an unknown tensor": add("pixel_values", torch.ones),
    "index float": add("index", lambda rows, length: torch.arange(rows).float()),
    "index of other length": add("index", lambda rows, length: torch.arange(rows + 1)),
    "index of two dimensions": add("index", lambda rows, length: torch.zeros(rows, 2, dtype=LONG)),
    "state_mask float": add("state_mask", torch.ones),
    "state_mask of other length": add("state_mask", lambda rows, length: torch.ones(rows, length + 1).bool()),
    "positions below 0": add("position_ids", lambda rows, length: torch.arange(length).expand(rows, length) - 1),
    "positions float": add("position_ids", torch.ones),
    "positions of other length": add("position_ids", lambda rows, length: torch.arange(length + 1)[None]),
    "token_weights integer": add("token_weights", lambda rows, length: torch.ones(rows, length, dtype=LONG)),
    "token_weights of other length": add("token_weights", lambda rows, length: torch.ones(rows, length - 1)),
    "ref_logprobs integer": add("ref_logprobs", lambda rows, length: torch.ones(rows, length, dtype=LONG)),
    "ref_hidden_states integer": add("ref_hidden_states", lambda rows, length: torch.ones(rows, length, 4, dtype=LONG)),
}
SIDES = [(side, name) for side in ("forget", "retain") for name in BAD]
ALL_BAD = {"a list": [], "a tensor": torch.ones(2, 3), "None": None, "a string": "batch", "a number": 3}


@pytest.fixture(scope="module", params=["graddiff", "npo"])
def made(request):
    torch.manual_seed(0)
    step, forget, retain = prepared(tiny_olmoe(vocab_size=VOCAB).eval(), recipe(request.param))
    return step, {"forget": forget[0], "retain": retain[0]}, weights(step.model)


def refused(made, pair, side):
    step, _, before = made
    with pytest.raises((ValueError, TypeError)) as caught:
        step(pair["forget"], pair["retain"])
    message = str(caught.value)
    assert f"the {side} batch" in message and "\n" not in message, message
    assert step.steps == 0 and not step.tally.parts and not step.gradients.collected
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in step.model.named_parameters())


def test_there_are_as_many_as_were_tried_once():
    assert len(SIDES) + 2 * len(ALL_BAD) >= 137


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_bad_batch_is_refused(made, side):
    """One test of all: the message says which it was."""
    for name, change in BAD.items():
        good = made[1][side]
        try:
            refused(made, made[1] | {side: {**good, **change(good)}}, side)
        except BaseException as error:
            raise AssertionError(f"{side}: {name}") from error
    for name, batch in ALL_BAD.items():
        try:
            refused(made, made[1] | {side: batch}, side)
        except BaseException as error:
            raise AssertionError(f"{side}: {name}") from error


def test_prepare_refuses_what_the_model_cannot_take(made):
    step, good, before = made
    for name in (f"token {VOCAB}", f"label {VOCAB}", "mask nan", "input_ids float"):
        bad = good["forget"] | BAD[name](good["forget"])
        with pytest.raises(ValueError, match="the forget batch: "):
            step.prepare([good["forget"], bad], [good["retain"]])
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())


def test_good_ones_are_taken():
    step, forget, retain = prepared(tiny_olmoe(vocab_size=VOCAB).eval(), recipe("graddiff"))
    for form in (torch.bool, torch.int32, torch.uint8, FLOAT):
        changed = retain[0] | {"attention_mask": retain[0]["attention_mask"].to(form)}
        step(forget[0] | {"input_ids": forget[0]["input_ids"].int()}, changed)
    assert step.steps == 4


def test_threads_on_one_step_do_not_mix(made):
    """Each of eight threads makes a whole step or is refused."""
    step, good, _ = made
    forget, retain = good["forget"], good["retain"]
    inside, go_on, outcomes = threading.Event(), threading.Event(), []

    def hold(*_):
        inside.set()
        go_on.wait(60)

    def run():
        try:
            outcomes.append(step(forget, retain, update=False))
        except RuntimeError as error:
            outcomes.append(str(error))

    hook = step.model.get_input_embeddings().register_forward_pre_hook(hold)
    first = threading.Thread(target=run)
    first.start()
    assert inside.wait(60)
    others = [threading.Thread(target=run) for _ in range(7)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert len(outcomes) == 7 and all("another thread is in the middle of this step" in told for told in outcomes)
    go_on.set()
    first.join()
    hook.remove()
    assert isinstance(outcomes[-1], dict) and len(step.tally.parts) == 1
    with pytest.raises(RuntimeError, match="another thread"):
        step(forget, retain)
    step.discard()
    assert step(forget, retain, update=False) == outcomes[-1]
    step.discard()


def test_an_error_gives_the_step_back_to_other_threads(made):
    step, good, _ = made

    def fail(*_):
        raise KeyboardInterrupt

    def run():
        hook = step.model.get_input_embeddings().register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            step(good["forget"], good["retain"], update=False)
        hook.remove()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert step(good["forget"], good["retain"], update=False)
    step.discard()
