"""convert --format gguf: a checkpoint as one GGUF file, the same numbers in both, or a Refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.gguf_writer import GgufTensor, write_gguf
from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.checkpoint.writer import atomic_file
from qcore.gguf.contents import Contents, contents_of, is_stack, stored_rows
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, and how many of how many are done."""

_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "MXFP4": 38,
    "NVFP4": 39,
}
"""llama.cpp's number for a file whose matrices are mostly of one type; readers only show it."""
_VERSION = 2
"""general.quantization_version: of ggml's block layouts, the current one."""


def convert_gguf(source: Checkpoint, out: Path, *, progress: Progress | None = None, verify: bool = True) -> Path:
    """Writes the checkpoint to the file `out`, which is returned. Block types go over bit for bit, floats as they are;
    other schemes where a block type holds them exactly.

    Raises Refused: not-representable, unknown-architecture, output-exists, cannot-write, and all that reading gives.
    """
    contents = contents_of(source)
    types = {}
    for done, tensor in enumerate(contents.shapes, 1):
        types[tensor] = contents.exact_type(tensor)
        if progress:
            progress(tensor, done, 2 * len(contents.shapes))

    def write(path: Path) -> None:
        second = _second_half(progress)
        write_tensors(path, contents, types, lambda tensor: contents.exact(tensor, types[tensor]), {}, second)
        if verify:
            _compare(contents, open_checkpoint(path))

    atomic_file(Path(out), write)
    return Path(out).absolute()


def write_tensors(
    path: Path,
    contents: Contents,
    types: Mapping[str, str],
    read: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    """Writes a file of these types. read: gives a tensor in pieces. metadata: fields beside those of the contents, or in
    their place."""
    fields = dict(contents.metadata)
    if not isinstance(contents.source.files.source, GgufSource):
        fields["general.file_type"] = _file_type(types, contents.shapes)
        if any(kind.lower() in BLOCK_TYPES for kind in types.values()):
            fields["general.quantization_version"] = _VERSION
    fields |= metadata
    total = len(contents.shapes)

    def pieces(done: int, tensor: str) -> Iterator[torch.Tensor]:
        yield from read(tensor)
        if progress:
            progress(tensor, done, total)

    tensors = [
        GgufTensor(tensor, types[tensor], shape, lambda done=done, tensor=tensor: pieces(done, tensor))  # type: ignore[misc]
        for done, (tensor, shape) in enumerate(contents.shapes.items(), 1)
    ]
    try:
        write_gguf(path, fields, tensors)
    except ValueError as error:  # a name that is too long, rows that are no whole blocks
        raise Refused(Refusal("not-representable", "never", str(contents.source.path), "GGUF cannot hold the model",
                              str(error), "Keep the model in safetensors.")) from error  # fmt: skip


def _file_type(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of the type that most weights have."""
    counts: dict[str, int] = {}
    for tensor, shape in shapes.items():
        if len(shape) > 1 and tensor.endswith(".weight"):
            kind = types[tensor].upper()
            counts[kind] = counts.get(kind, 0) + prod(shape)
    return _FILE_TYPES.get(max(counts, key=lambda kind: counts[kind]), 0)


def _second_half(progress: Progress | None) -> Progress | None:
    """Every tensor is looked at once to find its type, and once more to be written."""
    if progress is None:
        return None
    return lambda label, done, total: progress(label, total + done, 2 * total)


def _compare(contents: Contents, written: Checkpoint) -> None:
    """Reads everything back. Raises Refused (not-representable) where a number has changed."""
    import torch

    source = contents.source
    if isinstance(source.files.source, GgufSource):
        for tensor in contents.shapes:
            before, after = (file.files.source.read(tensor).view(torch.uint8) for file in (source, written))
            if not torch.equal(before, after):
                _changed(tensor)
        return
    for name, place in contents.parameters.items():
        if is_stack(place.tensor):
            assert isinstance(written.files.source, GgufSource)
            pairs = zip(contents.rows(place.tensor), stored_rows(written.files.source, place.tensor), strict=True)
            if not all(torch.equal(before, after) for before, after in pairs):
                _changed(contents.original(place.tensor))
            continue
        origin = contents.origins[place.tensor][0]
        if origin.part == "weight" and origin.module in source.layers:
            module = name.removesuffix(".weight")  # a matrix of one row is a vector in the file
            before = source.dequantize(origin.module)
            after = written.dequantize(module) if module in written.layers else written.parameter(name)
        elif source.plan.get(origin.module) is not None:
            bias, module = source.layer(origin.module).bias, name.removesuffix(".bias")
            stored = written.parameter(name) if written.plan[module] is None else written.layer(module).bias
            if stored is None:
                _changed(origin.name)
            before, after = torch.zeros_like(stored) if bias is None else bias, stored
        else:
            before, after = source.parameter(origin.name), written.parameter(name)
        # Gemma's norms lose the last bits of w, and nothing of 1 + w, which is what the model multiplies with.
        if not torch.equal(before.float() - place.add, after.float() - place.add):
            _changed(origin.name)
    written.load_tokenizer()


def _changed(subject: str) -> NoReturn:
    raise Refused(
        Refusal("not-representable", "never", subject, "the file does not hold it without changing its numbers",
                "found that its values would not be the same when read back", "Keep the model in safetensors.")
    )  # fmt: skip
