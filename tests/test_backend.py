"""The choice of an implementation: preference, force, float64, and no silent fallback."""

import pytest
import torch

from moe_unlearn import backend

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def toy_op(monkeypatch):
    monkeypatch.setattr(backend, "_kernels", {})
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    for impl in ("ref", "cpu", "triton"):
        backend.register("toy", impl, lambda impl=impl: impl)
    backend.register("toy.backward", "ref", lambda: "backward")


def chosen(impl="auto", name="toy", dtype=torch.float32):
    return backend.choose(name, impl, "cpu", dtype)


def test_auto_takes_the_fastest_for_the_device():
    assert chosen() == "cpu"
    assert backend.choose("toy", "auto", "cuda") == "triton"
    assert backend.choose("toy", "auto", "meta") == "ref"


def test_a_part_without_a_kernel_falls_back_only_under_auto():
    assert chosen(name="toy.backward") == "ref"
    with pytest.raises(RuntimeError, match=r"'toy.backward' has no implementation cpu .* available: ref"):
        chosen("cpu", name="toy.backward")


def test_a_missing_forced_implementation_is_an_error():
    with pytest.raises(RuntimeError, match="no implementation cuda for device 'cpu'; available: cpu, ref"):
        chosen("cuda")
    with pytest.raises(ValueError, match="got 'fast' for 'toy'"):
        chosen("fast")


def test_float64_is_always_ref():
    assert chosen("cpu", dtype=torch.float64) == "ref"
    assert backend.resolve("toy", "auto", torch.zeros(1, dtype=torch.float64))() == "ref"


def test_a_kernel_that_does_not_fit_passes_on_only_where_there_is_a_choice(monkeypatch):
    def picky(operand):
        if operand < 0:
            raise backend.Unfit("toy needs what is not negative")
        return "picky"

    backend.register("toy", "cpu", picky)
    backend.register("toy", "ref", lambda operand: "ref")
    like = torch.zeros(1)
    assert [backend.resolve("toy", "auto", like)(i) for i in (1, -1)] == ["picky", "ref"]
    with pytest.raises(backend.Unfit, match="not negative"):
        backend.resolve("toy", "cpu", like)(-1)
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cpu,cuda,ref")
    assert backend.resolve("toy", "auto", like)(-1) == "ref"
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "toy=cpu")
    with pytest.raises(backend.Unfit):
        backend.resolve("toy", "auto", like)(-1)


@pytest.mark.parametrize(
    "value,expected",
    [("ref", "ref"), ("cuda,ref", "ref"), ("cuda, cpu", "cpu"), ("toy=ref,other=cuda", "ref"),
     ("other=ref", "cpu"), ("", "cpu"), ("auto", "cpu")],
)  # fmt: skip
def test_environment(monkeypatch, value, expected):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, value)
    assert chosen() == expected


def test_environment_errors(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match="no implementation cuda"):
        chosen()
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "toy=quick")
    with pytest.raises(ValueError, match="'quick'"):
        chosen()


def test_an_argument_beats_the_environment(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cpu")
    assert chosen("ref") == "ref"


def test_register_refuses_unknown_names():
    with pytest.raises(ValueError, match="'opencl'"):
        backend.register("toy", "opencl", print)
    assert backend.registered() == ("toy", "toy.backward")
