"""The command line: `moe-unlearn env | stats | mask | alternates | run | eval | audit | delta | ...` (see `--help`).

`torchrun -m moe_unlearn` starts it on several ranks (`launch`), which share the rows of `run`, `eval`, `audit`,
`stats`, `mask` and `alternates`.

Bad input ends with one line that says what was expected and what was given, and with exit code 2; `--traceback`
shows where it was found. Models are folders written by `save_pretrained`, or models of the hub by their ids; data are
whatever `data.load` reads: files, folders, benchmarks by name (`tofu:forget05`), hub data sets, `builtin:NAME`.

A verb is a line of `VERBS`. Its module is imported when it runs, so that --help takes no torch.
"""

import argparse
import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import moe_unlearn
from moe_unlearn import progress
from moe_unlearn.cli import options as of
from moe_unlearn.cli import paths
from moe_unlearn.cli.launch import REFUSED, Command, Outcome, end, launched
from moe_unlearn.cli.parser import Parser, parsed
from moe_unlearn.errors import (
    MissingLibraryError,
    NonFiniteError,
    NotPreparedError,
    RetainBudgetError,
    UnavailableError,
    Unfit,
    VerificationError,
)
from moe_unlearn.regress import arguments as of_kernels


class Verb(NamedTuple):
    """Describes a verb: its name, what it does, and who adds its options.

    `function` is what runs it, a name in its `module` of `moe_unlearn.cli`, which is the verb's own unless it is said.
    Without `options` the module has `add_arguments`. Those with `ranks` share their work among several. What a verb
    `says` is told at once, before torch is loaded.
    """

    name: str
    about: str
    options: Callable[[argparse.ArgumentParser], None] | None = None
    module: str = ""
    function: str = "run"
    ranks: bool = False
    says: str = ""

    def add_arguments(self, sub: argparse.ArgumentParser) -> None:
        """Add the options of the verb."""
        (self.options or self._find("add_arguments"))(sub)

    def work(self) -> Callable[[argparse.Namespace], int | None]:
        """Import what runs the verb and return it."""
        found: Callable[[argparse.Namespace], int | None] = self._find(self.function)
        return found

    def _find(self, name: str) -> Any:
        return getattr(importlib.import_module(f"moe_unlearn.cli.{self.module or self.name}"), name)


_VERBS = (
    Verb("env", "Print versions, devices, and which implementation each op would use here.", of.env),
    Verb(
        "recipes",
        "List the shipped recipes, a line each, by the name that `run` takes.",
        of.recipes,
        "settings",
        "recipes",
    ),
    Verb(
        "show",
        "Show every key of a recipe with its value, where that comes from, the values it takes and what it means.",
        of.show,
        "settings",
        "show",
    ),
    Verb(
        "schema",
        "Print the JSON schema of recipe files, by which an editor completes and checks them.",
        of.schema,
        "settings",
        "schema",
    ),
    Verb(
        "completion",
        "Print what a shell needs to complete verbs, options and recipes; it takes the library argcomplete.",
        of.completion,
        "settings",
        "completion",
    ),
    Verb(
        "stats",
        "Print routing frequencies of forget and retain text, and the experts TRACE would select.",
        of.stats,
        ranks=True,
    ),
    Verb(
        "mask",
        "Compute a WAGLE mask and save it; the same command goes on where an earlier one was interrupted.",
        of.mask,
        ranks=True,
    ),
    Verb(
        "alternates",
        "Have the model write alternate answers to the questions of a forget set, for the recipe altpo.",
        of.alternates,
        ranks=True,
    ),
    Verb("run", "Unlearn: read a recipe, a model and the data, train, evaluate, report.", of.run, ranks=True),
    Verb(
        "sweep",
        "Run a recipe over a grid of settings and seeds, each run in its own folder, and compare them in one table.",
        of.sweep,
    ),
    Verb(
        "eval",
        "Measure a model on forget, retain and holdout text, or with --benchmark; print and save the metrics.",
        of.evaluate,
        "evaluate",
        ranks=True,
    ),
    Verb(
        "audit",
        "Try to bring the forgotten documents back by every attack, and report whether they are gone or hidden.",
        of.audit,
        ranks=True,
    ),
    Verb(
        "delta",
        "Write what changed from one model's folder to another's as a delta: whoever has BASE and it has both models.",
        of.delta,
        function="write",
    ),
    Verb(
        "apply",
        "Apply a delta to the model that it was made from; any other model is refused.",
        of.apply,
        "delta",
        "apply",
    ),
    Verb(
        "revert",
        "Take a delta back from the model that it led to; any other model is refused.",
        of.revert,
        "delta",
        "revert",
    ),
    Verb(
        "report",
        "Write the report of a run again from its JSON files; of several, print a table and write what is asked.",
        of.report,
    ),
    Verb(
        "purge",
        "Remove from a run's folder all but the model and numbers: copies of what was forgotten, and what reveals it.",
        of.purge,
    ),
    Verb(
        "demo",
        "Run the embedded experiment: target, retrain, baselines, each lever, and the three together.",
        of.demo,
        says="demo: torch is loaded, two tiny models are trained, six recipes unlearn, and the result is measured and "
        "attacked; some minutes",
    ),
    Verb(
        "warmup",
        "Compile the GPU kernels of a model and a recipe beforehand, without weights, data or the GPU itself.",
        of.warmup,
        says="warmup: torch is loaded, and steps are rehearsed to find what they launch",
    ),
    Verb(
        "kernels",
        "Test kernels, ours or yours, for regressions: are they as right, as fast and as lean as they were?",
        of_kernels.add_arguments,
    ),
)
VERBS = {verb.name: verb for verb in _VERBS}
_COMPLETING = "_ARGCOMPLETE"  # set by a shell that `completion` has told how to complete
_BAD_INPUT = (
    ValueError,
    OSError,
    MissingLibraryError,
    NonFiniteError,
    RetainBudgetError,
    NotPreparedError,
    VerificationError,
    UnavailableError,
    Unfit,
)


