"""Triton kernels, one file per op; installed as `moe_unlearn.triton_kernels`."""
