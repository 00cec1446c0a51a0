"""The tools of the ledger see what they must: in machine code of seeded kernels, and in seeded bad entries."""

import datetime
import importlib.util
from pathlib import Path

import pytest

from moe_unlearn.regress import compile as compiling
from moe_unlearn.regress import ledger, nvcc, sass, static
from tests.static import ledger as tool

GOOD = {
    "config": "bf16 BLOCK=128",
    "registers": 168,
    "stack_bytes": 0,
    "spills": 0,
    "shared_bytes": 98304,
    "tensor_memory": 0,
    "hgmma": 4,
    "hmma": 0,
    "utcmma": 0,
    "tma": 7,
    "cp_async": 0,
    "atomics": 0,
    "float_atomics": 0,
}
NAME = "gram/_gram_kernel/experts"


def worse(**figures) -> dict[str, dict]:
    return {NAME: GOOD | figures}


SEEDED = {"modules": ["tests.static.seeded"], "cache_folder": tool.CACHE}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """The report on the seeded kernels, which no ledger knows yet, for two architectures."""
    none = tmp_path_factory.mktemp("seeded") / "none.json"
    return static.check(["sm_80", "sm_90"], ledger=none, everything=True, **SEEDED)


@pytest.mark.slow
@needs_triton
def test_seeded_kernels(seeded):
    report = seeded
    assert report.exit_code == 1 and len(report.problems) == 2 and report.compared == 0, "one does not compile"
    (measured,) = report.measured.values()
    case = {arch: {name.rpartition("/")[2]: e for name, e in entries.items()} for arch, entries in measured.items()}
    pointers, descriptors, spilling = (case["sm_90"][n] for n in ("pointers", "descriptors", "spilling"))
    assert pointers["hgmma"] and pointers["cp_async"] and not pointers["tma"] and not pointers["spills"]
    assert descriptors["hgmma"] and descriptors["tma"] and not descriptors["atomics"]
    assert spilling["spills"] and spilling["stack_bytes"] and spilling["registers"] == 255
    assert case["sm_80"]["pointers"]["hmma"] and not case["sm_80"]["pointers"]["hgmma"]
    for arch in case:
        assert case[arch]["float32"]["float_atomics"] == case[arch]["bfloat16"]["float_atomics"] == 1
        assert (case[arch]["integer"]["atomics"], case[arch]["integer"]["float_atomics"]) == (1, 0)
        # a signature is the launch it describes
        assert without_identity(case[arch]["by signature"]) == without_identity(case[arch]["pointers"])
    verdicts = {line.split("/")[2].split()[0]: line for line in ledger.violations("sm_90", measured["sm_90"])}
    assert verdicts.keys() == {"spilling", "float32", "bfloat16", "broken"}
    assert "spilling instructions" in verdicts["spilling"] and "float atomics" in verdicts["float32"]
    assert "does not compile" in verdicts["broken"] and "incompatible dimensions" in verdicts["broken"]


def without_identity(entry):
    return {key: value for key, value in entry.items() if key != "identity"}


FOREIGN = """
from pathlib import Path

import triton
import triton.language as tl

from moe_unlearn.regress import static


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + column, mask=column < columns, other=-float("inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * columns + column, value / tl.sum(value, 0), mask=column < columns)


pointers = {"x": "*bf16:16", "out": "*bf16:16", "columns": "i32"}
static.register(static.TritonCase("a row", softmax_kernel, pointers, {"BLOCK": 1024}))
"""


@pytest.mark.nightly
@needs_triton
def test_a_foreign_kernel_is_recorded_broken_and_caught(tmp_path):
    """Recorded, recognised without compiling; then with 32 times the values in a program: caught."""
    module, store = tmp_path / "foreign_softmax.py", tmp_path / "store" / static.LEDGER_NAME
    module.write_text(FOREIGN, encoding="utf-8")
    options = {"ledger": store, "modules": [str(module)], "cache_folder": tool.CACHE}
    assert static.check(["sm_90"], **options).exit_code == 3 and not store.exists()
    recorded = static.record(["sm_90"], **options)
    name = "foreign_softmax/softmax_kernel/a row"
    (by_arch,) = recorded.measured.values()
    assert not recorded.problems and by_arch["sm_90"].keys() == {name}
    assert static.check(["sm_90"], **options).exit_code == 0
    module.write_text(FOREIGN.replace("1024", "32768"), encoding="utf-8")
    report = static.check(["sm_90"], **options)
    assert report.exit_code == 1 and any("spills 0 -> " in line for line in report.problems), report.problems
    module.write_text(FOREIGN.replace('"columns": "i32"', '"width": "i32"'), encoding="utf-8")
    with pytest.raises(ValueError, match="'a row': softmax_kernel takes x, out, columns, BLOCK; missing .'columns'"):
        static.check(["sm_90"], **options)


