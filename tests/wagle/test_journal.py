"""A mask that was interrupted after any of its groups goes on with the next, and ends with the same bytes."""

import os
import signal

import pytest
import torch

from moe_unlearn.prepare.reference import resume_of
from moe_unlearn.step import UnlearnStep
from moe_unlearn.wagle import Rule, mask, mask_of
from moe_unlearn.wagle.journal import Journal
from moe_unlearn.wagle.pieces import all_pieces
from tests.support.batches import random_batch
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, recipe
from tests.support.threads import torch_threads

pytestmark = pytest.mark.quick
SIDES = [random_batch(VOCAB, rows=2, seed=1)], [random_batch(VOCAB, rows=1, seed=2)]


class Interrupted(Exception):
    """Stops a mask where a test wants it to stop."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(VOCAB, num_hidden_layers=1).eval()


@pytest.fixture(autouse=True)
def one_thread():
    """The threads of an OpenMP pool do not survive a fork, and their number is part of what computes."""
    with torch_threads(1):
        yield


@pytest.fixture
def passes(monkeypatch):
    """The parameters of which gradients were computed, group by group; it may say when to stop."""
    seen, real = [], mask._Scores.of

    def of(self, pieces):
        if len(seen) == stop[0]:
            raise Interrupted
        seen.append([piece.name for piece in pieces])
        return real(self, pieces)

    stop = [None]
    monkeypatch.setattr(mask._Scores, "of", of)
    return seen, stop


def made(model, folder, keep=0.3, memory=0.4, sides=SIDES, **settings):
    size = int(sum(piece.nbytes for piece in all_pieces(model, None)) * memory)
    with resume_of(model, folder) as resume:
        return mask_of(model, *sides, Rule(keep, 0.7, **settings), memory=size, resume=resume)


def bytes_of(made, folder):
    made.save(folder / "mask")
    return (folder / "mask").read_bytes()


def files_of(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("guess", ["good", "wrong"])
def test_a_mask_interrupted_after_each_group_has_the_bytes_of_one_that_was_not(
    model, passes, guess, tmp_path, monkeypatch
):
    if guess == "wrong":
        monkeypatch.setattr(mask, "guess_of", lambda *_: (range(1, 2), 0.1))
    seen, stop = passes
    expected = bytes_of(made(model, tmp_path / "at once"), tmp_path)
    assert not (tmp_path / "at once").exists()
    number, folder = len(seen), tmp_path / "kept"
    assert number > (6 if guess == "wrong" else 3)
    seen.clear()
    for i in range(number):
        stop[0] = i
        with pytest.raises(Interrupted):
            made(model, folder)
        assert len(seen) == i and len(files_of(folder)) == i  # no group was computed twice
    stop[0] = None
    assert bytes_of(made(model, folder), tmp_path) == expected
    assert len(seen) == number and not folder.exists()


def test_the_words_lie_in_a_file_and_what_is_freed_is_given_back_after_each_group(model, tmp_path, monkeypatch):
    given_back = []
    monkeypatch.setattr(mask, "give_back", lambda: given_back.append(None))
    packed = made(model, tmp_path / "kept").packed
    assert len({words.untyped_storage().data_ptr() for words in packed.values()}) == 1
    assert len(given_back) > 2
    at_once = made(model, tmp_path / "kept", memory=1.0).packed
    assert len({words.untyped_storage().data_ptr() for words in at_once.values()}) == len(at_once)


def test_a_killed_process_and_damaged_files(model, passes, tmp_path, monkeypatch):
    seen, _ = passes
    expected, folder = bytes_of(made(model, tmp_path / "at once"), tmp_path), tmp_path / "kept"
    number = len(seen)
    child = os.fork()
    if not child:
        real, groups = Journal.kept, iter(range(number))

        def kept(self, name, make):
            if next(groups) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, name, make)

        monkeypatch.setattr(Journal, "kept", kept)
        made(model, folder)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert files_of(folder) == ["begun", "round 1 group 1"]
    path = next(folder.rglob("round 1 group 1"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    seen.clear()
    assert bytes_of(made(model, folder), tmp_path) == expected
    assert len(seen) == number - 1  # the sample alone was kept


def test_what_another_mask_has_kept_is_not_read(model, passes, tmp_path):
    """Each differs in one thing that decides a bit; none goes on from the files of the others."""
    seen, stop = passes
    folder = tmp_path / "kept"
    other = tiny_olmoe(VOCAB, num_hidden_layers=1).eval()
    frozen = tiny_olmoe(VOCAB, num_hidden_layers=1).eval()
    frozen.load_state_dict(model.state_dict())
    frozen.lm_head.weight.requires_grad_(False)
    different = [
        (model, {}),
        (other, {}),
        (frozen, {}),
        (model, {"keep": 0.4}),
        (model, {"memory": 0.5}),
        (model, {"official": True}),
        (model, {"sides": (SIDES[0], SIDES[0])}),
        (model, {"sides": SIDES[::-1]}),
    ]
    for each, settings in different:
        seen.clear()
        stop[0] = 2
        with pytest.raises(Interrupted):
            made(each, folder, **settings)
        assert len(seen) == 2
    assert len(list(folder.iterdir())) == len(different)
    stop[0] = None
    for each, settings in different:
        made(each, folder, **settings)
    assert not folder.exists()


def test_a_default_budget_goes_on_as_it_began_unless_less_is_free_now(model, passes, tmp_path, monkeypatch):
    seen, stop = passes
    needed = sum(piece.nbytes for piece in all_pieces(model, None))

    def began_with(free):
        monkeypatch.setattr("moe_unlearn.wagle.budget.free_memory", lambda device: int(free * needed / 0.75))
        seen.clear()
        with resume_of(model, tmp_path / "kept") as resume:
            return mask_of(model, *SIDES, Rule(0.3, 0.7), resume=resume)

    expected = bytes_of(began_with(0.5), tmp_path)
    groups = len(seen)
    for later, count in ((0.8, groups - 2), (0.45, groups)):
        stop[0] = 2
        with pytest.raises(Interrupted):
            began_with(0.5)
        stop[0] = None
        assert bytes_of(began_with(later), tmp_path) == expected
        assert len(seen) == count if later > 0.5 else len(seen) >= count


def test_preparation_goes_on_and_leaves_no_files(model, passes, tmp_path):
    seen, stop = passes
    size = sum(piece.nbytes for piece in all_pieces(model, None))
    step = UnlearnStep(model, recipe("wagle", f"wagle.memory={size // 2}"))
    stop[0] = 2
    with pytest.raises(Interrupted):
        step.prepare(*SIDES, cache_dir=tmp_path / "cache")
    stop[0] = None
    step.prepare(*SIDES, cache_dir=tmp_path / "cache")
    number = len(seen)
    assert not list((tmp_path / "cache").glob("wagle-*"))
    seen.clear()
    other = UnlearnStep(model, recipe("wagle", f"wagle.memory={size // 2}"))
    other.prepare(*SIDES)
    assert len(seen) == number
    packed = step.prepared.mask.packed
    assert all(torch.equal(words, packed[name]) for name, words in other.prepared.mask.packed.items())
