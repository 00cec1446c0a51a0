"""Adapters between ops and their C++ kernels, where a plain call is not enough; imported when a kernel first runs."""
