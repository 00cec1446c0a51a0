"""Costs of `weight_score`, which multiplies no matrices."""


def bytes_moved(weights: int, element: int) -> int:
    """Return the least bytes of one pass over the scores, whose three terms have `element` bytes each."""
    return 3 * weights * element
