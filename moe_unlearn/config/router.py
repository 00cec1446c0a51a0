"""The section `router` of a recipe, which says whether and how routers may move."""

from dataclasses import dataclass

from moe_unlearn.config.values import above, at_least, between, one_of

MODES = ("free", "frozen", "invariant")


@dataclass(frozen=True, kw_only=True)
class Router:
    """What may become of the routers; `router: frozen` is short for `router: {mode: frozen}`.

    Routers that are `free` train as every other weight of the scope does. `frozen` ones are in no scope: no objective,
    direction, mask or decay moves them. `invariant` ones move where that changes no choice of retain inputs; see
    `moe_unlearn.routers.kept`.
    """

    shorthand = "mode"

    mode: str = "free"  # whether routers train as other weights do, not at all, or where retain inputs do not see it
    energy: float = 0.99  # invariant: share of the retain inputs' squares that an expert's kept directions hold
    rank: int = 64  # invariant: kept directions of an expert, at most
    margin: float = 0.1  # invariant: the share that stays of the gap by which an expert was not chosen
    margin_inputs: int = 256  # invariant: retain inputs of a layer, those nearest to a tie, whose gaps are watched
    stability_every: int = 0  # steps between measurements of the retain tokens that keep their experts; 0: none
    refresh_below: float | None = None  # invariant: what is kept is found anew where that share is lower
    correct: bool = False  # whether routers are moved once after the last step, to give retain tokens their logits back
    ridge: float = 1e-6  # with correct: how much a move of the weights counts beside the logits

    def __post_init__(self) -> None:
        one_of("router.mode", self.mode, MODES)
        between("router.energy", self.energy, 0, 1)
        above("router.rank", self.rank, 0)
        between("router.margin", self.margin, 0, 1)
        at_least("router.margin_inputs", self.margin_inputs, 0)
        at_least("router.stability_every", self.stability_every, 0)
        above("router.ridge", self.ridge, 0)
        if self.correct and self.mode == "frozen":
            raise ValueError("router.correct moves routers after the last step, which router.mode frozen forbids")
        if self.refresh_below is not None:
            between("router.refresh_below", self.refresh_below, 0, 1)
            if self.mode != "invariant" or not self.stability_every:
                raise ValueError(
                    "router.refresh_below finds anew what invariant routers keep and needs router.mode invariant and "
                    f"router.stability_every above 0; got {self.mode!r} and {self.stability_every}"
                )
