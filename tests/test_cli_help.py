"""Help, versions and options: they take no torch, and every option says what it is."""

import argparse
import subprocess
import sys

import pytest

from moe_unlearn import __version__, audit, backend, masks, metrics
from moe_unlearn.cli import arguments, evaluate, options
from moe_unlearn.cli.main import VERBS, _parser, main
from moe_unlearn.model import loading
from moe_unlearn.regress import arguments as of_kernels
from moe_unlearn.regress import selftest

pytestmark = pytest.mark.quick
HEAVY = ("torch", "transformers", "numpy", "matplotlib")


def parsers(parser):
    """The parser, those of its verbs, and those of theirs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


def test_help_takes_no_torch():
    """The same process answers for every verb, so that one interpreter is started."""
    program = [
        "import contextlib, io, sys",
        "from moe_unlearn.cli.main import VERBS, main",
        "said = io.StringIO()",
        "for words in (['--help'], ['--version'], *([verb, '--help'] for verb in VERBS)):",
        "    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit): main(words)",
        f"print(said.getvalue().count('usage: '), [name for name in {HEAVY} if name in sys.modules])",
    ]
    told = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, check=True)
    assert told.stdout == f"{len(VERBS) + 1} []\n"


def test_the_demo_says_what_it_does_before_torch_is_loaded():
    program = "import sys; sys.modules['torch'] = None\nfrom moe_unlearn.cli import main\nmain(['demo', *sys.argv[1:]])"
    for more, begins in ([], "demo: torch is loaded, two tiny models are trained"), (["--quiet"], "Traceback"):
        ended = subprocess.run([sys.executable, "-c", program, *more], capture_output=True, text=True)
        assert ended.returncode == 1 and ended.stderr.startswith(begins), ended.stderr


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        _parser("").parse_args(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"moe-unlearn {__version__}\n"


def test_every_option_and_every_verb_says_what_it_is():
    for parser in parsers(_parser()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert all(choice.help and choice.help.endswith((".", "?")) for choice in action._choices_actions)
            else:
                told = action.help or ""
                assert len(told.split()) >= 3, f"{parser.prog} {action.dest}: {told!r}"


@pytest.mark.parametrize(
    "words, hint",
    [
        (["run", "npo", "--max-length", "48"], "--set data.max_length=48"),
        (["run", "npo", "--lr=1e-5", "--steps", "4"], "--set optimizer.lr=1e-5, --steps is a key"),
        (["run", "npo", "--optimizer.lr", "1e-5"], "--set optimizer.lr=1e-5;"),
        (["run", "npo", "--official"], "--set wagle.official=VALUE"),
        (["sweep", "npo", "--grid", "seed=1", "--out", "o", "--steps", "4"], "--set steps=4"),
        (["show", "npo", "--keep", "0.5"], "--set wagle.keep=0.5"),
        (["run", "npo", "--retian", "r"], "did you mean --retain?"),
        (["eval", "--model", "m", "--max-lenght", "4"], "did you mean --max-length?"),
        (["sweep", "npo", "--grid", "steps=1", "--out", "o", "--seed", "3"], "--set seed=3; or did you mean --seeds?"),
        (["run", "npo", "--trust", "--no-e"], "did you mean --trust-remote-code?, did you mean --no-eval?"),
        (["run", "npo", "--re=r"], "did you mean --retain or --retain-eval or --reference or --resume?"),
        (["kernels", "list", "--verb"], "--verb; see moe-unlearn kernels --help"),
        (["eval", "--model", "m", "--lr", "4"], "unrecognized arguments: --lr 4; see moe-unlearn eval --help"),
    ],
)
def test_an_unknown_option_is_told_in_one_line_with_the_key_or_option_that_was_meant(words, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"moe-unlearn {words[0]}: error: unrecognized arguments: --")
    assert hint in told and told.count("\n") == 1


def test_a_missing_option_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["stats"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and "--model" in told and "stats --help" in told


def test_what_a_verb_is_about_is_what_its_function_does():
    for verb in VERBS.values():
        documented = (verb.work().__doc__ or "").partition("\n")[0]
        assert verb.about == documented, verb.name


def test_the_choices_offered_are_those_that_there_are():
    assert options.MASK_FORMATS == masks.FORMATS
    assert options.BENCHMARKS == tuple(evaluate._BENCHMARKS)
    assert options.LIKE == tuple(metrics.LIKE)
    assert arguments.DTYPES == loading.DTYPES
    attacks = sys.modules[audit.__module__]
    assert options.ATTACKS == tuple(attacks.ATTACKS)
    defaults = attacks.Settings()
    assert (options.RELEARN_STEPS, options.RELEARN_LR) == (defaults.relearn_steps, defaults.relearn_lr)
    assert of_kernels.IMPLS == backend.IMPLS and of_kernels.COMPARISONS == selftest.COMPARISONS


def test_warmup_offers_the_gpus_whose_tiles_are_known():
    configs = pytest.importorskip("moe_unlearn.triton_kernels.configs", reason="Triton is not installed")
    assert options.GPUS == tuple(configs.GPUS)
    assert {configs.tiles_of(target.architecture) for target in configs.GPUS.values()} == {*configs.ARCHITECTURES}
