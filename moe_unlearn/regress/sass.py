"""Read from machine code what compiled kernels cost and which instructions they consist of."""

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_ATOMIC = re.compile(r"^.*\b(?:tt\.atomic_rmw|tt\.atomic_cas|tt\.descriptor_reduce)\b.*$", re.MULTILINE)
_FLOAT_ATOMIC = re.compile(r"atomic_rmw fadd|descriptor_reduce add\b.*x(?:f16|bf16|f32)>")
_FLOAT_ATOMIC_INSTRUCTION = re.compile(r"(?:RED|ATOM)\w*\..*\.(?:F16|BF16|F32|F64)")


class NoDisassembler(RuntimeError):
    """Error for missing tools: neither CUDA's toolkit nor Triton's wheel is there to read machine code."""


@functools.cache
def disassembler() -> str:
    """Return the path of cuobjdump, from Triton's wheel or else CUDA's toolkit; raise NoDisassembler without both."""
    triton = importlib.util.find_spec("triton")
    bundled = None if triton is None else Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin"
    found = (bundled and shutil.which("cuobjdump", path=bundled)) or shutil.which("cuobjdump")
    if found is None:
        raise NoDisassembler("there is no cuobjdump; Triton's wheel and CUDA's toolkit bring one")
    return found


def read(cubin: bytes, ttir: str, shared_bytes: int, tensor_memory: int) -> dict[str, int]:
    """Return the figures of `parse` for the binary of one Triton kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, code = (_run(disassembler(), option, file.name) for option in ("-res-usage", "-sass"))
    return parse(resources, code, ttir, shared_bytes, tensor_memory)


def parse(resources: str, code: str, ttir: str, shared_bytes: int, tensor_memory: int) -> dict[str, int]:
    """Return the figures of a kernel from its resource usage, machine code and Triton IR.

    `spills` counts loads and stores of local memory; `atomics` counts those the kernel asks for, of any type. The
    other counts are instructions. The compiler's own atomics (descriptors, tensor memory) do not count.
    """
    used = _RESOURCES.search(resources)
    if used is None:
        raise ValueError(f"expected the registers and the stack of a kernel; got {resources[:200]!r}")
    registers, stack = map(int, used.groups())
    counted = mix(code)
    atomics = _ATOMIC.findall(ttir)
    # counted in either form: a float addition may become a compare-and-swap loop or a bulk reduction in machine code
    float_atomics = max(sum(bool(_FLOAT_ATOMIC.search(line)) for line in atomics), counted.pop("float_atomics"))
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spills": counted.pop("spills"),
        "shared_bytes": shared_bytes,
        "tensor_memory": tensor_memory,
        **counted,
        "atomics": len(atomics),
        "float_atomics": float_atomics,
    }


def mix(code: str) -> dict[str, int]:
    """Return how many instructions of each relevant kind there are; raise ValueError if `code` has none at all."""
    instructions = _INSTRUCTION.findall(code)
    if not instructions:
        raise ValueError("no instruction found in the disassembly")

    def count(*starts: str) -> int:
        return sum(i.partition(".")[0] in starts for i in instructions)

    return {
        "spills": count("LDL", "STL"),
        "hgmma": count("HGMMA"),
        "hmma": count("HMMA"),
        "utcmma": sum(bool(re.match(r"UTC\w*MMA", i)) for i in instructions),
        "tma": count("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP"),
        "cp_async": count("LDGSTS"),
        "float_atomics": sum(bool(_FLOAT_ATOMIC_INSTRUCTION.match(i)) for i in instructions),
    }


def functions(binary: Path) -> dict[str, str]:
    """Return symbol -> disassembly for every kernel in a cubin, an object or a library."""
    _, *parts = _FUNCTION.split(_run(disassembler(), "-sass", binary))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