def program() -> NoReturn:
    """Run the command line of this process, and end it: the console script, and `python -m moe_unlearn`."""
    end(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on one process or on ranks; return the exit code."""
    return launched(partial(_chosen, arguments))


def _chosen(arguments: Sequence[str] | None) -> Command:
    given = sys.argv[1:] if arguments is None else arguments
    if _COMPLETING in os.environ:
        importlib.import_module("argcomplete").autocomplete(_parser())  # which ends the process
    parser = _parser(next((word for word in given if not word.startswith("-")), ""))
    options = parsed(parser, given)
    for name, value in vars(options).items():
        # as of a shell variable that is not set
        if value == "" and name != "system" or isinstance(value, list) and "" in value:
            parser.error(f"argument --{name.replace('_', '-')}: expected a value; got an empty one")
    if getattr(options, "json", False) and getattr(options, "dry_run", True) is False:
        parser.error("argument --json: expected --dry-run too, whose plan it prints; lines of a run are --json-lines")
    options.command_line = shlex.join(["moe-unlearn", *given])
    shared = [verb.name for verb in _VERBS if verb.ranks]
    refusal = _error(options, f"expected one process; ranks share the work of {', '.join(shared)} only")
    return Command(partial(_outcome, options), "" if options.command in shared else refusal)


def _error(options: argparse.Namespace, error: object) -> str:
    return f"moe-unlearn {options.command}: error: {error}"


def _outcome(options: argparse.Namespace) -> Outcome:
    for stream in (sys.stdout, sys.stderr):
        # in a locale without the tables' arrows, printing must not fail and lose the results of a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        paths.check(options)
        with paths.undone(options), progress.shown(_form_of(options)):
            if VERBS[options.command].says:
                progress.say(VERBS[options.command].says)
            return VERBS[options.command].work()(options) or 0, ""
    except _BAD_INPUT as error:
        sys.stdout.flush()  # fails if it was this that broke
        # without a buffer nothing is left that could fail; what breaks of a file has its name
        unread = isinstance(error, BrokenPipeError) and error.filename is None
        if options.traceback or unread:
            raise
        return REFUSED, _error(options, error)
    except KeyboardInterrupt:
        return 130, "interrupted; finished checkpoints are kept"


def _form_of(options: argparse.Namespace) -> progress.Form:
    """Return what a verb shows of its progress; nothing for a verb that has no --quiet."""
    bars = not getattr(options, "quiet", True)
    return progress.Form(bars, getattr(options, "log_every", 0), getattr(options, "json_lines", False))


def _parser(only: str | None = None) -> Parser:
    """Return the parser, which knows the options of all verbs, or those of `only` one."""
    parser = Parser(prog="moe-unlearn", description="Unlearn Mixture-of-Experts models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {moe_unlearn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for verb in _VERBS:
        sub = commands.add_parser(verb.name, help=verb.about, description=verb.about)
        if only in (None, verb.name):
            sub.add_argument("--traceback", action="store_true", help="show where an error was found")
            verb.add_arguments(sub)
    return parser


if __name__ == "__main__":
    program()
