"""The environment of a figure, and what of it forbids a comparison."""

import getpass
import platform

import pytest
import torch

from moe_unlearn.regress.fingerprint import INFORMATIVE, fingerprint, mismatch, throttled

pytestmark = pytest.mark.quick


def test_plain_strings_that_name_no_machine():
    found = fingerprint()
    assert all(isinstance(part, str) and part for pair in found.items() for part in pair)
    assert found == fingerprint()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = ""
    assert platform.node() not in found.values() and user not in found.values()
    assert found["threads"] == str(torch.get_num_threads())


def test_each_blocking_field_is_named_when_it_differs():
    base = fingerprint()
    for field in base:
        head = base | {field: "other"}
        line = f"{field}: {base[field]} -> other"
        assert mismatch(base, head) == ([] if field in INFORMATIVE else [line])
        assert mismatch(base, head, informative=True) == [line]


def test_threads_change_the_fingerprint():
    threads, base = torch.get_num_threads(), fingerprint()
    torch.set_num_threads(threads + 1)
    try:
        assert mismatch(base, fingerprint()) == [f"threads: {threads} -> {threads + 1}"]
    finally:
        torch.set_num_threads(threads)


def test_a_field_that_was_not_recorded_blocks():
    assert mismatch({"cpu": "x"}, {"cpu": "x", "driver": "1"}) == ["driver: not recorded -> 1"]


def test_a_cpu_is_never_throttled():
    assert throttled("cpu") == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_described():
    found = fingerprint("cuda")
    assert found["gpu"] == torch.cuda.get_device_name() and found["driver"] != "unknown"
    assert "device: cpu -> cuda" in mismatch(fingerprint(), found)
