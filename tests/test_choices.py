"""Which implementation `auto` takes first is data: what the file may hold, and that it decides."""

import json

import pytest
import torch

from moe_unlearn import backend, choices, ops

pytestmark = pytest.mark.quick


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """Makes choices.json say something else."""

    def say(**names):
        file = tmp_path / "choices.json"
        file.write_text(json.dumps({"measured": {"device": "a"}, "cuda": names, "meta": names}), encoding="utf-8")
        monkeypatch.setattr(choices, "FILE", file)
        choices.table.cache_clear()

    yield say
    choices.table.cache_clear()


def test_the_file_names_kernels_that_are_registered_and_implementations_that_there_are():
    assert ops.route and choices.table()["cuda"]
    for device, names in choices.table().items():
        assert device in ("cuda", "cpu") and names.keys() <= set(backend.registered())
        for name, entries in names.items():
            sizes = [entry["elements"] for entry in entries]
            assert sizes == sorted(set(sizes)) and sizes[0] == 0, name
            assert {entry["first"] for entry in entries} <= set(backend.IMPLS), name


def test_nothing_is_preferred_to_triton_that_was_not_measured():
    content = json.loads(choices.FILE.read_text(encoding="utf-8"))
    if content["measured"] is None:
        assert {e["first"] for names in choices.table().values() for es in names.values() for e in es} == {"triton"}


def test_an_entry_holds_from_its_number_of_elements_on(listed):
    listed(toy=[{"elements": 0, "first": "triton"}, {"elements": 100, "first": "cuda"}])
    found = [choices.first("toy", "cuda", n) for n in (0, 99, 100, 10**9, None)]
    assert found == ["triton", "triton", "cuda", "cuda", "cuda"]
    assert choices.first("toy", "cpu", 5) is None and choices.first("other", "cuda", 5) is None


def test_auto_follows_the_file_and_falls_back_where_what_it_names_is_not_there(listed, monkeypatch):
    monkeypatch.setattr(backend, "_kernels", {})
    monkeypatch.setattr(backend, "_FASTEST_FIRST", {"meta": ("cuda", "cpu", "ref")})
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    for impl in ("cuda", "cpu", "ref"):
        backend.register("toy", impl, lambda impl=impl: impl)
    small, large = (torch.empty(n, device="meta") for n in (10, 1000))
    assert backend.resolve("toy", "auto", small)() == "cuda"
    listed(toy=[{"elements": 0, "first": "cpu"}, {"elements": 100, "first": "triton"}])
    assert backend.resolve("toy", "auto", small)() == "cpu" and backend.choose("toy", "auto", "meta") == "cuda"
    assert backend.resolve("toy", "auto", large)() == "cuda"
    assert backend.resolve("toy", "ref", small)() == "ref"
