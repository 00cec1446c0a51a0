"""The command line.

`main` has the parser and most verbs, `evaluate` and `alternates` one verb each, `arguments` the options they share.
"""

from moe_unlearn.cli.main import main

__all__ = ["main"]
