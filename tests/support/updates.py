"""Calls the masked updates with all numbers by keyword, as tables of cases hold them."""

import functools

from moe_unlearn.ops.masked_update import SGD, AdamW, Update


def by_keyword(function):
    """Return an update, or its reference, that takes the fields of its rule and of its `Update` as keywords."""
    kind = AdamW if "adamw" in function.__name__ else SGD

    @functools.wraps(function)
    def update(*arguments, **options):
        if "betas" in options:  # as torch's optimizer has them
            options["beta1"], options["beta2"] = options.pop("betas")
        numbers = [{name: options.pop(name) for name in one._fields if name in options} for one in (kind, Update)]
        return function(*arguments, rule=kind(**numbers[0]), update=Update(**numbers[1]), **options)

    return update
