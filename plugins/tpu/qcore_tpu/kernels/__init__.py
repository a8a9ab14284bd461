"""Kernels for TPUs: one product in Pallas, and for each family of elements the layer that is repacked for it."""
