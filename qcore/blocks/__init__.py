"""ggml's self-contained blocks: scales and codes interleaved, as GGUF files store quantized weights.

`types` holds the facts (it imports no torch); `dequantize` turns blocks into numbers, and so defines each type.
"""
