"""`moe-unlearn demo`, which shows what the levers do on tiny models that it trains."""

import argparse
from pathlib import Path

from moe_unlearn import benchmark
from moe_unlearn.benchmark.trained_cache import clean_cache
from moe_unlearn.cli.run import print_run
from moe_unlearn.runs import report
from moe_unlearn.runs.verdict import sentences


def run(options: argparse.Namespace) -> None:
    """Run the embedded experiment: target, retrain, baselines, each lever, and the three together."""
    if options.clean_cache:
        print(f"removed {clean_cache()} cached models")
        return
    out = Path(options.out)
    print_run(out, benchmark.demo(options.corpus, options.seeds, out, command=options.command_line))
    made = report.read(out)
    print("", *sentences(made.summary, made.results, made.audit), sep="\n")
