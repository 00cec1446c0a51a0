"""Launch our own kernels for the static tool to compile.

A module is named after the file of `triton_kernels` it is about and holds CASES: name -> function that calls the
op's launchers on empty CPU tensors of production shapes. Launches are recorded, not run.
"""
