"""Reference implementations in tiles: as exact as the formulas at once, in little memory, on every device."""
