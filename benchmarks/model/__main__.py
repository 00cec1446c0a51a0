"""Print what the model says of published kernels: python -m benchmarks.model --published"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.model import published


def published_table() -> str:
    """Return a line for each published figure: measured by others, predicted here, and the error."""
    lines = [f"{'kernel':<36} {'GPU':<5} {'published':>9} {'predicted':>9} {'error':>7}"]
    for title, figures in (("fitted on", published.FITTED), ("checked on", published.CHECKED)):
        lines.append(f"{title} (TFLOP/s):")
        for f in figures:
            why = published.MISSES.get(f.name, "")
            line = f"{f.name:<36} {f.gpu.name:<5} {f.measured:9.1f} {f.predicted:9.1f} {f.error:+7.1%}"
            lines.append(f"{line}  MISSED: {why}" if why else line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("--published", action="store_true", help="kernels that others measured, beside the model")
    options = parser.parse_args(arguments)
    if options.published:
        print(published_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
