"""The section `router` of a recipe, which says whether and how routers may move."""

from dataclasses import dataclass

from moe_unlearn.config.values import one_of

MODES = ("free", "frozen")


@dataclass(frozen=True, kw_only=True)
class Router:
    """What may become of the routers; `router: frozen` is short for `router: {mode: frozen}`.

    Routers that are `free` train as every other weight of the scope does. `frozen` ones are in no scope: no objective,
    direction, mask or decay moves them.
    """

    shorthand = "mode"

    mode: str = "free"  # whether routers train as other weights do, or not at all

    def __post_init__(self) -> None:
        one_of("router.mode", self.mode, MODES)
