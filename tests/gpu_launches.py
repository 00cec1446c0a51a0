"""The Triton kernels that a GPU machine launches, as static cases: what the rehearsal compiles for it beforehand.

    python -O -m moe_unlearn.regress.compile --arch sm_90 --compiler triton --module tests.gpu_launches --json FILE

The stages' own programs run here as on an H200, but that their tensors lie on the CPU and that a launch is recorded
in place of run. So outputs are zeros: under -O no `assert` stops a test at them, and the accuracy checks of
`moe_unlearn.testing` run the op alone. What fails all the same is said, and what it would have launched after that
is not compiled: a cache may miss. A process that imports this is good for nothing else.
"""

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import moe_unlearn.triton_kernels
from benchmarks import harness, suite
from moe_unlearn import backend, testing
from moe_unlearn.regress import launches
from moe_unlearn.regress.static_case import LaunchCase, register
from moe_unlearn.triton_kernels import configs
from tests.gpu_pretend import pretend
from tests.gpu_stages import SAMPLED, TRITON_TESTS

MULTIPROCESSORS = 132  # of an H200
# numbers that no kernel reads: what is larger is not drawn
_DRAWN = 2**20
_RANDOM = {torch.randn, torch.rand, torch.randn_like, torch.rand_like}
_FILLED = {torch.Tensor.normal_, torch.Tensor.uniform_}


class _OnTheCpu(TorchFunctionMode):
    """Tensors for a GPU lie on the CPU, and large random ones are zeros."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = {name: _here(value) for name, value in (options or {}).items()}
        if function is torch.Tensor.cuda:
            return arguments[0]
        if function is torch.Tensor.to:
            arguments = tuple(map(_here, arguments))
        if function in _FILLED and arguments[0].numel() > _DRAWN:
            return arguments[0]
        if function in _RANDOM and (made := _large(function, arguments, options)) is not None:
            return made
        return function(*arguments, **options)


def _here(value):
    cuda = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return torch.device("cpu") if cuda else value


def _large(function: Callable, arguments: tuple, options: dict) -> torch.Tensor | None:
    """The zeros in place of many random numbers, None where there are few."""
    kept = {name: value for name, value in options.items() if name != "generator"}
    asked = function(*arguments, **kept | {"device": "meta"})
    return torch.zeros(asked.shape, dtype=asked.dtype) if asked.numel() > _DRAWN else None


def _zeros(function: Callable) -> Callable:
    """Make zeros of what a kernel would have filled: a valid index."""

    @functools.wraps(function)
    def zeros(*arguments, **options):
        made = function(*arguments, **options)
        # a large one comes fresh from the system, whose pages are zeros until they are touched
        return made if made.numel() > _DRAWN else made.zero_()

    return zeros


def stand_in() -> None:
    """From now on this process takes itself for a GPU machine that has Triton kernels alone."""
    for module in pkgutil.iter_modules(moe_unlearn.triton_kernels.__path__):
        importlib.import_module(f"{moe_unlearn.triton_kernels.__name__}.{module.name}")
    pretend()
    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(place, name, _zeros(getattr(place, name)))
    generator = torch.Generator
    torch.Generator = lambda device="cpu": generator()
    torch.compile = lambda function, **options: function
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS, total_memory=141 * 10**9, major=9, minor=0, name="a pretended H200"
    )
    backend._can_run = lambda impl, device_type: impl in ("triton", "ref", "cpu")
    backend._FASTEST_FIRST = dict.fromkeys(("cpu", "cuda"), ("triton", "ref", "cpu"))
    configs.num_programs = lambda device: MULTIPROCESSORS
    testing.poison = contextlib.nullcontext
    testing.assert_as_accurate = lambda *tensors, **options: None
    testing.check_against_ref = _op_alone


def _op_alone(op, ref, inputs, *, gradients=(), seed=0, gradient_layout="contiguous") -> None:
    testing.evaluate(op, inputs, gradients, seed=seed, gradient_layout=gradient_layout)


def attempt(what: str, calls: Iterable[tuple[str, Callable[[], object]]]) -> None:
    """Make every call, and say which failed."""
    failed, count = 0, 0
    for name, call in calls:
        count += 1
        try:
            call()
        except Exception as error:  # noqa: BLE001 -- whatever zeros lead to
            failed += 1
            print(f"{what}: {name} ended with {type(error).__name__}: {str(error)[:200]}", flush=True)
    print(f"{what}: {count - failed} of {count} recorded to their end", flush=True)


def smoke() -> None:
    """Stage (b)."""
    from tests import gpu_smoke

    with _OnTheCpu():
        found = gpu_smoke.everything("cpu", toy=False)
        attempt("smoke", ((name, check) for name, check in found if " triton" in name or " auto" in name))


def matrix() -> None:
    """Stage (c), without the tests of the CUDA kernels."""
    options = ("-p", "no:cacheprovider", *SAMPLED)
    with _OnTheCpu():
        pytest.main(
            [*options, "--assert=plain", "--tb=short", "-W", "ignore", *TRITON_TESTS, "tests/ops", "--impl=triton"]
        )


def operations() -> None:
    """Stage (e)."""

    def ours(case: harness.Case) -> None:
        contenders = harness.built(case).contenders
        for name in (harness.OURS, harness.side("triton")):
            if name in contenders:
                contenders[name]()

    def calls() -> Iterator[tuple[str, Callable[[], object]]]:
        for case in suite.cases("cuda", part="ops", tiers=(0,)):
            yield case.title, lambda case=case: ours(case)

    with _OnTheCpu():
        attempt("ops", calls())


def production() -> Iterator[LaunchCase]:
    """The ledger's cases: what whole steps of published geometries launch."""
    for module in pkgutil.iter_modules(launches.__path__):
        for name, launch in importlib.import_module(f"{launches.__name__}.{module.name}").CASES.items():
            yield LaunchCase(f"{module.name}, {name}", launch)


stand_in()
for made in (*production(), LaunchCase("smoke", smoke), LaunchCase("matrix", matrix), LaunchCase("ops", operations)):
    register(made)
