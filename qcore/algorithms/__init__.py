"""Algorithms that make quantized weights: one file each, float weight in, QuantizedTensor out."""
