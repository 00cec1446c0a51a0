"""What a compiled kernel costs and which instructions it is made of, read from its machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_ATOMIC = re.compile(r"^.*\b(?:tt\.atomic_rmw|tt\.atomic_cas|tt\.descriptor_reduce)\b.*$", re.MULTILINE)
_FLOAT_ATOMIC = re.compile(r"atomic_rmw fadd|descriptor_reduce add\b.*x(?:f16|bf16|f32)>")
_FLOAT_ATOMIC_INSTRUCTION = re.compile(r"(?:RED|ATOM)\w*\..*\.(?:F16|BF16|F32|F64)")


@dataclass(frozen=True)
class Figures:
    """`spills` counts loads and stores of local memory; `atomics` is what the kernel asks for, of any type.

    The other counts are instructions. The compiler's own atomics (descriptors, tensor memory) do not count.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    tensor_memory: int
    hgmma: int
    hmma: int
    utcmma: int
    tma: int
    cp_async: int
    atomics: int
    float_atomics: int


def read(cubin: bytes, ttir: str, shared_bytes: int, tensor_memory: int, tools: Path) -> Figures:
    """Figures of one kernel; `tools` is the folder of cuobjdump and nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", "-ndf", file.name)
    return parse(resources, code, ttir, shared_bytes, tensor_memory)


def parse(resources: str, code: str, ttir: str, shared_bytes: int, tensor_memory: int) -> Figures:
    registers, stack = map(int, _RESOURCES.search(resources).groups())
    instructions = _INSTRUCTION.findall(code)
    if not instructions:
        raise ValueError("no instruction found in the disassembly")

    def count(*starts: str) -> int:
        return sum(i.partition(".")[0] in starts for i in instructions)

    atomics = _ATOMIC.findall(ttir)
    # in either form: a float addition may become a compare-and-swap loop or a bulk reduction in machine code
    float_atomics = max(
        sum(bool(_FLOAT_ATOMIC.search(line)) for line in atomics),
        sum(bool(_FLOAT_ATOMIC_INSTRUCTION.match(i)) for i in instructions),
    )
    return Figures(
        registers=registers,
        stack_bytes=stack,
        spills=count("LDL", "STL"),
        shared_bytes=shared_bytes,
        tensor_memory=tensor_memory,
        hgmma=count("HGMMA"),
        hmma=count("HMMA"),
        utcmma=sum(bool(re.match(r"UTC\w*MMA", i)) for i in instructions),
        tma=count("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP"),
        cp_async=count("LDGSTS"),
        atomics=len(atomics),
        float_atomics=float_atomics,
    )


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
