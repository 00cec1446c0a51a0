"""Amounts of memory in words: MiB up to 10 GiB, GiB beyond, since nobody reads 58235.27 MiB as the size of a GPU."""

_MIB, _GIB = 2**20, 2**30
_LARGE = 10 * _GIB


def scale(most: int) -> tuple[str, int]:
    """Return the unit of a table whose largest amount has `most` bytes, and the bytes of the unit."""
    return ("GiB", _GIB) if most > _LARGE else ("MiB", _MIB)


def amount(size: float) -> str:
    """Return bytes as a number and its unit."""
    unit, one = scale(int(size))
    return f"{size / one:.2f} {unit}"
