"""How many kernels were compiled is counted by what Triton itself tells."""

import pytest

from tests.support.triton_cache import CacheCount

pytestmark = pytest.mark.quick


def test_what_triton_tells_is_counted_and_passed_on(monkeypatch):
    knobs = pytest.importorskip("triton.knobs", reason="Triton is not installed")
    heard = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **known: heard.append(known["cache_hit"]))
    count = CacheCount()
    for hit in (True, False, False):
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
    assert count.taken() == (1, 2) and count.taken() == (0, 0) and heard == [True, False, False]


def test_triton_s_compiler_calls_the_listener_by_these_names():
    compiler = pytest.importorskip("triton.compiler.compiler", reason="Triton is not installed")
    import inspect

    assert "cache_hit=" in inspect.getsource(compiler.compile) and "listener" in inspect.getsource(compiler.compile)
