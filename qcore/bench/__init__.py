"""Measurements of this host's kernels, beside those of others."""
