"""The command line: `main` has the verbs, `evaluate` and `alternates` one each, `arguments` what several take."""

from moe_unlearn.cli.main import main

__all__ = ["main"]
