"""Kernels for Intel Gaudi: one file for each family of `torch.ops.hpu`'s operators."""
