"""Calibration: a model reads a text block by block, and its layers are quantized by what they see."""

SAMPLES, SEQLEN = 512, 2048
"""Windows of the calibration text, and tokens of one: LLM Compressor's usual ones."""
ITERATIONS = 200
"""Steps in which auto_round learns a block's roundings, as its authors have it."""
