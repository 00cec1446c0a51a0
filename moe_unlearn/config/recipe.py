"""Recipes, descriptions of unlearning runs as dataclasses that read and write YAML.

A recipe names a forget and a retain objective and switches the three levers on or off:

    loss = forget.gamma * L_forget + retain.alpha * L_retain            (open-unlearning's names)

    trace   gives some retain tokens more weight  (token weights in L_retain)
    wagle   chooses the weights that may change   (a mask over the update)
    mollm   finds a direction that serves every objective (replaces the weighted sum above)

With `dual`, alpha is a variable that keeps L_retain at a bound (`step.dual`).

Unknown keys, wrong types and values out of range raise ValueErrors that name the key in full and, for a
mistyped key, the nearest valid one.
"""

import dataclasses
import datetime
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from moe_unlearn.config.adapter import Adapter, bits_of
from moe_unlearn.config.dual import Dual
from moe_unlearn.config.files import composed
from moe_unlearn.config.optimizer import Optimizer
from moe_unlearn.config.router import Router
from moe_unlearn.config.trainer import check_trainer
from moe_unlearn.config.values import above, at_least, at_most, below, between, build, one_of
from moe_unlearn.config.wagle import Wagle

FORGET_OBJECTIVES = (
    "ga",
    "npo",
    "simnpo",
    "idk_dpo",
    "idk_nll",
    "rmu",
    "uce",
    "wga",
    "satimp",
    "ceu",
    "undial",
    "logit_margin",
    "level",
)
NEED_REFUSALS = ("idk_dpo", "idk_nll")
NEED_UNSEEN = ("level",)
#: forget objectives that compare the companions of forget rows with what these were at prepare()
COMPARE_COMPANIONS = ("idk_dpo", "level")
UNITS = ("token", "sequence")
REPLACEMENTS = ("refusal", "alternate")
RETAIN_OBJECTIVES = ("nll", "kl", "embed_diff", "none")
HOLDING = ("kl", "embed_diff")  # those that compare with the model at `prepare`, whatever it knows
REFERENCES = ("prepared", "base")
REFERENCE_DTYPES = ("bfloat16", "float8")
GRIDS = ("int8", "int4", "nf4")
SEAMS = ("joint", "separate")
SCOPES = ("all", "experts", "parameters", "seuf")


