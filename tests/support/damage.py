"""Damage to the content of a file, as disks, copies and editors do it."""

import random

FORMS = ("flipped bit", "cut", "zeroed", "longer", "empty", "gone")


def damaged(content: bytes, form: str, draw: random.Random) -> bytes | None:
    """Return what is left of a file after damage at a place that is drawn; None if the file is gone."""
    left, at = bytearray(content), draw.randrange(len(content)) if content else 0
    if form == "gone":
        return None
    if form == "flipped bit" and content:
        left[at] ^= 1 << draw.randrange(8)
    elif form == "cut":
        del left[at:]
    elif form == "zeroed":
        left[at : at + 64] = bytes(len(left[at : at + 64]))
    elif form == "longer":
        left += bytes([draw.randrange(256)])
    elif form == "empty":
        left.clear()
    return bytes(left)
