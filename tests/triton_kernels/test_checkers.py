"""The checkers on seeded bugs: each still catches its own, and a correct kernel passes them all."""

import os

import pytest
import torch
import triton
import triton.language as tl

from moe_unlearn.triton_kernels.common import INTERPRET
from tests.support.checkers.case import Case, findings
from tests.support.checkers.child import in_child
from tests.support.checkers.launches import watch
from tests.support.checkers.memory import filled, guarded, lazy, resident_bytes

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not INTERPRET.value, reason="the checkers observe the interpreter"),
]
BLOCK = 32
SIZE = 3 * BLOCK + 5


@triton.jit
def _add_one_kernel(x, out, size, BUG: tl.constexpr, BLOCK: tl.constexpr):
    """out = x + 1, with one seeded bug or none."""
    program = tl.program_id(0)
    if BUG != "offset in 32 bits":
        program = program.to(tl.int64)
    offset = program * BLOCK + tl.arange(0, BLOCK)
    keep = offset < size
    if BUG == "unmasked load":
        value = tl.load(x + offset)
    elif BUG == "offset -1":
        value = tl.load(x + offset - 1, mask=keep, other=0.0)
    elif BUG == "neighbour read":
        value = tl.load(x + (offset + BLOCK) % size, mask=keep, other=0.0)
    else:
        value = tl.load(x + offset, mask=keep, other=0.0)
    if BUG == "unmasked store":
        tl.store(out + offset, value + 1)
    elif BUG == "overlapping writes":
        tl.store(out + offset, value + program, mask=keep)
        tl.store(out + offset + 1, value + program, mask=offset + 1 < size)
    elif BUG == "float atomic":
        tl.atomic_add(out + offset % 7, value, mask=keep)
    elif BUG == "integer atomic":
        tl.atomic_add(out.to(tl.pointer_type(tl.int32)) + offset % 7, 1, mask=keep)
    elif BUG == "unwritten element":
        tl.store(out + offset, value + 1, mask=keep & (offset != 40))
    elif BUG == "reads its own store":
        tl.store(out + offset, value, mask=keep)
        tl.store(out + offset, tl.load(out + (offset ^ 1), mask=keep & ((offset ^ 1) < size)) + 1, mask=keep)
    elif BUG == "two values to one address":
        tl.store(out + program + offset * 0, value + offset, mask=keep)
    elif BUG == "hides in the input":
        tl.store(x + offset, value + 1, mask=keep)
        tl.store(out + offset, value + 1, mask=keep)
    else:
        tl.store(out + offset, value + 1, mask=keep)


def add_one(x, bug="", out=None):
    out = torch.empty_like(x) if out is None else out
    _add_one_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), bug, BLOCK)
    return out


def case(bug="", **keywords):
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    return Case(lambda x: add_one(x, bug), {"x": x}, **keywords)


@pytest.mark.parametrize("alignment", [1, 16])
def test_a_correct_kernel_passes(alignment):
    assert findings(case(), alignment=alignment) == []


@pytest.mark.parametrize(
    "bug,expected",
    [
        ("unmasked load", "died of SIGSEGV"),
        ("unmasked store", "died of SIGSEGV"),
        ("offset -1", "reads outside every tensor, 1 addresses: x[-1]"),
        ("overlapping writes", "two programs write"),
        ("float atomic", "float atomic"),
        ("integer atomic", "undeclared integer atomic"),
        ("unwritten element", "output 0 differs in 4 bytes, first at 160"),
        ("reads its own store", "reads what it wrote, without a barrier"),
        ("two values to one address", "two values to one address"),
        ("hides in the input", "x was changed"),
    ],
)
@pytest.mark.slow(but=5)
def test_seeded_bugs_are_found(bug, expected):
    found = findings(case(bug))
    assert any(expected in finding for finding in found), found
    assert all("_add_one_kernel" in f or "differs" in f or "changed" in f for f in found), found


