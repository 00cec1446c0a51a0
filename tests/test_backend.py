"""The choice of an implementation: preference, force, float64, no silent fallback, and the device it runs on."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from moe_unlearn import backend
from tests.support.sources import ROOT

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def toy_op(monkeypatch):
    monkeypatch.setattr(backend, "_kernels", {})
    monkeypatch.setattr(backend, "_broken", {})
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
    [
        ("ref", "ref"),
        ("cuda,ref", "ref"),
        ("cuda, cpu", "cpu"),
        ("toy=ref,other=cuda", "ref"),
        ("other=ref", "cpu"),
        ("", "cpu"),
        ("auto", "cpu"),
    ],
)
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


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the module `kernels_of_toy`, which can be imported from then on."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        monkeypatch.delitem(sys.modules, "kernels_of_toy", raising=False)
        (tmp_path / "kernels_of_toy.py").write_text(text, encoding="utf-8")

    yield write
    sys.modules.pop("kernels_of_toy", None)


@pytest.mark.parametrize(
    "text,why",
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("raise OSError('a driver is missing')", "OSError: a driver is missing"),
        ("", "AttributeError: "),
    ],
)
def test_a_kernel_whose_import_fails_is_never_chosen_and_an_error_where_forced(module, text, why, monkeypatch):
    module(text)
    backend.register("toy", "cpu", "kernels_of_toy:toy")
    assert chosen() == "ref" and backend.resolve("toy", "auto", torch.zeros(1))() == "ref"
    assert "cpu" not in backend.available("toy", "cpu")
    ((impl, reason), names), *others = backend.unusable("cpu").items()
    assert (impl, names, others) == ("cpu", ["toy"], []) and reason.startswith(why)
    with pytest.raises(RuntimeError, match=f"'toy' has no usable implementation cpu: {why}") as caught:
        backend.resolve("toy", "cpu", torch.zeros(1))
    assert type(caught.value.__cause__).__name__ == why.partition(":")[0]
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cpu,ref")
    assert chosen() == "ref"
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "toy=cpu")
    with pytest.raises(RuntimeError, match="no usable implementation cpu"):
        backend.resolve("toy", "auto", torch.zeros(1))
    backend.register("toy", "cpu", lambda: "mended")
    assert backend.resolve("toy", "cpu", torch.zeros(1))() == "mended" and not backend.unusable("cpu")


def test_what_is_slower_than_ref_is_not_imported_unless_asked_for(module, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module("toy = lambda: 'imported'")
    backend.register("toy", "triton", "kernels_of_toy:toy")
    assert chosen() == "cpu" and backend.resolve("toy", "auto", torch.zeros(1))() == "cpu"
    assert backend.has("toy", "ref", "cpu") and not backend.has("toy", "cuda", "cpu")
    assert "kernels_of_toy" not in sys.modules
    assert backend.has("toy", "triton", "cpu") and "kernels_of_toy" in sys.modules
    assert backend.resolve("toy", "triton", torch.zeros(1))() == "imported"


@pytest.fixture
def current_device(monkeypatch):
    """The devices that are current, the innermost last, as torch.cuda.device makes them."""
    entered = [0]

    @contextlib.contextmanager
    def device(asked):
        entered.append(torch.device(asked).index)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return entered


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_kernel_runs_with_the_device_of_its_tensor_as_the_current_one(impl, current_device):
    """Triton launches on the current device and its stream: tensors may be on another one of the same machine."""
    backend.register("toy", "triton", lambda operand, more: (current_device[-1], operand, more))
    on_second = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.bfloat16, numel=lambda: 1)
    assert backend.resolve("toy", impl, on_second)(5, more=6) == (1, 5, 6)
    assert current_device == [0]

    def unfit():
        raise backend.Unfit(f"not on {current_device[-1]}")

    backend.register("toy", "triton", unfit)
    backend.register("toy", "ref", lambda: current_device[-1])
    if impl == "auto":
        assert backend.resolve("toy", impl, on_second)() == 1
    with pytest.raises(backend.Unfit, match="not on 1"):
        backend.resolve("toy", "triton", on_second)()


def test_on_the_cpu_there_is_no_guard(current_device):
    kernel = lambda: len(current_device)  # noqa: E731
    backend.register("toy", "cpu", kernel)
    assert backend.resolve("toy", "cpu", torch.zeros(1)) is kernel


UNINSTALLED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "moe_unlearn.triton_kernels":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import moe_unlearn.ops
from moe_unlearn import backend
from moe_unlearn.cli import main
assert backend.choose("gram", "auto", "cuda") == "ref"
raise SystemExit(main(["env"]))
"""


@pytest.mark.slow
def test_a_checkout_that_is_not_installed_computes_on_ref_and_says_why():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", UNINSTALLED], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "not usable" in line)
    assert line.startswith("triton is not usable for expert_mlp, expert_mlp.backward, ")
    assert line.endswith(
        "No module named 'moe_unlearn.triton_kernels'; `pip install --no-deps --no-build-isolation -e .` installs it"
    )