@dataclass(frozen=True, kw_only=True)
class Forget:
    """Objective on the forget rows, L_forget; `losses` has the formulas.

    `beta` belongs to NPO, SimNPO, DPO, WGA and UNDIAL, `delta` to SimNPO, `beta1` and `beta2` to SatImp. `layer` (the
    index of the decoder layer whose output is steered, at labelled tokens) and `steering` (c) belong to RMU. CE-U
    leaves out the first `ignore_first_n_answer_tokens` labelled tokens of a row that are predicted: of a text without a
    prompt, those after its first. `replacement` says what idk_dpo and idk_nll put in the answer's place: a "refusal"
    that is drawn, or the "alternate" answer of the row (AltPO). `unit`, `margin` and `hold` belong
    to level.
    """

    objective: str = "npo"  # the loss on forget rows; `losses` has the formulas
    gamma: float = 1.0  # factor of the forget loss in the sum of the losses
    beta: float = 0.1  # beta in the formulas of NPO, SimNPO, DPO, WGA and UNDIAL
    delta: float = 0.0  # SimNPO's margin
    beta1: float = 5.0  # SatImp's power of saturation
    beta2: float = 1.0  # SatImp's power of importance
    layer: int = 7  # index of the decoder layer whose output RMU steers
    steering: float = 2.0  # length of the vector that RMU steers to
    ignore_first_n_answer_tokens: int = 1  # labelled tokens at the head of a row that CE-U leaves alone
    replacement: str = "refusal"  # what idk_dpo and idk_nll have in the answer's place
    unit: str = "token"  # what level compares with unseen text: a token, or the mean over a sequence
    margin: float = 0.0  # how far from unseen text, in log-odds, level leaves it alone
    hold: float = 1.0  # factor of level's second loss, which keeps unseen text where it was

    def __post_init__(self) -> None:
        one_of("forget.objective", self.objective, FORGET_OBJECTIVES)
        one_of("forget.replacement", self.replacement, REPLACEMENTS)
        if self.replacement != "refusal" and self.objective not in NEED_REFUSALS:
            raise ValueError(
                f"forget.replacement {self.replacement!r} stands in the answer's place and needs forget.objective "
                f"{' or '.join(NEED_REFUSALS)}; got {self.objective!r}"
            )
        one_of("forget.unit", self.unit, UNITS)
        above("forget.beta", self.beta, 0)
        for name in ("beta1", "beta2", "ignore_first_n_answer_tokens", "margin", "hold"):
            at_least(f"forget.{name}", getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class Retain:
    """Objective on the retain rows, L_retain, a mean over the retain positions that carry a loss.

    `router_aux` times the load-balancing loss of the retain rows is added to it. It is "off", a number, or "auto" for
    the model's own coefficient where its config says `output_router_logits`; see `moe_unlearn.router_aux`.
    """

    objective: str = "nll"  # the loss on retain rows
    alpha: float = 1.0  # factor of the retain loss in the sum of the losses
    router_aux: str | float = "auto"  # factor of the load-balancing loss; auto: the model's own

    def __post_init__(self) -> None:
        one_of("retain.objective", self.objective, RETAIN_OBJECTIVES)
        if isinstance(self.router_aux, str):
            if self.router_aux not in ("auto", "off"):
                raise ValueError(f"retain.router_aux must be auto, off or a number; got {self.router_aux!r}")
            return
        at_least("retain.router_aux", self.router_aux, 0)
        if self.router_aux and self.objective not in ("nll", "kl"):
            raise ValueError(
                f"retain.router_aux is added to a retain loss of all layers and needs retain.objective 'nll' or 'kl'; "
                f"got {self.router_aux:g} with {self.objective!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Settings of lever 1, TRACE; see `moe_unlearn.trace`.

    It selects `per_layer` forget-critical experts in each layer and moves their weighted retain frequency a fraction
    `eta` of the way to their forget frequency.
    """

    per_layer: int = 2  # forget-critical experts of a layer, at most
    min_ratio: float = 1.5  # least forget frequency of one, over its retain frequency
    min_load: float = 1.0  # least forget frequency of one, over that of uniform routing
    eta: float = 0.5  # how far its retain frequency moves to its forget frequency
    cap: float | None = 10.0  # largest weight of a token; null: no limit
    refresh: str = "offline"  # token weights of the unchanged model, or of each step's own routing
    allow_empty: bool = False  # whether a run goes on where no expert is forget-critical

    def __post_init__(self) -> None:
        above("trace.per_layer", self.per_layer, 0)
        between("trace.eta", self.eta, 0, 1)
        one_of("trace.refresh", self.refresh, ("offline", "online"))
        if self.cap is not None:
            above("trace.cap", self.cap, 1)


@dataclass(frozen=True, kw_only=True)
class Mollm:
    """Settings of lever 3, MOLLM; see `moe_unlearn.mollm`.

    It takes the common descent direction of forget, KL and retain losses. KL counts only where its value exceeds
    `kl_floor` times the value measured at the unchanged model. `gradients` of expert weights are kept "compact", as
    "factors" (less memory for long weights and few rows, but gradients are computed twice), or "auto", in the smaller
    form. The update's inner product with each gradient is logged at every step of plain SGD in float32, otherwise every
    `log_descent_every` steps if all gradients are whole.
    """

    normalize: str = "mean_norm"  # the length that gradients have before the direction is solved
    rescale: str = "mean_gradient"  # the length that the direction gets
    kl: bool = True  # whether KL to the reference is the third objective
    kl_floor: float = 10.0  # KL counts above this times its value at the unchanged model
    log_descent_every: int = 10  # steps between measurements of g . update
    gradients: str = "auto"  # the form of expert gradients; auto: the smaller one

    def __post_init__(self) -> None:
        one_of("mollm.normalize", self.normalize, ("none", "unit", "mean_norm"))
        one_of("mollm.rescale", self.rescale, ("none", "mean_gradient"))
        one_of("mollm.gradients", self.gradients, ("auto", "compact", "factors"))
        above("mollm.log_descent_every", self.log_descent_every, 0)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Parameters that may train: `all` that require a gradient; the `experts` that TRACE selected; the
    `parameters` that match a regular expression; or `seuf`, the one expert with the highest affinity and
    its router, held in place by `anchor` times the anchor loss (SEUF, ACL 2025)."""

    kind: str = "all"  # what may train; experts: those that TRACE selects
    parameters: list[str] = field(default_factory=list)  # with kind parameters: regular expressions
    anchor: float = 1.0  # with kind seuf: the factor of the anchor loss

    def __post_init__(self) -> None:
        one_of("scope.kind", self.kind, SCOPES)
        if (self.kind == "parameters") != bool(self.parameters):
            raise ValueError(
                "scope.parameters (a list of regular expressions) goes with scope.kind 'parameters'; "
                f"got kind {self.kind!r} and parameters {self.parameters}"
            )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Sources of the model (a folder) and the documents for the command line.

    Documents are named as `data.load` takes them, from `builtin:pydoc` to `tofu:forget05`. With `chat_template`
    questions are asked through the tokenizer's chat template, rendered with `enable_thinking`, `system` and `date`
    (2026-11-29) as `data.Chat` says. `prompt_tokens`, if not 0, is the number of tokens at the head of each row of a
    forget, unseen or holdout text that are its prompt. `retain_eval` is what the report measures utility on: a share of
    the retain documents, which are taken out of the retain set (`data.hold_out`; 0: none), or a source of its own.
    `unseen` documents, which `level` steers by, belong to no other set, since their losses are trained on. `earlier`
    names what former requests forgot: its rows join the retain rows, and a retain loss that compares with the model the
    request starts from holds them as they are. `seam` says how a prompt and its answer are told apart: "joint", or
    "separate" as in open-unlearning (`data.seams`). If there are more examples than `forget_rows` or `retain_rows`,
    that many are drawn; a plan without documents assumes these numbers. `sampled` texts of the model's own (see
    `runs.own_texts`) join the retain rows and protect what these do not show. `packing` lets the rows of a micro-batch
    share rows of up to `max_length` tokens in the model's calls, whose padding it saves; no number changes but by
    rounding.
    """

    model: str | None = None  # folder of the model
    forget: str | None = None  # source of the documents to forget, see the package data
    retain: str | None = None  # source of the documents to keep
    retain_eval: str | float = 0.1  # rows held out of training to measure utility on: a share of retain, or a source
    unseen: str | None = None  # source of documents that the model never saw, to whose level `level` goes
    holdout: str | None = None  # source of documents that the model never saw, for PrivLeak
    earlier: list[str] = field(default_factory=list)  # sources of what earlier requests forgot, held as it is
    reference: str | None = None  # folder of a retrained model, for PrivLeak
    max_length: int = 512  # tokens of a row, at most
    packing: bool = False  # whether the model is called with several rows in one, of `max_length` tokens at most
    chat_template: bool = False  # whether questions go through the tokenizer's chat template
    enable_thinking: bool | None = None  # what the chat template is told
    system: str = ""  # the chat template's system message
    date: str | None = None  # the chat template's today; null: the same day always
    prompt_tokens: int = 0  # tokens at the head of a row of text that are its prompt
    seam: str = "joint"  # how prompt and answer are told apart
    forget_rows: int | None = None  # rows drawn of more; a plan without documents assumes them
    retain_rows: int | None = None  # rows drawn of more; a plan without documents assumes them
    sampled: int = 0  # texts that the model itself writes before the first step, which join the retain rows

    def __post_init__(self) -> None:
        above("data.max_length", self.max_length, 1)
        for name in ("model", "forget", "retain", "retain_eval", "unseen", "holdout", "reference"):
            if getattr(self, name) == "":
                raise ValueError(f"data.{name} is empty, which is no source: name one, or leave the key out")
        if "" in self.earlier:
            raise ValueError("data.earlier has an empty source: name one, or leave it out")
        if not isinstance(self.retain_eval, str):
            at_least("data.retain_eval", self.retain_eval, 0)
            below("data.retain_eval", self.retain_eval, 1)
        one_of("data.seam", self.seam, SEAMS)
        for name in ("enable_thinking", "system", "date"):
            if getattr(self, name) not in (None, "") and not self.chat_template:
                raise ValueError(f"data.{name} is for a chat template and needs data.chat_template=true")
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"data.date must be a date as 2026-11-29; got {self.date!r}") from None
        if not 0 <= self.prompt_tokens < self.max_length:
            bounds = f"at least 0 and below data.max_length {self.max_length}"
            raise ValueError(f"data.prompt_tokens must be {bounds}; got {self.prompt_tokens}")
        for name in ("forget_rows", "retain_rows"):
            if getattr(self, name) is not None:
                above(f"data.{name}", getattr(self, name), 0)
        at_least("data.sampled", self.sampled, 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One unlearning run; see the module docstring. A lever that is None is off."""

    name: str = "custom"  # what reports call the run
    forget: Forget = field(default_factory=Forget)
    retain: Retain = field(default_factory=Retain)
    trace: Trace | None = None
    wagle: Wagle | None = None
    mollm: Mollm | None = None
    dual: Dual | None = None
    adapter: Adapter | None = None
    scope: Scope = field(default_factory=Scope)
    router: Router = field(default_factory=Router)
    optimizer: Optimizer = field(default_factory=Optimizer)
    data: Data = field(default_factory=Data)
    trainer: dict = field(default_factory=dict)  # further TrainingArguments of transformers: trackers, schedule, ...
    steps: int = 60  # updates
    batch_size: int = 8  # forget rows of a micro-batch
    retain_per_forget: float = 1.0  # retain rows for each of them
    accumulate: int = 1  # micro-batches of a step
    stop_forget_loss: float | None = None  # the first step that sees a forget loss this low is the last
    reference: str = "prepared"  # what losses compare with: the model at prepare(), adapters included; base: without
    reference_dtype: str = "bfloat16"  # of its hidden states in caches (KL, UNDIAL); float8: half the bytes
    retain_budget: float | None = None  # a retain loss above it ends the run before the step's update
    guard: str = "strict"  # whether gradients are known before the first update, see `step`
    survive: str | None = None  # the grid that deployment rounds to: int8, int4 or nf4; null: weights stay as trained
    checkpointing: str = "auto"  # whether activations are computed anew; auto: with rounded weights or a small GPU
    seed: int = 0  # what decides the order of rows, draws, RMU's vector and stochastic rounding

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            above(name, getattr(self, name), 0)
            at_most(name, getattr(self, name), 2**31 - 1)
        at_least("seed", self.seed, 0)
        at_most("seed", self.seed, 2**32 - 1)  # NumPy's bound
        at_least("retain_per_forget", self.retain_per_forget, 1)
        at_most("retain_per_forget", self.retain_per_forget, 1e3)
        one_of("guard", self.guard, ("strict", "loss"))
        one_of("reference", self.reference, REFERENCES)
        one_of("reference_dtype", self.reference_dtype, REFERENCE_DTYPES)
        if self.survive is not None:
            one_of("survive", self.survive, GRIDS)
        one_of("checkpointing", self.checkpointing, ("auto", "on", "off"))
        check_trainer(self.trainer, self.optimizer.warmup_steps)
        if self.trace is not None and self.retain.objective not in ("nll", "kl"):
            raise ValueError(
                f"trace weighs retain tokens and needs retain.objective 'nll' or 'kl'; got {self.retain.objective!r}: "
                "retain.objective=nll or trace=null"
            )
        if self.data.unseen is not None and self.forget.objective not in NEED_UNSEEN:
            raise ValueError(
                f"data.unseen is for forget.objective {' or '.join(NEED_UNSEEN)}, and no other reads it; got "
                f"{self.forget.objective!r}: leave it out, or give it as data.holdout to measure by it"
            )
        if self.dual is not None:
            if self.mollm is not None:
                raise ValueError("dual weighs the retain loss in a sum that mollm replaces: mollm=null or dual=null")
            if self.retain.objective == "none":
                raise ValueError(
                    "dual bounds the retain loss and needs a retain.objective; got 'none': retain.objective=nll or "
                    "dual=null"
                )
            at_least("retain.alpha, where dual starts,", self.retain.alpha, 0)
        if self.data.earlier and (self.retain.objective not in HOLDING or self.reference != "prepared"):
            raise ValueError(
                "data.earlier is held as the model at the start of this request has it and needs retain.objective 'kl' "
                "or 'embed_diff' and reference 'prepared', since 'nll' and a base model would teach it again; got "
                f"{self.retain.objective!r} and {self.reference!r}: retain.objective=kl reference=prepared"
            )
        if self.scope.kind == "experts" and self.trace is None:
            raise ValueError(
                "scope.kind 'experts' trains the experts TRACE selects and needs trace: trace=true or scope.kind=all"
            )
        if self.adapter is not None and self.scope.kind in ("experts", "seuf"):
            raise ValueError(
                f"adapter trains adapters alone, and scope.kind {self.scope.kind!r} weights under them: adapter=null, "
                "or scope.kind=all"
            )
        if (bits := bits_of(self.adapter)) is not None and self.wagle is not None:
            raise ValueError(
                f"wagle scores whole weights, and adapter.bits={bits} rounds them: wagle=null, or adapter.bits=null"
            )
        if self.retain.objective == "embed_diff" and self.forget.objective != "rmu":
            raise ValueError(
                "retain.objective 'embed_diff' is RMU's and needs forget.objective 'rmu': set both, or "
                "retain.objective=nll"
            )
        if self.retain.objective == "embed_diff" and self.mollm is not None and self.mollm.kl:
            raise ValueError("mollm.kl compares final hidden states, where RMU's forward does not go: mollm.kl=false")

    @property
    def recomputes(self) -> bool:
        """Return whether activations are computed anew whatever the device: asked for, or with rounded weights."""
        return self.checkpointing == "on" or (self.checkpointing == "auto" and bits_of(self.adapter) is not None)

    @classmethod
    def of(cls, given: "Recipe | typing.Mapping[str, typing.Any] | str | Path") -> "Recipe":
        """Return a recipe as it is, build it from mappings, or load it by path or name; TypeError for another kind."""
        if isinstance(given, Recipe):
            return given
        if isinstance(given, typing.Mapping):
            return cls.from_dict(dict(given))
        if not isinstance(given, str | Path):
            raise TypeError(
                "recipe: expected a Recipe, a mapping of its keys, a YAML file or the name of a shipped recipe; got "
                f"{type(given).__name__}"
            )
        return cls.load(given)

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """Build a recipe from nested dictionaries, such as those read from YAML."""
        return build(cls, values)

    @classmethod
    def load(cls, source: str | Path, overrides: typing.Sequence[str] = (), *, model: str | None = None) -> "Recipe":
        """Read a YAML file, or the shipped recipe of that name, and apply overrides like `trace.eta=0.7`.

        An override of a lever that is off switches it on; `mollm=null` switches it off. `model`, a name in
        `models()`, first applies the values of this recipe for that model (such as RMU's layers and steering). A file
        that `extends` another one changes what that one says (`config.files`).
        """
        return cls.from_dict(composed(source, overrides, model=model).values)

    def to_dict(self) -> dict:
        """Return the recipe as nested plain dictionaries, from which `from_dict` makes an equal recipe."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return the recipe as YAML text."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))
