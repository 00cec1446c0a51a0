"""The embedded experiment at the size of the demo: its target model memorises, and TRACE finds experts to protect."""

import pytest

from moe_unlearn import data, metrics, trace
from moe_unlearn.benchmark import tiny_models
from moe_unlearn.benchmark.tiny_models import SIZES
from moe_unlearn.config import Recipe
from tests.support.threads import torch_threads

pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("corpus", ["builtin:pydoc", "builtin:devil"])
def test_trace_selects_experts_with_the_defaults(corpus):
    settings, seed = SIZES["demo"], 0
    try:
        tokenizer, forget, retain, _ = tiny_models.build_data(corpus, seed, settings)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    with torch_threads(1):  # models this small wait for threads longer than they compute
        model = tiny_models.tiny_olmoe(len(tokenizer), seed, settings)
        tiny_models.train(
            model,
            forget + retain,
            epochs=settings.epochs,
            lr=settings.lr,
            batch_size=settings.batch_size,
            seed=seed,
            pad_id=tokenizer.pad_token_id,
        )
        assert metrics.verbmem(model, tokenizer, forget[:10]) > 0.9
        visible = retain[: round(settings.unlearn_share * len(retain))]
        f, r = (trace.routing_frequencies(model, data.batches(side, 32)) for side in (forget, visible))
    levers = Recipe.load("trace").trace
    selected = trace.select_experts(
        f, r, per_layer=levers.per_layer, min_ratio=levers.min_ratio, min_load=levers.min_load
    )
    assert 1 <= selected.sum() <= levers.per_layer * settings.layers
