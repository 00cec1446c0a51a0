"""Mutants that compute the same: nothing can tell them from the kernel, for the reason given."""

# (file, kernel, line before, line after) -> reason
EQUIVALENT: dict[tuple[str, str, str, str], str] = {}
