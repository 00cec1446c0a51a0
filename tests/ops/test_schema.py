"""The parts of schemas that objects write."""

from typing import NamedTuple

import pytest
import torch

from moe_unlearn.ops import SGD, ExpertLayout, Update
from moe_unlearn.ops.schema import fields


@pytest.mark.quick
def test_fields_in_their_order_those_of_an_inner_object_in_its_place():
    assert fields(SGD, Update) == (
        "float lr, float momentum, float dampening, float weight_decay, bool nesterov, "
        "SymInt step, str rounding, SymInt seed, SymInt parameter_id, SymInt first_row"
    )
    assert fields(ExpertLayout) == (
        "str activation, float alpha, float limit, float shift, bool transposed, bool interleaved, bool gated"
    )


@pytest.mark.quick
def test_an_op_takes_what_its_objects_say():
    schema = str(torch.ops.moe_unlearn.masked_sgd.default._schema)
    assert f", {fields(SGD, Update)}, str impl) -> ()" in schema


@pytest.mark.quick
def test_a_type_that_no_schema_has_is_an_error():
    class Odd(NamedTuple):
        names: dict

    with pytest.raises(KeyError):
        fields(Odd)
