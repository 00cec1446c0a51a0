"""`moe-unlearn kernels`, the tool for regressions of kernels."""

import argparse

from moe_unlearn.regress import command


def run(options: argparse.Namespace) -> int:
    """Test kernels, ours or yours, for regressions: are they as right, as fast and as lean as they were?"""
    return command.run(options)
