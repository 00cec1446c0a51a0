"""`python -m moe_unlearn`, which is `moe-unlearn`; `torchrun -m moe_unlearn` starts it on several ranks."""

import sys

from moe_unlearn.cli import main

if __name__ == "__main__":
    sys.exit(main())
