"""How many kernels Triton compiled, and how many it found compiled."""


class CacheCount:
    """Counts from its making on, in this process; nothing where Triton is not there or tells nothing."""

    def __init__(self):
        self._found = [0, 0]
        try:
            from triton import knobs
        except ImportError:
            return
        previous = knobs.compilation.listener

        def listen(*arguments, cache_hit: bool, **known) -> None:
            self._found[not cache_hit] += 1
            if previous is not None:
                previous(*arguments, cache_hit=cache_hit, **known)

        knobs.compilation.listener = listen

    def taken(self) -> tuple[int, int]:
        """Found and compiled since the last call."""
        hits, misses = self._found
        self._found[:] = 0, 0
        return hits, misses
