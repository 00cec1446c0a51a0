"""Triton's interpreter without what it does again and again; kernels compute the same."""

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest


@contextlib.contextmanager
def thrifty() -> Iterator[None]:
    """Patch triton.language once per launch, and look up each dtype's NumPy dtype once.

    The interpreter replaces all of triton.language at every call of a device function too, `tl.sum` among them: within
    a launch that is done already. A third of the time of many a kernel goes there.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original_patch = interpreter._patch_lang
    # what a device function sees besides the kernel: the functions of `tl.standard` see tl.core
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    launches = []
    original_dtype = interpreter._get_np_dtype
    of_scalars = functools.cache(original_dtype)

    def patch_lang(function):
        if not launches:
            scope = original_patch(everything)
            launches.append(scope)
            restore = scope.restore
            scope.restore = lambda: (launches.clear(), restore())
        return launches[0]

    def get_np_dtype(dtype):
        # a block has its elements' dtype; pointers have no hash, and are answered at once
        scalar = dtype.scalar
        return original_dtype(scalar) if scalar.is_ptr() else of_scalars(scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_lang)
        patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)
        yield
