"""Kernels for Intel GPUs: one file for each family of operators."""
