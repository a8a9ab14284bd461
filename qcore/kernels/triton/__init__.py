"""Kernels in Triton, which the plugins of GPUs share: one file for each family. Nothing of Triton is imported before a kernel is loaded."""
