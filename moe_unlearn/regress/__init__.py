"""Kernel regression testing: is a kernel, ours or yours, as right, as fast and as lean as it was?"""