def test_an_access_before_the_start_dies():
    """Without the tracer: the guard page in front is enough."""

    def run():
        with watch(edge="start"):
            add_one(torch.ones(SIZE), "offset -1")
        return []

    assert in_child(run) == ["_add_one_kernel, program (0, 0, 0): died of SIGSEGV"]


@pytest.mark.parametrize("edge,bug", [("end", "unmasked load"), ("end", "unmasked store"), ("start", "offset -1")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
@pytest.mark.slow(but=3)
def test_a_tensor_made_between_guard_pages_is_guarded_without_hooks(edge, bug, dtype):
    def run(bug):
        x, out = (guarded(torch.ones(SIZE, dtype=dtype), edge) for _ in range(2))
        return add_one(x, bug, out).tolist()

    assert in_child(lambda: run("")) == [2] * SIZE
    assert in_child(lambda: run(bug)) == ["died of SIGSEGV"]


def test_an_access_within_the_alignment_gap_is_found():
    """61 floats end 12 bytes before a multiple of 16: three elements fit between them and the guard page."""
    x = torch.ones(61)
    for bug, expected in [("unmasked load", "reads outside"), ("unmasked store", "writes outside")]:
        found = findings(Case(lambda x, bug=bug: add_one(x, bug), {"x": x}), alignment=16)
        assert any(expected in finding for finding in found), found


@pytest.mark.parametrize("bug", ["overlapping writes", "float atomic"])
def test_another_order_of_programs_gives_other_bits(bug):
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)) * 1e3
    results = []
    for order in (None, 1, 2, 3):
        with watch(order=order):
            results.append(add_one(x, bug, torch.zeros(SIZE)))
    assert any(not torch.equal(results[0], result) for result in results[1:])


def test_a_neighbour_read_in_place_is_a_conflict_and_depends_on_the_order():
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    in_place = Case(lambda x: add_one(x, "neighbour read", out=x), {"x": x}, mutates=("x",))
    found = findings(in_place)
    assert any("reads what another writes" in finding for finding in found), found
    assert any("order: x differs" in finding for finding in found), found


def test_other_bits_than_the_reference_are_found():
    x = torch.ones(5)
    assert findings(Case(add_one, {"x": x}, reference=lambda x: x + 1)) == []
    found = findings(Case(add_one, {"x": x}, reference=lambda x: torch.full((5,), 3.0)))
    assert found[0] == "as it is: output 0 differs in 5 bytes, first at 2 of 20"


def test_integer_atomics_are_allowed_where_declared():
    def count(x):
        out = torch.zeros(SIZE, dtype=torch.int32)
        return add_one(x, "integer atomic", out)

    x = torch.ones(SIZE)
    assert findings(Case(count, {"x": x}, integer_atomics=True)) == []
    assert findings(Case(count, {"x": x})) != []


@triton.jit
def _wgrad_kernel(rows, offsets, out, SKIP_EMPTY: tl.constexpr, WIDTH: tl.constexpr):
    """out[e] = sum of the rows of expert e."""
    expert = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    total = tl.zeros((WIDTH,), tl.float32)
    for row in range(start, stop):
        total += tl.load(rows + row * WIDTH + column)
    if start < stop or not SKIP_EMPTY:
        tl.store(out + expert * WIDTH + column, total)


@pytest.mark.parametrize("skip", [False, True])
def test_the_unwritten_row_of_an_empty_expert_is_found(skip):
    def sums(rows, offsets):
        out = torch.empty(3, 8)
        _wgrad_kernel[(3,)](rows, offsets, out, skip, 8)
        return out

    found = findings(Case(sums, {"rows": torch.randn(6, 8), "offsets": torch.tensor([0, 2, 2, 6])}))
    expected = [
        "with other bytes in uninitialised memory, in another order: output 0 differs in 32 bytes, first at 32 of 96"
    ]
    assert found == (expected if skip else [])


@triton.jit
def _scale_view_kernel(x, row_stride, HOLES: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, 8)
    pointer = x + row * row_stride + column
    tl.store(pointer, tl.load(pointer, mask=column < HOLES) * 2, mask=column < HOLES)


