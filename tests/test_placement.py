"""A fused step makes its tensors on the device of its operands, and its kernels go to that device's current stream.

A tensor made without a device lies on the host, and a copy of it to a GPU waits for whatever is queued there. No GPU
is needed to see either: both stand in the sources.
"""

import ast
import re

import pytest

from tests.static.ledger import ROOT
from tests.support.sources import sources_of_the_step

pytestmark = pytest.mark.quick
# they make a tensor on the host unless they are told a device
FACTORIES = {"tensor", "as_tensor", "asarray", "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand",
             "randn", "randint", "randperm", "empty_strided", "from_numpy", "frombuffer", "scalar_tensor"}  # fmt: skip
# where a step or what prepares it makes a tensor on the host, how many, and why; any other is a fault
ON_THE_HOST = {
    "GradientStore.common_descent": (1, "MOLLM solves for its direction on the CPU"),
    "fit_state": (1, "the count of steps is on the CPU, as torch's is"),
    "at_home": (1, "once for each parameter whose state lies on the host"),
    "loaded": (2, "the count of steps is on the CPU, as torch's is"),
    "stack": (1, "numbers of rows, on the CPU"),
    "padded": (1, "where examples of packed rows begin, on the CPU"),
    "_from_offsets": (1, "where examples of packed rows begin, on the CPU"),
    "control_vector": (1, "once for each model: the same numbers on every device"),
    "Ranks.sums": (1, "numbers that are on the CPU"),
    "Ranks.add_": (1, "which ranks have a gradient, known on the CPU"),
    "gather": (1, "values of ranks, which are on the CPU"),
    "RowCache.state_dict": (1, "what is cached of a row is on the CPU"),
    "StoredRow.read": (2, "a row that is on disk is read on the CPU"),
}
# of the CUDA runtime: they allocate, copy by way of the host, wait, or make a stream of their own
FORBIDDEN = re.compile(r"cuda(?:Malloc|Free|Host|Memcpy|Memset|StreamCreate|StreamSynchronize|DeviceSynchronize|Event)")
# what our Python may ask torch.cuda for, in an op
ASKED = {"get_device_capability", "get_device_properties"}


def host_allocations(tree: ast.AST):
    """(qualified name of the function, call) of every tensor that is made without a device."""

    def walk(node, path):
        path = (*path, node.name) if isinstance(node, ast.FunctionDef | ast.ClassDef) else path
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = {keyword.arg for keyword in node.keywords}
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            moved = node.func.attr == "pin_memory"
            if moved or of_torch and node.func.attr in FACTORIES and not given & {"device", None}:
                yield ".".join(path), ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, path)

    return walk(tree, ())


def test_every_tensor_on_the_host_is_listed_and_nothing_else():
    found: dict[str, list[str]] = {}
    for path in sources_of_the_step():
        for place, call in host_allocations(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(place, []).append(f"{path.name}: {place}: {call}")
    wrong = [lines for place, lines in found.items() if len(lines) != ON_THE_HOST.get(place, (0,))[0]]
    assert not wrong, "\n".join(line for lines in wrong for line in lines)
    assert found.keys() == ON_THE_HOST.keys()


def test_what_is_seen_in_python_sources():
    source = """
class A:
    def made(self, x, where):
        torch.zeros(3), torch.zeros(3, device=x.device), torch.zeros_like(x), x.new_zeros(3), x.pin_memory()
        return torch.tensor(3.0, **where), numpy.zeros(3)
"""
    found = list(host_allocations(ast.parse(source)))
    assert found == [("A.made", "torch.zeros(3)"), ("A.made", "x.pin_memory()")]


def cuda_faults(text: str) -> list[str]:
    """A line for each thing in a CUDA source that does not go to the current stream of the operands' device."""
    found = [f"{match[0]} is called" for match in FORBIDDEN.finditer(text)]
    found += ["a launch that names no stream"] * text.count("<<<")
    found += ["a launch whose stream is not set"] * (
        text.count("cudaLaunchKernelEx(") - text.count("config.stream = stream;")
    )
    for name in re.findall(r"TORCH_BOX\(&moe_unlearn::(\w+)\)", text):
        start = re.search(rf"^\w[\w:<>, ]* {name}\(", text, re.MULTILINE)
        body = text[start.start() : text.index("\n}\n", start.start())] if start else ""
        if not ("OnDevice device(" in body and "device.stream()" in body):
            found.append(f"{name} does not ask for the current stream")
    return found


def test_every_cuda_kernel_goes_to_the_current_stream():
    sources = [*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "csrc" / "cuda").glob("*.cuh")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in sources}
    assert sum(text.count("TORCH_BOX") for text in texts.values()) >= 10
    assert sum(text.count("cudaLaunchKernelEx(") for text in texts.values()) == 1
    assert not {name: faults for name, text in texts.items() if (faults := cuda_faults(text))}


@pytest.mark.parametrize(
    "old,new,fault",
    [
        ("const OnDevice device(out);", "", "expert_wgrad_ does not ask for the current stream"),
        ("  check_support(", "  cudaDeviceSynchronize();\n  check_support(", "cudaDeviceSynchronize is called"),
        ("  check_support(", "  kernel<<<1, 1>>>();\n  check_support(", "a launch that names no stream"),
    ],
)
def test_a_kernel_that_goes_elsewhere_is_seen(old, new, fault):
    text = (ROOT / "csrc" / "cuda" / "expert_wgrad.cu").read_text(encoding="utf-8")
    assert cuda_faults(text) == [] and fault in cuda_faults(text.replace(old, new))


def test_no_op_chooses_a_device_or_a_stream():
    """`backend.resolve` makes the operands' device current; a launcher in Triton takes that device's stream."""
    folders = ROOT / "triton_kernels", ROOT / "moe_unlearn" / "ops"
    texts = {path: path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")}
    found = {(path.name, name) for path, text in texts.items() for name in re.findall(r"torch\.cuda\.(\w+)", text)}
    assert {name for _, name in found} == ASKED, found
    assert not [path for path, text in texts.items() if "torch.accelerator" in text or "driver.active" in text]
