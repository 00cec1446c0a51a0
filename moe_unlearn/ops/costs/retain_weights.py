"""Costs of `retain_weights`, which multiplies no matrices."""


def bytes_moved(tokens: int, experts: int, *, weights: bool) -> float:
    """Return the least bytes of one pass: a bit for each token and expert read, a weight for each token written."""
    return tokens * (experts / 8 + (4 if weights else 0))
