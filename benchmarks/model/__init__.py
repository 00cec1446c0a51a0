"""Predict what kernels take on a GPU that is not at hand: python -m benchmarks.model

Every figure of this package is a prediction and no measurement; `published` says how far predictions of kernels that
others have measured are off.
"""
