"""open-unlearning's methods for Mixture-of-Experts models, with its constructor arguments and batches, on this engine.

    loss = gamma * L_forget + alpha * L_retain          retain_loss_type: NLL, KL; RMU also EMBED_DIFF

In a checkout of open-unlearning that runs on transformers 5, add to the end of `src/trainer/__init__.py`

    from moe_unlearn.integrations import open_unlearning
    open_unlearning.register(TRAINER_REGISTRY)

and copy the YAML files of `config_folder()` into `configs/trainer/`; then write `trainer=MoENPO` in place of
`trainer=NPO`. transformers 5.23 no longer has the argument `logging_dir`, which `configs/trainer/finetune.yaml` sets;
`~trainer.args.logging_dir` removes it, for open-unlearning's trainers and for these. Beside the method's own arguments,
`method_args` takes the sections `trace`, `wagle`, `mollm`, `dual` and `scope` of a recipe (`config`), `cache_dir` and
`verify`: `'+trainer.method_args.trace={per_layer:2,eta:0.5}'`. Without open-unlearning the classes are Trainers like
any other. They take a dataset with `forget` and `retain` lists whose items are {"forget": row, "retain": row}, each row
{input_ids, attention_mask, labels}; for DPO the forget side is {"original": row, "alternate": row}.

On one batch GradAscent, GradDiff with NLL, NPO, SimNPO, DPO, WGA, SatImp, CEU and PDU give open-unlearning's loss, and
RMU does for sequences of equal length. The differences are listed below, where "there" means in open-unlearning:

    KL              The mean is over the positions that carry a loss; there over all, prompt and padding too.
    UNDIAL          The mean is over the positions that carry a loss, with reference states in bfloat16; there over all,
                    prompt and padding too, where the label -100 lowers the logit of the vocabulary's hundredth token
                    from last.
    masked tokens   The collator there masks every pad token, also an eos token if that is used for padding. The token
                    after a masked one is predicted by no token, so it carries no loss, and RMU neither steers nor keeps
                    its state; there both count.
    SimNPO          The length is the number of predicted tokens; there a label at position 0, which no token predicts,
                    counts too: a factor (n - 1) / n. Its own datasets never label that position.
    first labels    A label at position 0, which no token predicts, means nothing: RMU leaves its token out, and CEU's
                    first tokens are the first predicted ones. There it counts; its own datasets never label it.
    RMU             The divisor is the arithmetic mean of the rows' numbers of labelled tokens (a mean over the batch's
                    tokens); there, through a broadcast, it is their harmonic mean, so the loss is larger by the ratio
                    of the two. The control vector comes from `seed`, there from the global random state.
    reference       Log-probs and hidden states are computed once and cached (hidden states in bfloat16); there a
                    second copy of the model computes them. So every row of `forget` and `retain` must be the same when
                    it comes again; for DPO a row's alternate is drawn once, by a seed, there anew each time (IdkDPO).
    loss            It is computed in float32 without logits.
    router loss     Where the config has output_router_logits, the load-balancing loss is added to the retain loss, NLL
                    or KL; there to every NLL, that of forget rows with GradAscent's sign, and not to KL.
    optimizer       It is MaskedAdamW with the arguments' lr, betas, eps and weight decay; `optim` is ignored. Every
                    trained parameter decays; there norms and biases do not.
    accumulation    Micro-batches and ranks are weighed by their tokens or sequences, so that the step equals that of
                    all its rows in one batch; there each weighs the same.
    PDU             The retain preference moves once per step, by the retain loss of all its rows; there at each
                    micro-batch and each evaluation. It is kept in checkpoints; there a resume begins with alpha.
                    Without primal_dual nothing is subtracted from the loss; there alpha * retain_loss_eps is.
    clipping        It uses the gradient norm of the trained parameters; there, for RMU, that of all, trained or not.
    RMU's modules   Patterns must match as a whole, as there. Its YAML trains every parameter and its class
                    `mlp.down_proj.weight`, a name that no fused expert has; here the experts of layers 5 to 7 train.
    processes       There is one process.

No single version was at hand, so these files were put together to be read and run against: of locuslab/open-unlearning
src/train.py, data/unlearn.py and trainer/utils.py at 19a6141, data/__init__.py at 87a31a8, data/utils.py at 10eb1c9,
data/qa.py at 817e5c9, trainer/unlearn/{grad_diff at 7fa0b55, npo and simnpo at 56b662e, rmu at afcd6b6, grad_ascent at
a50f1e2}.py, configs/trainer/finetune.yaml at f7656c7; of filyp/open-unlearning, whose author moved it to transformers
4.51, trainer/base.py at f1d2572, trainer/__init__.py at 4cfbf48 and the YAML files of GradDiff and NPO at 42e9f5f; of
other copies data/collators.py (zigozk at cb2cdfc), data/pretraining.py (chengjiali at 06cc5ad) and the YAML files of
SimNPO (zgoel317 at 37b02f2) and RMU (Dornavineeth at e30348f), all in open-unlearning. Debugging, sweeper and SuperLoss
parts, deepspeed, chat templates and its evaluators were left out, data configs were our own, and methods that a version
names `compute_unlearn_loss` or `compute_loss_normal` took the present name, `compute_loss`. These files of its
trainer/unlearn were read and written out in a test, but not run: dpo.py at afcd6b6, wga.py and satimp.py at 0ad76a2,
ceu.py at 2231e31, undial.py at 5a7dfb4, pdu.py at fdeb28f.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from moe_unlearn.config import Recipe
from moe_unlearn.data import pad_token_id
from moe_unlearn.integrations.open_unlearning.rows import Collator, Drawn
from moe_unlearn.model.batches import ROW, checked
from moe_unlearn.model.states import decoder_layers
from moe_unlearn.trainer import UnlearnTrainer

PREFIX = "MoE"
_RETAIN = {"NLL": "nll", "KL": "kl", "EMBED_DIFF": "embed_diff"}


class _Method(UnlearnTrainer):
    """Trainer of a recipe made from `forget`, `retain` and the levers, with the loop of the TrainingArguments.

    Args:
        model, args, train_dataset, eval_dataset, data_collator, tokenizer, evaluators, template_args: as
            open-unlearning's `load_trainer` passes them. Without a collator rows are padded on the right.
        trace, wagle, mollm, dual, scope: sections of a recipe.
        cache_dir, verify: as in `UnlearnTrainer`.

    Raises ValueError as `UnlearnTrainer` and `Recipe.from_dict` do.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        forget: dict,
        retain: dict,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        data_collator: Callable | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        evaluators: Mapping | None = None,
        template_args: Mapping | None = None,
        trace: Mapping | None = None,
        wagle: Mapping | None = None,
        mollm: Mapping | None = None,
        dual: Mapping | None = None,
        scope: Mapping | None = None,
        **keywords: Any,
    ):
        self.evaluators, self.template_args = evaluators, template_args
        tokenizer = processing_class if tokenizer is None else tokenizer
        sections = {"trace": trace, "wagle": wagle, "mollm": mollm, "dual": dual, "scope": scope}
        recipe = Recipe.from_dict(
            {
                "name": f"{PREFIX}{type(self).__name__}",
                "forget": forget,
                "retain": retain,
                "optimizer": {
                    "lr": float(args.learning_rate),
                    "betas": [args.adam_beta1, args.adam_beta2],
                    "eps": args.adam_epsilon,
                    "weight_decay": args.weight_decay,
                },
                "seed": args.seed,
                **{name: _plain(section) for name, section in sections.items() if section is not None},
            }
        )
        super().__init__(
            model,
            args,
            recipe,
            train_dataset,
            # the Trainer demands an eval_dataset unless eval_strategy is "no", but evaluators bring their own data
            eval_dataset=() if eval_dataset is None and evaluators else eval_dataset,
            data_collator=data_collator or Collator(0 if tokenizer is None else pad_token_id(tokenizer)),
            processing_class=tokenizer,
            **keywords,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute gamma * L_forget + alpha * (L_retain - the bound of `dual`) of one batch.

        With `return_outputs` also returns the forget rows' outputs. Training takes `training_step` instead. Raises
        NotPreparedError before `prepare()` if a reference, token weights or the like are needed.
        """
        inputs = self._prepare_inputs(inputs)
        objectives = self.unlearn_step.objectives
        forget, retain = checked(inputs["forget"], "forget"), checked(inputs["retain"], "retain")
        loss: Any = objectives.weighed(objectives(forget, retain))
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{key: forget[key] for key in ROW if key in forget})

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        trial: Any = None,
    ) -> dict[str, float]:
        """Run open-unlearning's evaluators, if given, into `checkpoint-STEP/evals`; else the Trainer's evaluation."""
        if not self.evaluators:
            if eval_dataset is None and self.eval_dataset is None:
                return {}
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", "evals")
        folder.mkdir(parents=True, exist_ok=True)
        metrics: dict[str, float] = {}
        for evaluator in self.evaluators.values():
            metrics |= evaluator.evaluate(
                output_dir=str(folder),
                template_args=self.template_args,
                model=self.model,
                tokenizer=self.processing_class,
            )
        self.log(dict(metrics))  # a copy, because log adds entries to it
        return metrics

    def _item(self, side: str, index: int) -> object:
        return getattr(self.train_dataset, side)[index]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        sides = [side for side in ("forget", "retain") if isinstance(inputs.get(side), Mapping)]
        return {**inputs, **{side: self._rows(inputs[side]) for side in sides}}

    def _rows(self, batch: Mapping) -> dict[str, torch.Tensor]:
        """Return a batch without the row names that only open-unlearning reads, which may repeat between datasets."""
        names = ("index", getattr(self.data_collator, "index", None))
        return {key: value for key, value in batch.items() if key not in names}


class GradAscent(_Method):
    """Gradient ascent: -NLL of the forget rows, and no retain loss."""

    def __init__(self, *, gamma: float = 1.0, **keywords: Any):
        super().__init__(forget={"objective": "ga", "gamma": gamma}, retain={"objective": "none"}, **keywords)


class GradDiff(_Method):
    """Gradient difference: -NLL of the forget rows, plus the loss `retain_loss_type` of the retain rows."""

    forget_objective = "ga"

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        alpha: float = 1.0,
        retain_loss_type: str = "NLL",
        forget: dict | None = None,
        **keywords: Any,
    ):
        if retain_loss_type not in _RETAIN:
            raise ValueError(f"retain_loss_type must be one of {', '.join(_RETAIN)}; got {retain_loss_type!r}")
        super().__init__(
            forget={"objective": self.forget_objective, "gamma": gamma, **(forget or {})},
            retain={"objective": _RETAIN[retain_loss_type], "alpha": alpha},
            **keywords,
        )


class NPO(GradDiff):
    """NPO: -(2 / beta) log sigmoid(-beta (s - s_ref)), where s is the log-prob of a forget row; see `losses`."""

    forget_objective = "npo"

    def __init__(self, *, beta: float = 1.0, **keywords: Any):
        super().__init__(forget={"beta": beta}, **keywords)


class SimNPO(GradDiff):
    """SimNPO: -(2 / beta) log sigmoid(-beta (s / length + delta)); see `losses`."""

    forget_objective = "simnpo"

    def __init__(self, *, delta: float = 0.0, beta: float = 1.0, **keywords: Any):
        super().__init__(forget={"beta": beta, "delta": delta}, **keywords)


class WGA(GradDiff):
    """WGA: the mean of p^beta log p over the labelled tokens of the forget rows, p^beta held fixed; see `losses`."""

    forget_objective = "wga"

    def __init__(self, *, beta: float = 1.0, **keywords: Any):
        super().__init__(forget={"beta": beta}, **keywords)


class SatImp(GradDiff):
    """SatImp: the mean of p^beta1 (1 - p)^beta2 log p over labelled tokens of the forget rows, weight held fixed."""

    forget_objective = "satimp"

    def __init__(self, *, beta1: float = 5.0, beta2: float = 1.0, alpha: float = 0.1, **keywords: Any):
        super().__init__(forget={"beta1": beta1, "beta2": beta2}, alpha=alpha, **keywords)


class CEU(_Method):
    """CE-U: cross-entropy of the forget rows against the model's own prediction without the label; no retain loss."""

    def __init__(self, *, ignore_first_n_answer_tokens: int = 1, **keywords: Any):
        forget = {"objective": "ceu", "ignore_first_n_answer_tokens": ignore_first_n_answer_tokens}
        super().__init__(forget=forget, retain={"objective": "none"}, **keywords)


class UNDIAL(GradDiff):
    """UNDIAL: cross-entropy of the forget rows against the reference, its logits lowered by `beta` at the labels."""

    forget_objective = "undial"

    def __init__(self, *, beta: float = 1.0, **keywords: Any):
        super().__init__(forget={"beta": beta}, **keywords)


class DPO(GradDiff):
    """DPO: prefers the alternate answer of a forget row to the original one; the dataset makes it IdkDPO or AltPO.

    A forget row is {"original": row, "alternate": row}. A dataset that draws alternates anew each time (refusals)
    draws them here under a seed of the row, so that a row has one alternate, whose reference log-prob can be kept.
    """

    forget_objective = "idk_dpo"

    def __init__(self, *, beta: float = 1.0, args: TrainingArguments, train_dataset: Dataset, **keywords: Any):
        if len(getattr(train_dataset, "forget", ())):
            # a copy, so that the caller's own dataset still draws alternates anew
            copied: Any = copy.copy(train_dataset)
            copied.forget = Drawn(copied.forget, args.seed)
            train_dataset = copied
        super().__init__(forget={"beta": beta}, args=args, train_dataset=train_dataset, **keywords)

    def _rows(self, batch: Mapping) -> dict[str, torch.Tensor]:
        if "original" not in batch:
            return super()._rows(batch)
        refused = super()._rows(batch["alternate"])
        return super()._rows(batch["original"]) | {f"idk_{key}": value for key, value in refused.items()}


class RMU(GradDiff):
    """RMU: steers the output of one decoder layer on forget rows and keeps it (EMBED_DIFF) on retain rows.

    Args:
        module_regex: pattern that matches the decoder layer's whole name.
        trainable_params_regex: patterns that match the whole names of the parameters that train.
        steering_coeff: length of the vector that outputs are steered to.

    Raises ValueError if the pattern matches no module, or one that is not a decoder layer, or no parameter.
    """

    forget_objective = "rmu"

    def __init__(
        self,
        *,
        model: nn.Module,
        module_regex: str = r"model\.layers\.7",
        trainable_params_regex: Sequence[str] = (r"model\.layers\.[567]\.[^.]+\.experts\.(gate_up_proj|down_proj)",),
        steering_coeff: float = 20.0,
        retain_loss_type: str = "EMBED_DIFF",
        **keywords: Any,
    ):
        super().__init__(
            model=model,
            forget={"layer": _layer(model, module_regex), "steering": float(steering_coeff)},
            retain_loss_type=retain_loss_type,
            scope={"kind": "parameters", "parameters": [rf"\A(?:{p})\Z" for p in trainable_params_regex]},
            **keywords,
        )


def _layer(model: nn.Module, pattern: str) -> int:
    """Return the index of the one decoder layer whose whole name `pattern` matches."""
    found = {name: module for name, module in model.named_modules() if re.fullmatch(pattern, name)}
    if len(found) != 1:
        raise ValueError(f"module_regex {pattern!r} must match one module; it matches {', '.join(found) or 'none'}")
    ((name, module),) = found.items()
    layers = list(decoder_layers(model))
    if not any(module is layer for layer in layers):
        raise ValueError(f"module_regex {pattern!r} matches {name}, which is not a decoder layer")
    return next(i for i, layer in enumerate(layers) if layer is module)


def _plain(value: object) -> object:
    """Convert a value that may be a Hydra config into dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
