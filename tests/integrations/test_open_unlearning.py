"""open-unlearning's methods: their losses by formulas written out here, their conventions, a short training."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid
from torch.utils.data import Dataset
from transformers import TrainingArguments

from moe_unlearn.data import train_tokenizer
from moe_unlearn.errors import NotPreparedError
from moe_unlearn.integrations import open_unlearning
from moe_unlearn.integrations.open_unlearning import (
    CEU,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    GradAscent,
    GradDiff,
    SatImp,
    SimNPO,
)
from tests.support.models import tiny_olmoe
from tests.support.open_unlearning import Paired, Rows, logits, made, mean_nll, one_batch, token_nll

KEYS = ("input_ids", "attention_mask", "labels")
RMU_ARGS = {
    "module_regex": r"model\.layers\.1",
    "trainable_params_regex": [r"model\.layers\.[01]\.mlp\.experts\.down_proj"],
    "steering_coeff": 3.0,
}


class Alternates(Rows):
    """Forget rows with an alternate answer, drawn anew each time, as its dataset of refusals does."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.forget = Pairs(self.forget)


class Pairs(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        original = self.rows[i]
        refusal = torch.randint(3, 64, (int(torch.randint(3, 6, ())),))
        ids = torch.cat([original["input_ids"][:2], refusal])
        return {"original": original, "alternate": Rows.row(ids, 2)}


def reference_of(trainer):
    torch.manual_seed(0)
    return tiny_olmoe()


def theirs(name, trainer, batch):
    """The loss as open-unlearning defines it, over whole logits and with a second model."""
    model, reference, forget = trainer.model, reference_of(trainer), batch["forget"]
    retain = mean_nll(model, batch["retain"])
    if name == "DPO":
        ratios = [
            token_nll(reference, f)[0].sum(1) - token_nll(model, f)[0].sum(1)
            for f in (forget["alternate"], forget["original"])
        ]
        return 1.5 * -2 / 0.3 * logsigmoid(0.3 * (ratios[0] - ratios[1])).mean() + 0.7 * retain
    values, mask = token_nll(model, forget)
    if name == "GradAscent":
        return 1.5 * -mean_nll(model, forget)
    if name == "GradDiff":
        return 1.5 * -mean_nll(model, forget) + 0.7 * retain
    if name == "NPO":
        difference = values.sum(1) - token_nll(reference, forget)[0].sum(1)
        return 1.5 * -2 / 0.3 * logsigmoid(0.3 * difference).mean() + 0.7 * retain
    if name == "WGA":
        weighted = (-values).exp().detach() ** 0.6 * values
        return 1.5 * -weighted[mask].mean() + 0.7 * retain
    if name == "SatImp":
        p = (-values).exp().detach()
        return 1.5 * -(p**2 * (1 - p) ** 0.5 * values)[mask].mean() + 0.7 * retain
    if name == "CEU":
        labels = forget["labels"].clone()
        for row in labels:
            row[(row != -100).nonzero()[:2]] = -100
        counted = labels[:, 1:] != -100
        z, y = logits(model, forget)[:, :-1][counted], labels[:, 1:][counted]
        target = torch.softmax(z.scatter(1, y[:, None], -math.inf), 1)
        return cross_entropy(z, target)
    length = (forget["labels"] != -100).sum(1)
    return 1.5 * -2 / 4.5 * logsigmoid(4.5 * (values.sum(1) / length - 0.2)).mean() + 0.7 * retain


METHODS = {
    "GradAscent": (GradAscent, {"gamma": 1.5}),
    "GradDiff": (GradDiff, {"gamma": 1.5, "alpha": 0.7}),
    "NPO": (NPO, {"gamma": 1.5, "alpha": 0.7, "beta": 0.3}),
    "DPO": (DPO, {"gamma": 1.5, "alpha": 0.7, "beta": 0.3}),
    "WGA": (WGA, {"gamma": 1.5, "alpha": 0.7, "beta": 0.6}),
    "SatImp": (SatImp, {"gamma": 1.5, "alpha": 0.7, "beta1": 2.0, "beta2": 0.5}),
    "CEU": (CEU, {"ignore_first_n_answer_tokens": 2}),
    "SimNPO": (SimNPO, {"gamma": 1.5, "alpha": 0.7, "beta": 4.5, "delta": 0.2}),
}


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_open_unlearnings(name, tmp_path):
    method, arguments = METHODS[name]
    trainer = made(method, tmp_path, Alternates() if name == "DPO" else None, **arguments)
    batch = one_batch(trainer)
    answered = batch["forget"].get("original", batch["forget"])
    assert (answered["attention_mask"] == 0).any()  # padding takes part
    with torch.no_grad():
        ours, expected = trainer.compute_loss(trainer.model, batch), theirs(name, trainer, batch)
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert float(ours) == pytest.approx(float(expected), rel=2e-6)
    assert float(loss) == float(ours) and outputs.logits.shape == (*answered["labels"].shape, 64)


@pytest.mark.parametrize("packed", [False, True])
def test_positions_and_packed_rows_are_the_models(packed, tmp_path):
    trainer = made(GradDiff, tmp_path, Rows(lengths=(9, 9)), gamma=1.5, alpha=0.7)
    batch = one_batch(trainer, 1 if packed else 4)
    retain = batch["retain"] | {"index": torch.zeros(len(batch["retain"]["labels"]))}
    retain["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    alone = {key: retain[key] for key in KEYS}
    if packed:
        retain["labels"][:, 4] = -100
        alone = {
            key: torch.cat([nn.functional.pad(value[:, :4], (0, 1)), value[:, 4:]]) for key, value in alone.items()
        }
        alone["labels"][0, 4] = -100
        retain = {"index": retain["index"]} | {key: retain[key] for key in ("input_ids", "labels", "position_ids")}
    batch["retain"] = retain
    with torch.no_grad():
        ours = float(trainer.compute_loss(trainer.model, batch))
        given = alone if packed else alone | {"position_ids": retain["position_ids"]}
        expected = 1.5 * -mean_nll(trainer.model, batch["forget"]) + 0.7 * trainer.model(**given).loss
    assert ours == pytest.approx(float(expected), rel=2e-6)


def test_what_a_row_is_named_by_is_taken_out_and_nothing_else(tmp_path):
    trainer = made(GradDiff, tmp_path, gamma=1.5, alpha=0.7)
    batch = one_batch(trainer)
    expected = trainer.compute_loss(trainer.model, batch)
    trainer.data_collator.index = "number"  # of open-unlearning's collator, the name of what it names rows by
    batch["retain"] |= {"index": torch.zeros(4, 2), "number": torch.arange(4)}
    assert torch.equal(trainer.compute_loss(trainer.model, batch), expected)
    batch["retain"]["token_type_ids"] = torch.zeros_like(batch["retain"]["labels"])
    with pytest.raises(ValueError, match="the retain batch has token_type_ids, which nothing here reads"):
        trainer.compute_loss(trainer.model, batch)


def test_alternates_are_drawn_once_whoever_draws_between(tmp_path):
    rows = Alternates()
    trainer = made(DPO, tmp_path, rows, arguments={"max_steps": 9, "learning_rate": 5e-3}, beta=0.1)
    first = trainer.train_dataset.forget[3]["alternate"]["input_ids"]
    state = torch.get_rng_state()
    again = trainer.train_dataset[3]["forget"]["alternate"]["input_ids"]
    assert torch.equal(first, again)
    torch.set_rng_state(state)
    trainer.train()  # an alternate that prepare() did not see has no reference: ValueError
    losses = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
    assert len(losses) == 9 and losses[-1] < losses[0]
    assert rows.forget.rows is trainer.train_dataset.forget.rows.rows  # the caller's dataset is as it was


def hidden(model, batch, layer):
    out = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return out.hidden_states[layer + 1]


def theirs_over_tokens(squares, batch):
    """The rows' sums of token means over the harmonic mean of their labelled tokens: a [B] / [B, 1] averaged."""
    mask = batch["labels"] != -100
    return ((squares.mean(2) * mask).sum(1) / mask.sum(1, keepdim=True)).mean()


def harmonic_over_arithmetic(batch):
    tokens = (batch["labels"] != -100).sum(1).double()
    return 1 / (1 / tokens).mean() / tokens.mean()


@pytest.mark.parametrize("lengths", [(11, 11), (5, 12)], ids=["equal", "unequal"])
def test_rmu_is_open_unlearnings_but_for_the_mean_of_lengths(lengths, tmp_path):
    # the layer steered is not the last: hidden_states of transformers end with the final norm
    arguments = RMU_ARGS | {"module_regex": r"model\.layers\.0", "alpha": 5.0, "gamma": 2.0}
    trainer = made(RMU, tmp_path, Rows(lengths=lengths), **arguments)
    batch, model, reference = one_batch(trainer), trainer.model, reference_of(trainer)
    u = torch.rand(32, generator=torch.Generator().manual_seed(trainer.args.seed))
    control = 3.0 * u / u.norm()
    with torch.no_grad():
        steered = (hidden(model, batch["forget"], 0).double() - control) ** 2
        kept = (hidden(model, batch["retain"], 0) - hidden(reference, batch["retain"], 0).bfloat16().float()).double()
        ours = float(trainer.compute_loss(model, batch))
    sides = {"forget": 2.0 * theirs_over_tokens(steered, batch["forget"])}
    sides["retain"] = 5.0 * theirs_over_tokens(kept**2, batch["retain"])
    expected = sum(value * harmonic_over_arithmetic(batch[side]) for side, value in sides.items())
    assert ours == pytest.approx(float(expected), rel=1e-5)
    assert (ours == pytest.approx(float(sum(sides.values())), rel=1e-3)) == (lengths[0] == lengths[1])


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_token_that_pads_may_end_a_row(padding_side, tmp_path):
    """A collator that masks every pad token also masks an eos that pads: labelled, but of no known state."""

    def masked(items):
        batch = plain(items)
        for rows in batch.values():
            ends = rows["attention_mask"].sum(1) - 1
            rows["attention_mask"][torch.arange(len(ends)), ends] = 0
            rows["attention_mask"] = rows["attention_mask"].bool()
            if padding_side == "left":
                turns = rows["input_ids"].shape[1] - 1 - ends
                for key in KEYS:
                    rows[key] = torch.stack([row.roll(int(n)) for row, n in zip(rows[key], turns, strict=True)])
        return batch

    plain = made(GradAscent, tmp_path / "collator").data_collator
    trainer = made(RMU, tmp_path / "rmu", data_collator=masked, gamma=0.0, **RMU_ARGS)
    trainer.model.load_state_dict(reference_of(trainer).state_dict())
    with torch.no_grad():
        assert float(trainer.compute_loss(trainer.model, one_batch(trainer))) < 1e-4  # bfloat16 of the cache
    trainer = made(NPO, tmp_path / "npo", data_collator=masked, **METHODS["NPO"][1])
    batch = one_batch(trainer)
    with torch.no_grad():
        ours, expected = trainer.compute_loss(trainer.model, batch), theirs("NPO", trainer, batch)
    assert float(ours) == pytest.approx(float(expected), rel=2e-6)  # the label itself counts


def test_where_it_differs_as_the_page_says(tmp_path):
    """KL's and UNDIAL's divisor, and SimNPO's length for rows without a prompt."""
    trainer = made(GradDiff, tmp_path / "kl", gamma=0.0, retain_loss_type="KL")
    batch, rows = one_batch(trainer), one_batch(trainer)["retain"]
    with torch.no_grad():
        ours = float(trainer.compute_loss(trainer.model, batch))
        p, q = (log_softmax(logits(m, rows), -1) for m in (trainer.model, reference_of(trainer)))
        each = kl_div(p, q, reduction="none", log_target=True).sum(-1)
    counted = torch.zeros_like(rows["labels"], dtype=torch.bool)
    counted[:, :-1] = rows["labels"][:, 1:] != -100
    assert ours == pytest.approx(float(each[counted].mean()), rel=0.02)  # the reference's states are cached in bfloat16
    assert ours != pytest.approx(float(each.mean()), rel=0.05)

    trainer = made(UNDIAL, tmp_path / "undial", alpha=0.0, beta=3.0)
    batch, rows = one_batch(trainer), one_batch(trainer)["forget"]
    counted = rows["labels"][:, 1:] != -100
    with torch.no_grad():
        ours = float(trainer.compute_loss(trainer.model, batch))
        z, reference = logits(trainer.model, rows)[:, :-1], reference_of(trainer)
        states = reference.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
        targets = states[:, :-1].bfloat16().double() @ reference.lm_head.weight.double().T
        # theirs lowers the hundredth logit from the end where the label is -100, which this vocabulary lacks
        at = rows["labels"][:, 1:, None].clamp_min(0)
        targets = torch.softmax(targets.scatter_add(2, at, torch.full_like(targets[..., :1], -3.0)), -1)
        each = cross_entropy(z.transpose(1, 2), targets.transpose(1, 2), reduction="none")
    assert ours == pytest.approx(float(each[counted].mean()), rel=1e-5)
    assert ours != pytest.approx(float(each.mean()), rel=1e-3)

    trainer = made(SimNPO, tmp_path / "simnpo", Rows(prompt=0), alpha=0.0, beta=4.5)
    batch = one_batch(trainer)
    with torch.no_grad():
        ours = float(trainer.compute_loss(trainer.model, batch))
        values, mask = token_nll(trainer.model, batch["forget"])
    assert ours == pytest.approx(float(-2 / 4.5 * logsigmoid(4.5 * values.sum(1) / mask.sum(1)).mean()), rel=2e-6)
    assert ours != pytest.approx(float(-2 / 4.5 * logsigmoid(4.5 * values.sum(1) / (mask.sum(1) + 1)).mean()), rel=1e-3)


@pytest.mark.parametrize("lever", ["none", "trace", "wagle"])
def test_a_short_training_forgets(lever, tmp_path):
    levers = {"none": {}, "trace": {"trace": {"min_ratio": 1.001}}, "wagle": {"wagle": {"keep": 0.5}}}[lever]
    arguments = {"max_steps": 12, "learning_rate": 5e-3, "gradient_accumulation_steps": 2, "warmup_steps": 2}
    trainer = made(NPO, tmp_path, arguments=arguments, beta=0.1, **levers)
    assert trainer.unlearn_step.recipe.optimizer.lr == 5e-3
    frozen = {}
    if lever == "wagle":
        masks = trainer.unlearn_step.prepared.mask
        frozen = {n: (p.detach().clone(), ~masks.kept(n)) for n, p in trainer.model.named_parameters()}
    before = mean_nll(trainer.model, one_batch(trainer)["forget"]).item()
    trainer.train()
    assert mean_nll(trainer.model, one_batch(trainer)["forget"]).item() > before + 0.1
    logged = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert len(logged) == 12 and all(math.isfinite(entry["retain_loss"]) for entry in logged)
    for name, p in trainer.model.named_parameters():
        if name in frozen:
            old, still = frozen[name]
            assert torch.equal(p[still], old[still])


def test_rmu_trains_what_its_patterns_say(tmp_path):
    trainer = made(RMU, tmp_path, arguments={"max_steps": 2}, **RMU_ARGS)
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    trainer.train()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"module_regex": r"model\.layers\.7"}, "must match one module; it matches none"),
        ({"module_regex": r"model\.layers\.\d"}, "it matches model.layers.0, model.layers.1"),
        ({"module_regex": r"model\.layers\.1\.mlp"}, "matches model.layers.1.mlp, which is not a decoder layer"),
        ({"trainable_params_regex": [r"model\.layers\.1\.mlp\.down_proj\.weight"]}, "matches no parameter"),
        ({"retain_loss_type": "L2"}, "retain_loss_type must be one of NLL, KL, EMBED_DIFF; got 'L2'"),
        ({"trace": {"etta": 1}}, "unknown recipe key 'trace.etta'"),
        ({"train_dataset": []}, "train_dataset must have a non-empty list of examples 'forget'"),
    ],
)
def test_bad_arguments_are_named(changes, message, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    keywords = {"model": tiny_olmoe(), "args": args, "train_dataset": Rows(), **RMU_ARGS, **changes}
    with pytest.raises(ValueError, match=message):
        RMU(**keywords)


def test_a_loss_before_prepare_is_an_error(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = NPO(model=tiny_olmoe(), args=args, train_dataset=Rows(), beta=0.1)
    with pytest.raises(NotPreparedError):
        trainer.compute_loss(trainer.model, one_batch(trainer))


@pytest.mark.parametrize("name", ["tokenizer", "processing_class"])  # of its versions before and since February 2026
def test_evaluators_of_open_unlearning_are_called(name, tmp_path):
    """At the start and after each epoch, as `configs/trainer/finetune.yaml` asks, without an eval_dataset."""
    seen = []

    def evaluate(**keywords):
        seen.append(keywords)
        return {"forget_quality": 0.5}

    tokenizer = train_tokenizer(["words"], 260)
    trainer = made(
        GradAscent,
        tmp_path,
        arguments={"eval_strategy": "epoch", "eval_on_start": True, "num_train_epochs": 1},
        evaluators={"tofu": SimpleNamespace(evaluate=evaluate)},
        template_args={"a": 1},
        **{name: tokenizer},
    )
    assert trainer.evaluate() == {"forget_quality": 0.5}
    assert seen[0] == {
        "output_dir": str(tmp_path / "checkpoint-0" / "evals"),
        "template_args": {"a": 1},
        "model": trainer.model,
        "tokenizer": tokenizer,
    }
    trainer.train()
    assert [Path(keywords["output_dir"]).parent.name for keywords in seen[1:]] == ["checkpoint-0", "checkpoint-3"]


def test_evaluation_without_evaluators_is_the_trainers(tmp_path):
    assert made(GradAscent, tmp_path).evaluate() == {}
    with pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
        made(GradAscent, tmp_path, arguments={"eval_strategy": "epoch"})


@pytest.mark.quick
def test_registration_and_yaml_files_belong_together(monkeypatch):
    registry = {"NPO": object}
    open_unlearning.register(registry)
    open_unlearning.register(registry)
    files = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in open_unlearning.config_folder().glob("*.yaml")
    }
    assert files.keys() == registry.keys() - {"NPO"} and registry["NPO"] is object
    for name, content in files.items():
        assert content["handler"] == name and content["defaults"] == ["finetune"]
    monkeypatch.setitem(sys.modules, "trainer", SimpleNamespace(TRAINER_REGISTRY=(theirs := {})))
    open_unlearning.register()
    assert theirs.keys() == files.keys()
    monkeypatch.setitem(sys.modules, "trainer", None)
    with pytest.raises(ImportError, match="open-unlearning's package `trainer` cannot be imported: run inside its"):
        open_unlearning.register()
    with pytest.raises(ValueError, match="another trainer named MoENPO"):
        open_unlearning.register({"MoENPO": object})


def test_the_yaml_files_method_args_are_arguments(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    registry = {}
    open_unlearning.register(registry)
    for name, method in registry.items():
        content = yaml.safe_load((open_unlearning.config_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
        model = tiny_olmoe(num_hidden_layers=8)
        # as load_trainer calls it
        trainer = method(
            model=model,
            train_dataset=Rows(),
            eval_dataset=None,
            processing_class=None,
            data_collator=None,
            args=args,
            evaluators=None,
            template_args=None,
            **{key: 0.5 if value == "???" else value for key, value in content["method_args"].items()},
        )
        assert trainer.unlearn_step.recipe.name == name


@pytest.mark.parametrize("name", ["NPO", "RMU"])
def test_micro_batches_weigh_what_they_hold(name, tmp_path):
    """Rows of 5 and of 30 tokens, in one batch and in batches of one: the same losses and the same gradient."""
    method, keywords = {**METHODS, "RMU": (RMU, RMU_ARGS)}[name]
    logged = []
    for size, count in ((2, 1), (1, 2)):
        arguments = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": count}
        trainer = made(method, tmp_path, Paired(count=2, lengths=(5, 30)), arguments, **keywords)
        trainer.train()
        logged.append(next(entry for entry in trainer.state.log_history if "forget_loss" in entry))
    for key in ("loss", "forget_loss", "retain_loss", "grad_norm"):
        assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-5), key
