"""Print what the design's GPU rows are predicted to take, beside targets and peers: python -m benchmarks.model

With --published: kernels that others measured, beside the model. All but those published figures are predictions.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks.model import design, published
from benchmarks.model.gpus import GPUS, H200, HOST_LAUNCH, UNKNOWN, Gpu
from benchmarks.shapes import ROUTINGS

# everything that is printed of ours carries it: no figure of this command was measured
PREDICTED = "predicted"


def published_table() -> str:
    """Return a line for each published figure: measured by others, predicted here, and the error."""
    lines = [f"{'kernel':<36} {'GPU':<5} {'published':>9} {PREDICTED:>9} {'error':>7}"]
    for title, figures in (("fitted on", published.FITTED), ("checked on", published.CHECKED)):
        lines.append(f"{title} (TFLOP/s):")
        for f in figures:
            why = published.MISSES.get(f.name, "")
            line = f"{f.name:<36} {f.gpu.name:<5} {f.measured:9.1f} {f.predicted:9.1f} {f.error:+7.1%}"
            lines.append(f"{line}  MISSED: {why}" if why else line)
    return "\n".join(lines)


def design_table(gpu: Gpu, routing: str) -> str:
    """Return lines for each row of the design: prediction, target and verdict; peer; what decides it, and launches."""
    shape = f"{design.QWEN3.name} at {design.TOKENS} tokens, {routing} routing"
    lines = [f"{PREDICTED} for an {gpu.name}, {shape}; nothing here is measured"]
    for row in design.rows(gpu, routing):
        sign = "<=" if row.at_most else ">="
        value = f"{PREDICTED} {row.predicted:.3g} {row.unit}"
        if gpu is H200:
            value += f", target {sign} {row.target:.3g}: {row.verdict}"
        host = 1e6 * row.launches * HOST_LAUNCH
        lines += [f"{row.work}: {value}", *([f"    peer: {row.peer}"] if row.peer else [])]
        lines += [f"    of ours: {row.why}", f"    launches: {row.launches}, {PREDICTED} {host:.0f} us of the host"]
    if gpu is H200:
        lines.append("Not a time: the peak of a step at Qwen3-30B-A3B's size; `moe-unlearn plan` says what it takes.")
    return "\n".join(lines)


def as_json(gpu: Gpu, routing: str) -> str:
    """Return the rows and the cases as JSON, each figure under a key that says that it is predicted."""
    made = [
        {"work": r.work, "unit": r.unit, PREDICTED: round(r.predicted, 4), "peer": r.peer, "why": r.why}
        | {"launches": r.launches}
        | ({"target": r.target, "verdict": r.verdict} if gpu is H200 else {})
        for r in design.rows(gpu, routing)
    ]
    content = {"gpu": gpu.name, "routing": routing, "sources": dict(gpu.sources), "rows": made}
    return json.dumps(content | {"predicted_milliseconds": design.by_case(gpu)}, indent=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(GPUS)} (default: h200)")
    parser.add_argument("--routing", choices=tuple(ROUTINGS), default="uniform", help="of tokens to experts")
    parser.add_argument("--published", action="store_true", help="kernels that others measured, beside the model")
    parser.add_argument("--json", action="store_true", help="the same rows as JSON, with the sources of the constants")
    options = parser.parse_args(arguments)
    if options.published:
        print(published_table())
        return 0
    name = options.gpu.lower()
    if name not in GPUS:
        why = f" ({UNKNOWN[name]})" if name in UNKNOWN else ""
        print(f"expected --gpu to be one of {', '.join(GPUS)}; got {options.gpu!r}{why}", file=sys.stderr)
        return 2
    print((as_json if options.json else design_table)(GPUS[name], options.routing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
