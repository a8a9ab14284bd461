"""CPU kernels: one file for each family of operators."""
