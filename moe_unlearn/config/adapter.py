"""The section `adapter` of a recipe, which trains low-rank adapters beside frozen weights."""

from dataclasses import dataclass

from moe_unlearn.config.values import above, at_least, at_most, one_of

WIDTHS = (8, 4)
TARGETS = ("attention", "experts", "all")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Settings of LoRA adapters, which alone train; see `model.adapters`.

    A layer W [out, in] under an adapter computes W x + (alpha / r) B A x with A [r, in] and B [out, r]; each expert has
    its own pair. `targets` are the linear layers of "attention", the weights of the routed "experts", or "all" of
    these. `dropout` is that of x before A, which adapters of experts have not. With `merge` the run saves whole
    weights W + (alpha / r) B A in place of an adapter. With `bits` the frozen weights of linear layers and experts are
    rounded to that width when they are loaded (`model.quantised`), so that they cannot be merged.
    """

    r: int = 8  # rank of an adapter
    alpha: int = 16  # an adapter's product counts alpha / r times
    targets: str = "attention"  # the layers that get an adapter
    dropout: float = 0.0  # share of an adapter's input that is dropped in training
    merge: bool = False  # whether the run saves whole weights, with the adapter added to them
    bits: int | None = None  # width of the frozen weights, 8 (torchao) or 4 (bitsandbytes); null: as they are stored

    def __post_init__(self) -> None:
        above("adapter.r", self.r, 0)
        above("adapter.alpha", self.alpha, 0)
        one_of("adapter.targets", self.targets, TARGETS)
        at_least("adapter.dropout", self.dropout, 0)
        at_most("adapter.dropout", self.dropout, 0.9)
        if self.bits is not None:
            one_of("adapter.bits", self.bits, WIDTHS)
        if self.bits is not None and self.merge:
            raise ValueError(
                f"adapter.merge adds the adapter to whole weights, and adapter.bits={self.bits} rounds them: "
                "adapter.merge=false, and merge the adapter into the model that is not rounded afterwards"
            )
        if self.dropout and self.targets != "attention":
            raise ValueError(
                f"adapter.dropout is for adapter.targets 'attention'; got {self.dropout:g} with {self.targets!r}, "
                "since an expert's adapter has none: adapter.dropout=0"
            )


def bits_of(adapter: Adapter | None) -> int | None:
    """Return the width to which the frozen weights are rounded, None where they stay whole."""
    return None if adapter is None else adapter.bits
