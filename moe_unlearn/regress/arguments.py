"""The options of `moe-unlearn kernels`, apart from its verbs, so that --help loads no torch."""

import argparse

STORE = "kernel_store"
REPROS = "kernel_repros"
# named here because the modules that have them load torch; tests/test_cli_help.py holds them to those
IMPLS = ("triton", "cuda", "cpu", "ref")
COMPARISONS = 1000  # of the tool's own test


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs and their options to the parser."""
    verbs_of = parser.add_subparsers(dest="kernels_verb", required=True)

    def verb(name: str, about: str, *, cases: bool = True) -> argparse.ArgumentParser:
        sub = verbs_of.add_parser(name, help=about, description=about)
        sub.add_argument("--store", default=STORE, metavar="DIR", help=f"folder of the records (default {STORE})")
        sub.add_argument("--json", metavar="FILE", help="write the results as JSON; - is standard output")
        if cases:
            sub.add_argument("--module", action="append", default=[], metavar="FILE.py", help="the cases of this file")
            sub.add_argument("--tag", action="append", default=[], help="only cases that have this tag")
            sub.add_argument("--impl", default="auto", help=f"of our ops: auto, {', '.join(IMPLS)}")
            sub.add_argument("--device", help="where the inputs are moved: cpu, cuda, ...")
            sub.add_argument("--junit", metavar="FILE", help="write the results as JUnit XML")
            sub.add_argument("--verbose", action="store_true", help="a line for every case")
        return sub

    def patterns(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("pattern", nargs="*", help="names of cases, * and ? allowed (default: all)")

    def architectures(sub: argparse.ArgumentParser) -> None:
        what = "sm_80, sm_90, ...: compile, and compare registers, spills and instructions instead"
        sub.add_argument("--static", action="append", default=[], metavar="ARCH", help=what)

    patterns(verb("list", "List the cases, their tags, and whether they are recorded."))
    sub = verb("record", "Record what the cases give now; refuse cases that are recorded differently.")
    patterns(sub)
    architectures(sub)
    sub.add_argument("--seed", type=int, default=0, help="what decides the inputs (default 0)")
    sub.add_argument("--speed", action="store_true", help="record times too")
    sub = verb("check", "Compare what the cases give now with the records; shrink a failing case to a script.")
    patterns(sub)
    architectures(sub)
    sub.add_argument("--strict", action="store_true", help="other bits fail, however accurate")
    sub.add_argument("--speed", action="store_true", help="show recorded times beside those of now")
    sub.add_argument("--repro", default=REPROS, metavar="DIR", help=f"folder of repro scripts (default {REPROS})")
    sub = verb(
        "compare", "Compare B with A in numbers and speed: two implementations, two files, or --base REV and this tree."
    )
    sub.add_argument("sides", nargs="*", metavar="A B", help="implementations of our ops, or two files with cases")
    sub.add_argument("--case", action="append", default=[], metavar="PATTERN", help="only cases of this name")
    sub.add_argument("--base", metavar="REV", help="a git revision, against which the present tree is held")
    sub.add_argument("--seed", type=int, default=0, help="what decides the inputs (default 0)")
    sub.add_argument("--strict", action="store_true", help="other bits fail, however accurate")
    sub.add_argument("--no-speed", action="store_true", help="compare numbers only, and measure no times")
    sub = verb("accept", "Record what the cases give now as right; keep the former records beneath.")
    patterns(sub)
    sub.add_argument("--reason", required=True, help="why the new values are right; kept in the store")
    sub.add_argument("--speed", action="store_true", help="record times too")
    sub = verb(
        "report", "Show what the store holds: every record and those it superseded, all of it verified.", cases=False
    )
    patterns(sub)
    sub.add_argument("--markdown", action="store_true", help="as a markdown table")
    about = "Measure the tool itself: seeded numeric bugs found, false alarms, slow-downs found."
    sub = verbs_of.add_parser("selftest", help=about, description=about)
    sub.add_argument("--comparisons", type=int, default=COMPARISONS, help="on recorded noise, per trace")
    sub.add_argument("--real", type=float, default=0, metavar="SECONDS", help="on the real clock for so long instead")
