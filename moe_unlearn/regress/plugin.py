"""Offer the plugin of `pytest_moe_unlearn` to `-p moe_unlearn.regress.plugin` where no entry point is installed."""

from pytest_moe_unlearn import (
    kernel_case,
    pytest_addoption,
    pytest_configure,
    pytest_generate_tests,
)

__all__ = ["kernel_case", "pytest_addoption", "pytest_configure", "pytest_generate_tests"]
