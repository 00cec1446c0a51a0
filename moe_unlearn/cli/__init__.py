"""The command line.

`main` has the parser and most verbs, `evaluate` and `alternates` one verb each, `arguments` the options they share;
`program` is `main` for a whole process.
"""

from moe_unlearn.cli.main import main, program

__all__ = ["main", "program"]
