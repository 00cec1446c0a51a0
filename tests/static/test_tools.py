"""The tools of the ledger see what they must: in machine code of seeded kernels, and in seeded bad entries."""

import datetime
import importlib.util
import json

import pytest

from tests.static import compile as tool
from tests.static import ledger, sass

GOOD = {
    "config": "bf16 BLOCK=128", "registers": 168, "stack_bytes": 0, "spills": 0, "shared_bytes": 98304,
    "tensor_memory": 0, "hgmma": 4, "hmma": 0, "utcmma": 0, "tma": 7, "cp_async": 0, "atomics": 0, "float_atomics": 0,
}  # fmt: skip
NAME = "gram/_gram_kernel/experts"


def worse(**figures) -> dict[str, dict]:
    return {NAME: GOOD | figures}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_seeded_kernels(tmp_path):
    file = tmp_path / "figures.json"
    done = tool.run("--module=tests.static.seeded", "--arch=80", "--arch=90", "--json", str(file), capture_output=True)
    assert done.returncode == 1, "a spill and a float atomic were compiled"
    measured = json.loads(file.read_text())["measured"]
    case = {arch: {name.rpartition("/")[2]: e for name, e in entries.items()} for arch, entries in measured.items()}
    pointers, descriptors, spilling = (case["sm_90"][n] for n in ("pointers", "descriptors", "spilling"))
    assert pointers["hgmma"] and pointers["cp_async"] and not pointers["tma"] and not pointers["spills"]
    assert descriptors["hgmma"] and descriptors["tma"] and not descriptors["atomics"]
    assert spilling["spills"] and spilling["stack_bytes"] and spilling["registers"] == 255
    assert case["sm_80"]["pointers"]["hmma"] and not case["sm_80"]["pointers"]["hgmma"]
    for arch in case:
        assert case[arch]["float32"]["float_atomics"] == case[arch]["bfloat16"]["float_atomics"] == 1
        assert (case[arch]["integer"]["atomics"], case[arch]["integer"]["float_atomics"]) == (1, 0)
    verdicts = {line.split("/")[2].split()[0]: line for line in ledger.violations("sm_90", measured["sm_90"])}
    assert verdicts.keys() == {"spilling", "float32", "bfloat16", "broken"}
    assert "spilling instructions" in verdicts["spilling"] and "float atomics" in verdicts["float32"]
    assert "does not compile" in verdicts["broken"] and "incompatible dimensions" in verdicts["broken"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_only_changed_launches_and_a_rotating_tenth_are_compiled_again(tmp_path):
    first, second, recorded = (tmp_path / f"{name}.json" for name in ("first", "second", "recorded"))
    options = ["--module=tests.static.seeded", "--arch=90"]
    tool.run(*options, "--json", str(first), capture_output=True)
    before = json.loads(first.read_text())
    entries = {name: e | {"registers": 7} for name, e in before["measured"]["sm_90"].items()}
    changed = "seeded/_matmul_kernel/pointers"
    entries[changed]["identity"] = "0" * 16
    recorded.write_text(json.dumps({f"triton {before['triton']}": {"sm_90": entries}}))
    tool.run(*options, "--json", str(second), "--recorded", str(recorded), capture_output=True)
    today = datetime.date.today().toordinal()
    for name, entry in json.loads(second.read_text())["measured"]["sm_90"].items():
        fresh = "error" in entry or name == changed or tool.resampled(entry["identity"], today)
        assert fresh == (entry.get("registers") != 7), name


@pytest.mark.quick
def test_every_launch_has_its_day():
    for identity in ("0123456789abcdef", "f" * 16, "0" * 16):
        assert sum(tool.resampled(identity, day) for day in range(739_000, 739_010)) == 1


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
        assert not ledger.uncovered({"triton 3.9.0": {"sm_80": worse()}}, {kernel})
        assert ledger.uncovered({}, {kernel}) == [f"{kernel}: in the sources, never in the ledger"]
        assert ledger.uncovered({"v": {"sm_80": worse()}}, set()) == [f"{kernel}: in the ledger, not in the sources"]

    def test_a_kernel_that_compiles_again_has_nothing_to_compare(self):
        failed = {NAME: {"config": "bf16", "error": "CompilationError"}}
        assert not ledger.differences("sm_90", failed, worse())
        assert "does not compile: CompilationError" in ledger.violations("sm_90", failed)[0]

    def test_the_file_round_trips(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ledger, "LEDGER", tmp_path / "ledger.json")
        content = {
            "triton 3.9.0": {"sm_80": worse(), "sm_90": worse() | {"a/b/c": GOOD}},
            "triton 3.6.0": {"sm_90": {}},
        }
        ledger.write(content)
        assert ledger.read() == content


@pytest.mark.quick
def test_float_atomics_are_seen_in_either_form():
    def figures(code: str, ttir: str = ""):
        line = f"        /*0010*/                   {code} ;\n"
        return sass.parse("Function k:\n REG:8 STACK:0 SHARED:0", line, ttir, 0, 0)

    assert figures("@!P0 RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5").float_atomics == 1
    assert figures("ATOMG.E.ADD.STRONG.GPU PT, R5, desc[UR4][R2.64], R5").float_atomics == 0
    assert figures("EXIT", "%7 = tt.atomic_rmw fadd, acq_rel, gpu, %3 : tensor<4xbf16>").float_atomics == 1
    assert figures("EXIT", "tt.descriptor_reduce add, %d[%c], %v : !tt.tensordesc<8x8xf32>").float_atomics == 1
    assert figures("EXIT", "tt.atomic_rmw add, acq_rel, gpu, %3 : tensor<4xi32>").float_atomics == 0
    with pytest.raises(ValueError, match="no instruction"):
        sass.parse("REG:8 STACK:0", "", "", 0, 0)
