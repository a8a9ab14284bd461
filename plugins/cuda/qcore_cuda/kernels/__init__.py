"""Kernels for NVIDIA GPUs: one file for each family of operators."""
