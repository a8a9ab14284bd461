"""The largest of everything that a reader accepts: far above real checkpoints, far below what harms the host."""

from __future__ import annotations

SAFETENSORS_HEADER = 100_000_000
"""Bytes of a safetensors header; the reference implementation's own limit."""
JSON_FILE = 64 << 20
"""Bytes of a JSON file: a shard index of a model with 10^5 experts has about 30 MB."""
TOKENIZER_FILE = 128 << 20
"""Bytes of a file that a tokenizer is made of: the largest tokenizer.json have about 35 MB."""
JSON_DEPTH = 64
"""Objects and lists in one another: real configs have about ten, and Python's parser gives up near a thousand."""
JSON_FREE_VALUES = 1 << 16
"""Values in a JSON text however short it is: configs may hold lists of small numbers."""
JSON_BYTES_PER_VALUE = 6
"""Beyond those, bytes of text for each value. A tensor's entry has about twelve; `[],[],` has three, and would take
twenty times its own size in memory."""
DIMENSIONS = 8
"""Dimensions of a safetensors tensor; transformers' models have at most five."""
GGUF_HEADER = 256 << 20
"""Bytes of metadata and tensor headers together: a vocabulary of a million, with merges, takes about 60 MB."""
GGUF_FIELDS = 1 << 14
"""Metadata fields in a GGUF file; real ones have fewer than a hundred."""
GGUF_TENSORS = 1 << 16
"""Tensors in a GGUF file; experts are merged, so that the largest models have about two thousand."""
GGUF_KEY = 1024
"""Bytes of a metadata key; real ones have fewer than a hundred."""
GGUF_NAME = 64
"""Bytes of a tensor's name: ggml's GGML_MAX_NAME."""
GGUF_DIMENSIONS = 4
"""Dimensions of a tensor: ggml's GGML_MAX_DIMS."""
GGUF_STRING = 64 << 20
"""Bytes of a text: chat templates have up to 100 KB, a whole tokenizer.json (tokenizer.huggingface.json) some 30 MB."""
GGUF_TEXTS = 3 << 20
"""Texts in all arrays together: a vocabulary of a million has as many tokens and merges."""
GGUF_NUMBERS = 4 << 20
"""Numbers in all arrays together: a vocabulary of a million has as many scores and types."""
GGUF_ARRAYS = 1 << 16
"""Arrays inside of arrays; real files have none."""
GGUF_ARRAY_DEPTH = 4
"""Levels of arrays in arrays."""
GGUF_ALIGNMENT = 1 << 20
"""Bytes; real files say 32 or 64."""
SHARDS = 10_000
"""Files that one checkpoint is spread over; the largest have a few hundred."""
