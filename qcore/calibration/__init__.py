"""Calibration: a model reads a text block by block, and its layers are quantized by what they see."""
