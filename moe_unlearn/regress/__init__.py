"""Test kernels for regressions: check that a kernel, ours or yours, is as right, as fast and as lean as it was."""
