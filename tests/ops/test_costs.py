"""The tables of costs: they name registered operations and arguments, and ask the native library for its tiles."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.config import Recipe
from moe_unlearn.ops import Head, Reference, costs, token_loss
from moe_unlearn.plan import costs as joined
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batch
from tests.support.models import TINY_MODELS

pytestmark = pytest.mark.quick

OPS = sorted({path.stem for path in Path(costs.__file__).parent.glob("*.py")} - {"__init__", "cost"})


def table_of(op):
    return getattr(importlib.import_module(f"moe_unlearn.ops.costs.{op}"), "COSTS", {})


def test_every_table_is_joined():
    own = {f"moe_unlearn::{name}" for op in OPS for name in table_of(op)}
    assert own and own == {name for name in joined._COSTS if name.startswith("moe_unlearn::")}


@pytest.mark.parametrize("op", OPS)
def test_costs_are_functions_of_arguments_that_the_operation_has(op):
    importlib.import_module("moe_unlearn.ops.native.token_loss")  # defines an operation of its own
    for name, cost in table_of(op).items():
        schema = getattr(torch.ops.moe_unlearn, name).default._schema
        known = {argument.name for argument in schema.arguments} | {"impl"}
        for function in filter(None, (cost.flops, cost.workspace)):
            parameters = inspect.signature(function).parameters.values()
            asked = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
            assert asked <= known, (name, asked - known)
        assert not cost.part or "impl" in {argument.name for argument in schema.arguments}


def test_tiles_are_those_of_the_library():
    if why := native.load("cpu"):
        pytest.skip(why)
    tiles = native.token_loss_tiles()
    assert min(tiles) > 0 and tiles.entries % tiles.backward_entries == 0  # a group is whole tiles of the backward
    try:
        native.instruction_set("avx2")
        assert not native.has_pair_products()
    finally:
        native.instruction_set("")


def test_without_the_library_its_tiles_are_an_error_and_nothing_is_multiplied_in_pairs(monkeypatch):
    monkeypatch.setattr(native, "load", lambda name: "not built: no C++ compiler")
    native.token_loss_tiles.cache_clear()
    with pytest.raises(RuntimeError, match="tiles of token_loss .* not built: no C"):
        native.token_loss_tiles()
    assert native.has_pair_products() is False


def test_a_plan_needs_no_library(monkeypatch):
    def missing():
        raise RuntimeError("not built")

    def planned():
        recipe = Recipe.load("graddiff", ["scope.kind=all", "scope.parameters=[]"])
        model = TINY_MODELS["olmoe"](vocab_size=256, hidden_size=64)
        pair = ([random_batch(256, 2, 16, seed=seed)] for seed in (1, 2))
        return UnlearnStep(model, recipe).plan(*pair)

    planned()  # a plan with the library before it leaves nothing that one without it would take
    monkeypatch.setattr(native, "token_loss_tiles", missing)
    monkeypatch.setenv("MOE_UNLEARN_IMPL", "ref")  # what runs without the library
    plan = planned()
    assert not any("not rehearsed" in note for note in plan.notes), plan.notes
    assert plan.flops["token_loss_backward"] and plan.largest["workspace"]


@pytest.mark.parametrize(
    "kind, trains, products",
    [("nll", False, 2), ("uce", False, 2), ("nll", True, 4), ("kl", False, 3), ("kl", True, 6)],
)
def test_triton_multiplies_a_frozen_head_once_beside_the_logits_within_a_gigabyte(kind, trains, products):
    """At 8192 tokens, hidden size 2048 and 151,936 entries; the inputs and a head's gradient are not counted."""
    pytest.importorskip("triton")
    rehearsal, shapes = Rehearsal(torch.device("cpu")), ((8192, 2048), (151_936, 2048))
    h, head = (rehearsal.empty(shape, torch.bfloat16).requires_grad_() for shape in shapes)
    labels = rehearsal.empty((8192,), torch.int64)
    head.requires_grad_(trains)
    reference = Reference(rehearsal.empty(shapes[0], torch.bfloat16)) if kind == "kl" else None
    with rehearsal:
        token_loss(h, Head(head), labels, kind=kind, reference=reference, impl="triton").sum().backward()
    taken = sum(rehearsal.ledger.peak().values()) - trains * head.numel() * head.itemsize
    assert 300 * 10**6 < taken <= 10**9
    flops = sum(count for name, count in rehearsal.flops.items() if name.startswith("token_loss"))
    assert flops == products * 2 * 8192 * 2048 * 151_936
