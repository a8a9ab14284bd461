"""Small changes of whole checkpoints, made in memory: a value of a config, a tensor's header or bytes, bytes of a file."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 16, 48, 1 << 31, 1 << 40, 1 << 64, -(1 << 70), 0.5, 32.0, 1e308, float("nan"),
    float("inf"), "", "4", "gemm", "e5m2", "re:(", "re:.*", "re:(.*)*x", "\u0000", "é" * 50, [], [None], ["lm_head"], [1], [[]],
    [0, 0], {}, {"bits": 4}, {"": {"": None}}, {"_data": []}, {"_type": "PerBlock", "_data": {"block_size": []}},
)  # fmt: skip
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4,
         "I32": 4, "U32": 4, "I64": 8, "F64": 8}  # fmt: skip
FILLS = (b"\0", b"\xff", b"\x7f", b"\x80", b"\x7f\xc0", b"\x01")
"""What a tensor's bytes may be replaced by: zeros, -1 or NaN, the largest, the smallest, odd floats."""
INTEGERS = (0, 1, 2, 255, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, 1 << 63, (1 << 64) - 1)


@dataclass
class Held:
    """One tensor."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Sample:
    """A safetensors checkpoint of one file."""

    config: dict[str, Any]
    tensors: dict[str, Held]
    metadata: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Sample:
        raw = (folder / "model.safetensors").read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        metadata = header.pop("__metadata__", None) or {}
        tensors = {
            name: Held(entry["dtype"], entry["shape"], raw[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]])
            for name, entry in header.items()
        }  # fmt: skip
        return cls(json.loads((folder / "config.json").read_text()), tensors, metadata)

    def copy(self) -> Sample:
        tensors = {name: Held(held.dtype, list(held.shape), held.data) for name, held in self.tensors.items()}
        return Sample(copy.deepcopy(self.config), tensors, dict(self.metadata))

    def files(self) -> dict[str, bytes]:
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        offset = 0
        for name, held in self.tensors.items():
            header[name] = {"dtype": held.dtype, "shape": held.shape, "data_offsets": [offset, offset + len(held.data)]}
            offset += len(held.data)
        text = json.dumps(header).encode()
        data = b"".join(held.data for held in self.tensors.values())
        return {"config.json": json.dumps(self.config).encode(),
                "model.safetensors": struct.pack("<Q", len(text)) + text + data}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def change_value(root: Any, chance: random.Random, *, keep: tuple[Any, ...] = ()) -> None:
    """One value in a JSON object is replaced, removed, renamed or added."""
    found = [place for place in places(root) if place != keep]
    if not found:
        return
    *way, last = chance.choice(found)
    parent = root
    for step in way:
        parent = parent[step]
    kind = chance.random()
    if kind < 0.15:
        del parent[last]
    elif kind < 0.2 and isinstance(parent, dict):
        parent[chance.choice(("", "x", ".*", "re:(", "lm_head", "*" * 40))] = parent.pop(last)
    else:
        parent[last] = copy.deepcopy(chance.choice(ODD))


def change_config(sample: Sample, chance: random.Random) -> None:
    quantization = sample.config.get("quantization_config")
    inner = quantization is not None and chance.random() < 0.9
    change_value(quantization if inner else sample.config, chance, keep=("quant_method",))


def is_record(data: bytes) -> bool:
    """Whether a tensor's bytes are a JSON object, and not one that an earlier change has broken."""
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def change_metadata(sample: Sample, chance: random.Random) -> None:
    """A value of a record in the metadata (TorchAO), or of a quant_state in a tensor (bitsandbytes)."""
    records = [name for name, text in sample.metadata.items() if text.startswith("{")]
    states = [name for name, held in sample.tensors.items() if is_record(held.data)]
    if records:
        name = chance.choice(records)
        record = json.loads(sample.metadata[name])
        change_value(record, chance)
        sample.metadata[name] = json.dumps(record)
    elif states:
        held = sample.tensors[chance.choice(states)]
        state = json.loads(held.data)
        change_value(state, chance)
        held.data = json.dumps(state).encode()
        held.shape = [len(held.data)]
    else:
        change_config(sample, chance)


def change_tensor(sample: Sample, chance: random.Random) -> None:
    """One tensor is lost, renamed, cut, doubled, turned, flattened, retyped, filled or has a byte changed."""
    name = chance.choice(list(sample.tensors))
    held = sample.tensors.pop(name)
    way = chance.randrange(9)
    if way == 0:
        return
    if way == 1:
        name += chance.choice(("x", ".absmax", ".g_idx", "_scale", ".weight"))
    elif way == 2 and held.shape and held.shape[0]:
        rows = chance.choice((0, 1, held.shape[0] - 1))
        held.data, held.shape[0] = held.data[: len(held.data) // held.shape[0] * rows], rows
    elif way == 3:
        held.data, held.shape = held.data * 2, [*held.shape[:-1], held.shape[-1] * 2] if held.shape else [2]
    elif way == 4:
        held.shape = held.shape[::-1]
    elif way == 5:
        held.shape = chance.choice(([math.prod(held.shape)], [1, *held.shape], [*held.shape, 1]))
    elif way == 6:
        held.dtype = chance.choice([kind for kind, size in SIZES.items() if size == SIZES[held.dtype]])
    elif way == 7:
        held.data = (chance.choice(FILLS) * len(held.data))[: len(held.data)]
    elif held.data:
        held.data = flipped(held.data, chance, 0, len(held.data))
    sample.tensors[name] = held


WAYS: tuple[Callable[[Sample, random.Random], None], ...] = (change_config, change_metadata, change_tensor)


def flipped(data: bytes, chance: random.Random, start: int, stop: int) -> bytes:
    """A few bytes between the two places are changed."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        changed[chance.randrange(start, stop)] = chance.choice((0, 0xFF, 0x7F, chance.randrange(256)))
    return bytes(changed)


def mutated(sample: Sample, chance: random.Random) -> dict[str, bytes]:
    """The files of a changed checkpoint: three times of four by meaning, else byte by byte."""
    if chance.random() < 0.75:
        changed = sample.copy()
        for _ in range(chance.choice((1, 1, 2))):
            if changed.tensors:
                chance.choice(WAYS)(changed, chance)
        return changed.files()
    files = sample.files()
    name = chance.choice(list(files))
    data = files[name]
    header = len(data) if name == "config.json" else 8 + int.from_bytes(data[:8], "little")
    files[name] = data[: chance.randrange(len(data))] if chance.random() < 0.2 else flipped(data, chance, 0, header)
    return files


def put_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes the files anew: overwriting them would make some file systems flush each to the disk."""
    for name, data in files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)


def mutated_gguf(data: bytes, header: int, chance: random.Random) -> bytes:
    """A GGUF file with bytes or an integer of its header changed, its data changed, or its end cut off."""
    way = chance.random()
    if way < 0.5:
        return flipped(data, chance, 0, header)
    if way < 0.85:
        at, size = chance.randrange(header - 8), chance.choice((4, 8))
        return (
            data[:at] + (chance.choice(INTEGERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little") + data[at + size :]
        )
    return flipped(data, chance, header, len(data)) if way < 0.95 else data[: chance.randrange(len(data))]
