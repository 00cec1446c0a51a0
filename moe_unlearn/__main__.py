"""`python -m moe_unlearn`, which is `moe-unlearn`; `torchrun -m moe_unlearn` starts it on several ranks."""

from moe_unlearn.cli import program

if __name__ == "__main__":
    program()
