"""What a config may make transformers build: no more layers than a checkpoint can hold, no buffer of gigabytes, and nothing
with code from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    from qcore.checkpoint.open import Checkpoint

_COUNTS = re.compile(r"layer|depth|labels|attention_types")
"""Keys whose numbers transformers counts up to while it makes a config."""
_LEAST = 1024
"""Such a number that any config may have: it costs nothing, and tools leave those of larger models behind."""
_ELEMENTS = 1 << 28
"""Elements of a tensor that is made for a model's skeleton: the masks of some have tens of millions."""
_BY_VALUE, _BY_SHAPE = (torch.arange,), (torch.zeros, torch.ones, torch.full)


def check_counts(checkpoint: Checkpoint) -> None:
    """Raises Refused (bad-field) where the config has a count that would be counted up to for ever."""
    most = max(len(checkpoint.files.source.tensors), _LEAST)
    for key, value in _numbers(checkpoint.config, ""):
        if (value > most and _COUNTS.search(key)) or (value < 0 and key == "num_hidden_layers"):
            raise bad_file("bad-field", "the config has more layers than the checkpoint has tensors, or fewer than none",
                           file=checkpoint.path, field=key, found=value, expected=f"0 to {most}")  # fmt: skip


def check_code(checkpoint: Checkpoint) -> None:
    """Raises Refused (remote-code) where the config names a repository for transformers to fetch an implementation from:
    where the package `kernels` is installed, it would be downloaded and run."""
    for key, text in _implementations(checkpoint.config, ""):
        if "/" in text:
            raise Refused(
                Refusal("remote-code", "bad-file", str(checkpoint.path), "the config asks for code to be fetched, which is never done",
                        f"found {text!r:.200}, expected eager or sdpa", f"Remove {key} from config.json.",
                        str(checkpoint.files.folder / "config.json"), field=key)
            )  # fmt: skip


def check_size(func: Any, args: tuple[Any, ...]) -> None:
    """Raises ValueError before a tensor is made that is larger than any real model's buffer."""
    sizes = [size for size in _flat(args) if isinstance(size, int)]
    count = prod(sizes) if func in _BY_SHAPE else max(sizes, default=0) if func in _BY_VALUE else 0
    if count > _ELEMENTS:
        raise ValueError(f"a buffer of {count} elements")


def _numbers(value: object, key: str) -> Iterator[tuple[str, int]]:
    """Every whole number in a config, with the key that it stands under."""
    if type(value) is int:
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)


def _implementations(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Every text in a config that says how something is computed, with the key that it stands under."""
    if isinstance(value, str) and "implementation" in key:
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _implementations(inner, key if "implementation" in key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _implementations(inner, key)


def _flat(values: Any) -> Iterator[object]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value
