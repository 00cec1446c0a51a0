"""Costs of `masked_update`, which multiplies no matrices."""


def bytes_per_weight(weight: int, state: int = 0, gradient: int = 0, touched: float = 1.0) -> float:
    """Return the least bytes that an update moves for each weight.

    `weight`, `state` and `gradient` are a weight's bytes in each. Of the fraction `touched`, weight and state are read
    and written and the gradient is read; of every weight one bit of mask is read.
    """
    return (2 * (weight + state) + gradient) * touched + 1 / 8
