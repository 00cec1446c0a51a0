"""What lies between an op and its C++ kernel, where that is more than a call: imported when the kernel first runs."""