@pytest.mark.parametrize("touched,clean", [(5, True), (6, False)])
def test_the_holes_of_a_view_are_out_of_bounds(touched, clean):
    def scale(x):
        _scale_view_kernel[(3,)](x, x.stride(0), touched)
        return x

    found = findings(Case(scale, {"x": torch.ones(4, 8)[:3, :5]}, mutates=("x",)))
    # only the last row reaches the guard page, so the traced run dies of it or names the holes
    assert (found == []) == clean, found


@triton.jit
def _descriptor_kernel(x, out, rows, columns, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, shape=[rows, columns], strides=[columns, 1], block_shape=[BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(out, shape=[rows, columns], strides=[columns, 1], block_shape=[BLOCK, BLOCK])
    corner = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    target.store(corner, source.load(corner) * 2)


def test_descriptors_are_seen():
    def double(x, rows):
        out = torch.empty_like(x)
        _descriptor_kernel[(2, 2)](x, out, rows, x.shape[1], 16)
        return out

    x = torch.randn(20, 24)
    assert findings(Case(lambda x: double(x, 20), {"x": x}), alignment=16) == []
    assert any("SIGSEGV" in f for f in findings(Case(lambda x: double(x, 21), {"x": x}), alignment=16))
    assert any("differs" in f for f in findings(Case(lambda x: double(x, 19), {"x": x}), alignment=16))


def test_a_case_that_launches_nothing_or_raises_is_found():
    x = torch.ones(3)
    assert findings(Case(lambda x: x + 1, {"x": x})) == ["nothing was launched"]

    def wrong(x):
        raise KeyError("no such thing")

    assert findings(Case(wrong, {"x": x})) == ["raised KeyError: 'no such thing'"]
    assert in_child(lambda: os.kill(os.getpid(), 9)) == ["died of SIGKILL"]


def test_fillings_reach_every_way_to_allocate():
    with filled(0x3C):
        made = [
            torch.empty(3),
            torch.empty_like(torch.ones(3)),
            torch.empty_strided((3,), (1,)),
            torch.ones(1).new_empty(3),
            torch.ones(1).new_empty_strided((3,), (1,)),
        ]
    assert all((tensor.view(torch.int32) == 0x3C3C3C3C).all() for tensor in made)
    assert torch.zeros(3).eq(0).all()


@triton.jit
def _copy_rows_kernel(x, out, row_stride, WIDE: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out + row * WIDTH + column, tl.load(x + row * row_stride + column))


@pytest.mark.parametrize("wide", [True, False])
def test_an_offset_in_32_bits_dies_past_2_to_the_31(wide):
    def run():
        # the stride fits 32 bits, twice the stride does not
        x, out = lazy((3, 8), (2**30 + 8, 1)), torch.empty(3, 8)
        x.copy_(torch.arange(24.0).view(3, 8))
        before = resident_bytes()
        _copy_rows_kernel[(3,)](x, out, x.stride(0), wide, 8)
        assert torch.equal(out, x)
        assert resident_bytes() - before < 50 * 2**20
        return []

    found = in_child(run)
    assert found == ([] if wide else ["died of SIGSEGV"])


@pytest.mark.parametrize("bug", ["", "offset in 32 bits"])
def test_only_the_programs_at_the_far_end_run(bug):
    def run():
        x, out = lazy((2**31 + SIZE,), dtype=torch.int8), lazy((2**31 + SIZE,), dtype=torch.int8)
        before = resident_bytes()
        with watch(programs=lambda name, grid: [(grid[0] - 1 - i, 0, 0) for i in range(2)]):
            add_one(x, bug, out)
        assert resident_bytes() - before < 50 * 2**20
        assert out[-5:].tolist() == [1] * 5 and out[:5].tolist() == [0] * 5
        return []

    last = triton.cdiv(2**31 + SIZE, BLOCK) - 1
    assert in_child(run) == ([f"_add_one_kernel, program ({last}, 0, 0): died of SIGSEGV"] if bug else [])
