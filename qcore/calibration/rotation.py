"""rotated: a checkpoint whose hidden states are rotated, so that no few columns of them are larger than the others. It is the same model, and quantizes better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qcore.checkpoint.open import Checkpoint
from qcore.checkpoint.rotated import Change, RotatedSource
from qcore.refusal import Refusal, Refused, bad_file


def rotated(source: Checkpoint) -> Checkpoint:
    """The same model as if it lay rotated on the disk: each tensor is rotated when it is read.

    Layers of decoder blocks become float32, whatever they were; embeddings and the head keep their dtype, and a head that was tied has its own weight, for it takes
    over the last norm's gain. The rotation is the same each time.

    Raises Refused: bad-argument where the checkpoint is quantized; unknown-architecture where a rotation would change what the model says, or it holds tensors that are
    no part of it; missing-tensor, bad-shape; and what making the model gives.
    """
    if source.method != "dense" or source.kv_scales:  # values of heads have other ranges behind it
        found = source.method if source.method != "dense" else "scales of a kv cache"
        raise Refused(Refusal("bad-argument", "usage", str(source.path), "only unquantized checkpoints are rotated",
                              f"found {found}", "Write it anew with qcore convert --format dense."))  # fmt: skip
    from qcore.model.stream import Stream, not_rotated

    stream, files = Stream(source), source.files
    changes: dict[str, Change] = {}
    names: dict[str, str] = {}
    for name, info in files.source.tensors.items():
        place = stream.parameter(name)
        if place is None:
            if len(info.shape) > 1:
                raise not_rotated(source, f"{name}, which is no part of {type(stream.model).__name__}")
        elif place.change is not None:
            if place.shape != info.shape:
                raise bad_file("bad-shape", "the tensor is not of the model's size", file=info.file, tensor=name, field="shape",
                               found=list(info.shape), expected=list(place.shape))  # fmt: skip
            names[place.name], changes[name] = name, place.change
    config, copies = {**files.config, "dtype": source.own_dtype}, {}
    if stream.tied is not None:
        head, embedding = stream.tied
        config = _untied(config)
        own = stream.parameter(head)
        if head not in names and embedding in names and own is not None and own.change is not None:
            names[head], copies[head], changes[head] = head, names[embedding], own.change
    for name, change in changes.items():
        if change.gain and change.gain not in names:
            raise bad_file("missing-tensor", "the model needs a tensor that the checkpoint does not hold", file=source.path,
                           tensor=change.gain)  # fmt: skip
        changes[name] = replace(change, gain=names.get(change.gain, ""))
    return source.with_files(replace(files, source=RotatedSource(files.source, changes, copies), config=config))


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, wherever it says that head and embedding are one."""
    nested = {key: _untied(value) for key, value in config.items() if key == "text_config" and isinstance(value, dict)}
    return {**config, **nested, "tie_word_embeddings": False}