@pytest.mark.slow
@needs_triton
def test_only_changed_launches_and_a_rotating_tenth_are_compiled_again(seeded, tmp_path):
    path = tmp_path / "ledger.json"
    ((version, measured),) = seeded.measured.items()
    before = measured["sm_90"]
    entries = {name: e | {"registers": 7} for name, e in before.items()}
    changed = "seeded/_matmul_kernel/pointers"
    entries[changed]["identity"] = "0" * 16
    ledger.write({version: {"sm_90": entries}}, path)
    today = datetime.date.today().toordinal()
    for name, entry in static.check(["sm_90"], ledger=path, **SEEDED).measured[version]["sm_90"].items():
        fresh = "error" in entry or name == changed or compiling.resampled(entry["identity"], today)
        assert fresh == (entry.get("registers") != 7), name


CUDA = """
#include "scale.h"
__global__ void twice(float* x) { x[threadIdx.x] *= SCALE; }
__global__ void hold(const float* x, float* out) {
  extern __shared__ float buffer[];
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = buffer[threadIdx.x ^ 1];
}
"""


@pytest.mark.slow
@pytest.mark.skipif(nvcc.compiler() is None, reason="there is no nvcc")
def test_a_foreign_cuda_file(tmp_path):
    source, header = tmp_path / "mine.cu", tmp_path / "scale.h"
    source.write_text(CUDA, encoding="utf-8")
    header.write_text("#define SCALE 2", encoding="utf-8")
    case = static.CudaCase("mine", source)
    measured = nvcc.measure(case, "sm_90")
    assert measured.keys() == {"mine/twice(float*)", "mine/hold(float const*, float*)"}
    assert not ledger.violations("sm_90", measured) and measured["mine/twice(float*)"]["registers"] > 0
    made = nvcc.identity(case, "sm_90")
    assert {entry["identity"] for entry in measured.values()} == {made} != {nvcc.identity(case, "sm_80")}
    header.write_text("#define SCALE 3", encoding="utf-8")
    assert nvcc.identity(case, "sm_90") != made, "a header of its own is part of it"
    source.write_text("__global__ void broken() { missing(); }", encoding="utf-8")
    with pytest.raises(RuntimeError, match='mine.cu for sm_90:[^$]*identifier "missing" is undefined'):
        nvcc.measure(case, "sm_90")


@pytest.mark.quick
def test_every_launch_has_its_day():
    for identity in ("0123456789abcdef", "f" * 16, "0" * 16):
        assert sum(compiling.resampled(identity, day) for day in range(739_000, 739_010)) == 1


