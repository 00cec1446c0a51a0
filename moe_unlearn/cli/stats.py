"""`moe-unlearn stats`, which counts how often forget and retain text reach each expert."""

import argparse
from functools import partial

from moe_unlearn import trace
from moe_unlearn.cli import plan
from moe_unlearn.cli.arguments import loading_of, sets_of, writable
from moe_unlearn.cli.sides import batches_of, require_moe
from moe_unlearn.files import write_json
from moe_unlearn.model import loading
from moe_unlearn.ranks import Ranks, everyone, on_first


def run(options: argparse.Namespace) -> None:
    """Print routing frequencies of forget and retain text, and the experts TRACE would select."""
    if options.dry_run:
        plan.show(options, plan.of_stats(options))
        return
    how = loading_of(options)
    writable(options.out)
    model, tokenizer = loading.load_model(options.model, how)
    require_moe(model)
    sides = sets_of(options, tokenizer)
    ranks = Ranks(model, everyone())
    batches = batches_of(options, model, tokenizer, sides)
    forget, retain = (trace.routing_frequencies(model, batches[side], ranks) for side in ("forget", "retain"))
    selected = trace.select_experts(
        forget, retain, per_layer=options.per_layer, min_ratio=options.min_ratio, allow_empty=True
    )
    print(f"{'layer':<40} {'expert':>6} {'forget':>8} {'retain':>8} {'ratio':>7}")
    for layer, expert in selected.nonzero().tolist():
        f, r = (float(side.frequency[layer, expert]) for side in (forget, retain))
        ratio = f / r if r else float("inf")
        print(f"{forget.layers[layer]:<40} {expert:>6} {f:>8.4f} {r:>8.4f} {ratio:>7.2f}")
    print(
        f"{int(selected.sum())} experts selected in {len(forget.layers)} layers; "
        f"{forget.tokens} forget and {retain.tokens} retain tokens counted"
    )
    if options.out:
        content = {
            "forget": forget.to_dict() | {"counts": forget.counts.tolist()},
            "retain": retain.to_dict() | {"counts": retain.counts.tolist()},
            "selected": selected.nonzero().tolist(),
        }
        on_first(partial(write_json, options.out, content))
