"""Reference implementations that compute in tiles: exact like the plain formulas, in little memory, on every device."""
