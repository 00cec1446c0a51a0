"""Parses a command line; what it does not know ends with one line, which names what was meant where that is known."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

_VALUE = "VALUE"


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line with the way to --help, since the usage of a verb hides what was wrong.

    It knows options by their whole names alone: `sweep --seed 3` is not --seeds.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parsed(parser: Parser, given: Sequence[str]) -> argparse.Namespace:
    """Return the options; exit with code 2 if some are unknown, and say what each is or what is spelled like it."""
    options, unknown = parser.parse_known_args(given)
    if unknown:
        verb = _verb_of(parser, options.command)
        names = dict.fromkeys(word.partition("=")[0] for word in unknown if word.startswith("--"))
        hints = [hint for name in names if (hint := _hint(verb, name, given))]
        verb.error(": ".join([f"unrecognized arguments: {' '.join(unknown)}", *([", ".join(hints)] if hints else [])]))
    return options


def _verb_of(parser: Parser, name: str) -> Parser:
    [verbs] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found: Parser = verbs.choices[name]
    return found


def _hint(verb: Parser, name: str, given: Sequence[str]) -> str:
    """Return what an unknown option may have meant: keys of the recipe where the verb has --set, and options.

    Of options these are those that begin as it does, else the one that is spelled most like it.
    """
    known = verb._option_string_actions
    begun = [option for option in known if option.startswith(name)]
    near = " or ".join(begun or difflib.get_close_matches(name, known, n=1, cutoff=0.7))
    meant = f"did you mean {near}?" if near else ""
    if "--set" in known and (keys := _keys(name.removeprefix("--").replace("-", "_"))):
        value = _value_of(name, given)
        told = f"{name} is a key of the recipe, give --set {' or --set '.join(f'{key}={value}' for key in keys)}"
        return f"{told}; or {meant}" if begun else told
    return meant


def _keys(name: str) -> list[str]:
    """Return the full names of the recipe's keys that are called so, in full or in their section."""
    from moe_unlearn.config import keys  # here, since few command lines ask for it

    return [key.name for key in keys.table() if name in (key.name, key.name.rpartition(".")[2])]


def _value_of(name: str, given: Sequence[str]) -> str:
    """Return the value that was given to an option: behind its "=", or the next word."""
    for word, after in zip(given, [*given[1:], ""], strict=True):
        own, equals, value = word.partition("=")
        if own == name:
            return value if equals else after if after and not after.startswith("--") else _VALUE
    return _VALUE
