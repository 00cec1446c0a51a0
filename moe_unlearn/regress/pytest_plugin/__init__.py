"""Provide the pytest plugin, installed as `pytest_moe_unlearn`."""

from pytest_moe_unlearn.kernel_case import kernel_case, pytest_addoption, pytest_configure, pytest_generate_tests

__all__ = ["kernel_case", "pytest_addoption", "pytest_configure", "pytest_generate_tests"]
