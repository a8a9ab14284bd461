"""The largest of everything that a reader accepts: far above real checkpoints, far below what harms the host."""

from __future__ import annotations

SAFETENSORS_HEADER = 100_000_000
"""Bytes of a safetensors header; the reference implementation's own limit."""
JSON_FILE = 64 << 20
"""Bytes of a JSON file: a shard index of a model with 10^5 experts has about 30 MB."""
DIMENSIONS = 8
"""Dimensions of a tensor; ggml has four, transformers' models at most five."""
GGUF_TENSORS = 1 << 20
"""Tensors in a GGUF file."""
GGUF_FIELDS = 1 << 16
"""Metadata fields in a GGUF file; real ones have fewer than a hundred."""
GGUF_NAME = 1024
"""Bytes of a key or tensor name; ggml itself allows 64 for tensors."""
GGUF_ARRAY = 1 << 22
"""Values in a metadata array; the largest vocabularies have about a million tokens."""
GGUF_ARRAY_DEPTH = 4
"""Arrays in arrays; real files have none."""
GGUF_ALIGNMENT = 1 << 20
"""Bytes; real files say 32 or 64."""
GGUF_HEADER = 1 << 30
"""Bytes of metadata and tensor headers together."""
SHARDS = 100_000
"""Files that one checkpoint is spread over."""
