"""Kernels written in portable code, shared by all platforms."""
