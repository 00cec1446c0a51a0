"""Define the published expert layers that are measured, and narrow copies of them for a CPU.

A copy divides the widths and keeps the number of experts and the top-k, so its routing and its rows per expert are
those of the model. Sources: the checkpoints' configurations on the hub.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from moe_unlearn import testing


@dataclass(frozen=True)
class Geometry:
    """Hidden and intermediate width, number of experts, experts per token and vocabulary of one model."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    vocabulary: int
    # biases, a clamped SwiGLU with gate and up interleaved, weights transposed
    gpt_oss: bool = False

    @property
    def expert_weights(self) -> int:
        """Return the elements of one expert's matrices: gate, up and down."""
        return 3 * self.hidden * self.inner

    def layer(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Return the sizes of a layer: tokens, routed rows, both widths and the number of experts."""
        return tokens, tokens * self.top_k, self.hidden, self.inner, self.experts

    def narrow(self, factor: int) -> "Geometry":
        """Return the geometry with both widths divided by `factor`."""
        return replace(self, name=f"{self.name} / {factor}", hidden=self.hidden // factor, inner=self.inner // factor)


QWEN3 = Geometry("Qwen3-30B-A3B", 2048, 768, 128, 8, 151_936)
OLMOE = Geometry("OLMoE-1B-7B", 2048, 1024, 64, 8, 50_304)
DEEPSEEK = Geometry("DeepSeek-V2-Lite", 2048, 1408, 64, 6, 102_400)
GATE = (QWEN3, OLMOE, DEEPSEEK)
REPORT = (
    Geometry("Qwen1.5-MoE-A2.7B", 2048, 1408, 60, 4, 151_936),
    Geometry("gpt-oss-20b", 2880, 2880, 32, 4, 201_088, gpt_oss=True),
    Geometry("Mixtral-8x7B", 4096, 14336, 8, 2, 32_000),
)
# unlearning batches are small, and for small batches the weights dominate the traffic
GPU_TOKENS = (256, 512, 2048, 8192, 32768)
CPU_TOKENS = (256, 1024)
# a routing's name in reports, and its name among the patterns of the tests
ROUTINGS = {"uniform": "uniform", "Zipf": "skewed", "one expert": "one_expert", "half empty": "half_empty"}


def routing(name: str, tokens: int, geometry: Geometry) -> Tensor:
    """Return top_k_index [T, K] for a name of ROUTINGS."""
    return testing.routing(ROUTINGS[name], tokens, geometry.experts, geometry.top_k)
