"""Packages only: everything declarative is in pyproject.toml.

`triton_kernels/` is installed as `moe_unlearn.triton_kernels`: a top-level package of that name would
shadow triton-lang's own, whose presence other libraries probe for.
"""

from setuptools import find_packages, setup

packages = find_packages(include=["moe_unlearn", "moe_unlearn.*"])
setup(
    packages=[*packages, "moe_unlearn.triton_kernels"],
    package_dir={"moe_unlearn.triton_kernels": "triton_kernels"},
)