@pytest.mark.quick
class TestSeededEntries:
    def test_nothing_to_say_of_a_good_entry(self):
        assert ledger.violations("sm_90", worse()) == ledger.differences("sm_90", worse(), worse()) == []
        assert not ledger.differences("sm_90", worse(), worse(registers=160, hgmma=8, shared_bytes=1))

    @pytest.mark.parametrize(
        "arch,figures,message",
        [
            ("sm_90", {"spills": 3, "stack_bytes": 24}, "3 spilling instructions, 24 bytes of stack"),
            ("sm_90", {"float_atomics": 1, "atomics": 1}, "1 float atomics"),
            ("sm_90", {"shared_bytes": 232449}, "232449 bytes of shared memory; 232448 are there"),
            ("sm_80", {"shared_bytes": 166913}, "166913 bytes of shared memory; 166912 are there"),
        ],
    )
    def test_violations(self, arch, figures, message):
        (line,) = ledger.violations(arch, worse(**figures))
        assert line == f"{arch} {NAME} [bf16 BLOCK=128]: {line.partition(']: ')[2]}" and message in line

    @pytest.mark.parametrize(
        "figures,message",
        [
            ({"registers": 169}, "registers 168 -> 169"),
            ({"shared_bytes": 98305}, "shared_bytes 98304 -> 98305"),
            ({"hgmma": 0, "hmma": 64}, "hgmma 4 -> lost"),
            ({"tma": 0}, "tma 7 -> lost"),
            ({"atomics": 1}, "atomics 0 -> 1"),
        ],
    )
    def test_growth_and_loss(self, figures, message):
        (line,) = ledger.differences("sm_90", worse(), worse(**figures))
        assert line.startswith(f"sm_90 {NAME}: ") and message in line

    def test_a_changed_configuration_is_shown(self):
        (line,) = ledger.differences("sm_90", worse(), worse(registers=255, config="bf16 BLOCK=256"))
        assert "was [bf16 BLOCK=128], now [bf16 BLOCK=256]" in line

    def test_entries_without_counterpart(self):
        assert ledger.differences("sm_80", {}, worse()) == [f"sm_80 {NAME}: compiled, not in the ledger"]
        assert ledger.differences("sm_80", worse(), {}) == [f"sm_80 {NAME}: in the ledger, no longer compiled"]
        kernel = "gram/_gram_kernel"
        recorded = {"triton 3.9.0": {"sm_80": worse()}, "nvcc 13.0": {"sm_80": {"route/Route<int>": {}}}}
        assert not tool.uncovered(recorded, {kernel})
        assert tool.uncovered({}, {kernel}) == [f"{kernel}: in the sources, never in the ledger"]
        assert tool.uncovered(recorded, set()) == [f"{kernel}: in the ledger, not in the sources"]

    def test_a_kernel_that_compiles_again_has_nothing_to_compare(self):
        failed = {NAME: {"config": "bf16", "error": "CompilationError"}}
        assert not ledger.differences("sm_90", failed, worse())
        assert "does not compile: CompilationError" in ledger.violations("sm_90", failed)[0]

    def test_the_file_round_trips_and_damage_is_named(self, tmp_path):
        content = {
            "triton 3.9.0": {"sm_80": worse(), "sm_90": worse() | {"a/b/c": GOOD}},
            "triton 3.6.0": {"sm_90": {}},
        }
        path = tmp_path / "store" / static.LEDGER_NAME
        assert ledger.read(path) == {}
        ledger.write(content, path)
        assert ledger.read(path) == content and list(path.parent.iterdir()) == [path]
        whole = path.read_text(encoding="utf-8")
        for damaged in (whole[: len(whole) // 2], whole.replace('"registers": 168', '"registers": "168"'), "[]"):
            path.write_text(damaged, encoding="utf-8")
            with pytest.raises(ledger.CorruptLedger, match="static.json: not a ledger of kernels"):
                static.check(["sm_90"], ledger=path, modules=["not imported"])


def compiled(monkeypatch, *entries, notes=()):
    """`static` on what compiling would have given, one architecture's entries for each compiler."""
    measured = {f"triton 3.{i}": {"sm_90": e} for i, e in enumerate(entries)}
    monkeypatch.setattr(compiling, "run", lambda *arguments, **options: (measured, list(notes)))


@pytest.mark.quick
class TestVerdicts:
    options = {"architectures": ["sm_90"], "modules": ["mine"]}

    def test_recorded_spills_are_accepted_and_more_are_not(self, tmp_path, monkeypatch):
        path = tmp_path / static.LEDGER_NAME
        compiled(monkeypatch, worse(spills=3, stack_bytes=24))
        assert not static.record(ledger=path, **self.options).problems
        report = static.check(ledger=path, **self.options)
        assert (report.exit_code, report.compared, report.problems) == (0, 1, [])
        compiled(monkeypatch, worse(spills=4, stack_bytes=24))
        report = static.check(ledger=path, **self.options)
        assert report.exit_code == 1 and "spills 3 -> 4" in report.problems[0]

    def test_ours_never_spill(self, tmp_path, monkeypatch):
        path = tmp_path / static.LEDGER_NAME
        compiled(monkeypatch, worse(spills=3, stack_bytes=24))
        assert static.record(["sm_90"], ledger=path).exit_code == 1 and not path.exists()

    def test_recording_some_leaves_the_others(self, tmp_path, monkeypatch):
        path = tmp_path / static.LEDGER_NAME
        compiled(monkeypatch, worse() | {"route/a/b": GOOD, "route/a/gone": GOOD})
        static.record(ledger=path, **self.options)
        compiled(monkeypatch, {"route/a/b": GOOD | {"registers": 9}})
        report = static.record(kernels=["route"], ledger=path, **self.options)
        assert report.notes == ["triton 3.0 sm_90 route/a/gone: in the ledger, no longer compiled"]
        assert ledger.read(path)["triton 3.0"]["sm_90"] == worse() | {"route/a/b": GOOD | {"registers": 9}}

    def test_nothing_to_compare_is_no_success(self, tmp_path, monkeypatch):
        compiled(monkeypatch, worse(), notes=["CUDA kernels are left out: there is no nvcc"])
        report = static.check(ledger=tmp_path / "new.json", **self.options)
        assert report.exit_code == 3 and "no nvcc" in report.notes[0] and "has no figures" in report.notes[1]
        assert "0 compared" in report.summary()

    def test_what_is_not_there_is_said_and_left_out(self, monkeypatch):
        def missing():
            raise sass.NoDisassembler("there is no cuobjdump; Triton's wheel and CUDA's toolkit bring one")

        def notes(*compilers):
            measured, told = compiling.measure(["sm_90"], [], [], {}, compilers)
            assert measured == {}
            return told

        monkeypatch.setattr(nvcc, "compiler", lambda: None)
        assert notes("nvcc") == ["CUDA kernels are left out: there is no nvcc"]
        monkeypatch.setattr(nvcc, "SOURCES", {})
        assert "csrc/cuda, come with a checkout only" in notes("nvcc")[0]
        monkeypatch.setattr(sass, "disassembler", missing)
        (told,) = notes("triton")
        assert told.startswith("Triton kernels are left out: there is no cuobjdump") or "not installed" in told
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "Triton is not installed; pip install moe-unlearn[triton]" in notes("triton")[0]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="there is none in nowhere"):
            static.check(["sm_90"], triton_folder=Path("nowhere"))
        with pytest.raises(ValueError, match="one of sm_75, sm_80, .*; got 'gfx942'"):
            static.check(["gfx942"])
        with pytest.raises(ValueError, match="at least one architecture"):
            static.check([])
        with pytest.raises(ValueError, match="the ledger of your own modules' kernels"):
            static.check(["sm_90"], modules=["mine"])
        with pytest.raises(ValueError, match="expected x to have a type like .*; got 'float32'"):
            static.TritonCase("a", None, {"x": "float32"})
        with pytest.raises(ValueError, match="x in both signature and constexprs"):
            static.TritonCase("a", None, {"x": "i32"}, {"x": 1})
        with pytest.raises(ValueError, match="power of 2 to 32; got 3"):
            static.TritonCase("a", None, {}, num_warps=3)
        with pytest.raises(ValueError, match="a line without '/'; got 'a/b'"):
            static.CudaCase("a/b", Path("x.cu"))

    def test_names_are_selected_by_pattern_or_by_their_first_parts(self):
        asked = ("gram", "gram/_gram_kernel", NAME, "*/experts", "gr", "_gram_kernel")
        chosen = [selection for selection in asked if compiling.selected(NAME, [selection])]
        assert compiling.selected(NAME, []) and compiling.selected(NAME, ["route", "gram"])
        assert chosen == ["gram", "gram/_gram_kernel", NAME, "*/experts"]

    def test_the_table_shows_every_figure(self):
        text = static.table({"triton 3.9.0": {"sm_90": worse(spills=12)}, "nvcc 13.0": {"sm_80": {"a/k": PTXAS}}})
        header, line, _, header_of_nvcc, line_of_nvcc = text.splitlines()
        assert header.split()[:5] == ["triton", "3.9.0", "sm_90", "regs", "stack"]
        assert line.split() == [NAME, "168", "·", "12", "98304", "·", "4", *"··7···", "bf16", "BLOCK=128"]
        assert "spill B" in header_of_nvcc and line_of_nvcc.split() == ["a/k", "50", "8", "28", "96"]


PTXAS = {"registers": 50, "stack_bytes": 8, "spill_bytes": 28, "shared_bytes": 96}


@pytest.mark.quick
def test_what_ptxas_says():
    listing = (
        "ptxas info : Compiling entry function '_ZN11moe_unlearn5entryINS_6ScoresEEEvNT_9ArgumentsE' for 'sm_80'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info : Used 50 registers, used 1 barriers, 96 bytes smem, 380 bytes cmem[0]\n"
    )
    ((symbol, entry),) = nvcc.parse(listing).items()
    assert nvcc.kernel_name(symbol) in ("Scores", symbol) and entry == PTXAS
    assert ledger.violations("sm_80", {"Scores": entry}) == ["sm_80 Scores: 28 bytes spilled, 8 bytes of stack"]
    assert ledger.differences("sm_80", {"Scores": entry | {"registers": 40}}, {"Scores": entry}) == [
        "sm_80 Scores: registers 40 -> 50"
    ]


@pytest.mark.quick
def test_float_atomics_are_seen_in_either_form():
    def figures(code: str, ttir: str = ""):
        line = f"        /*0010*/                   {code} ;\n"
        return sass.parse("Function k:\n REG:8 STACK:0 SHARED:0", line, ttir, 0, 0)

    assert figures("@!P0 RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5")["float_atomics"] == 1
    assert figures("ATOMG.E.ADD.STRONG.GPU PT, R5, desc[UR4][R2.64], R5")["float_atomics"] == 0
    assert figures("EXIT", "%7 = tt.atomic_rmw fadd, acq_rel, gpu, %3 : tensor<4xbf16>")["float_atomics"] == 1
    assert figures("EXIT", "tt.descriptor_reduce add, %d[%c], %v : !tt.tensordesc<8x8xf32>")["float_atomics"] == 1
    assert figures("EXIT", "tt.atomic_rmw add, acq_rel, gpu, %3 : tensor<4xi32>")["float_atomics"] == 0
    with pytest.raises(ValueError, match="no instruction"):
        sass.parse("REG:8 STACK:0", "", "", 0, 0)
