"""convert: a checkpoint of one format as one of another, the same numbers in both, or a Refusal.

Modules go through one at a time, into a folder that appears when all of it has been written and read back.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.kv_scales import CHOICES, KvScales, spelled
from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.checkpoint.shards import safe_shard
from qcore.checkpoint.tokenizer import is_fault
from qcore.checkpoint.writer import AtomicFolder, SafetensorsWriter, write_json, writing
from qcore.discovery import registry
from qcore.layouts.unblocked import unblocked, unblocked_scheme
from qcore.method import Method, ModulePlan, is_embedding
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    import torch

log = logging.getLogger("qcore")

Progress = Callable[[str, int, int], None]
"""Called with a module's name, and how many of how many are done."""

_CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE", "README.md",
)  # fmt: skip
"""Files that belong to the model whatever its weights' format."""


def convert(
    source: str | Path | Checkpoint,
    format: str,
    out: str | Path,
    *,
    progress: Progress | None = None,
    verify: bool = True,
) -> Path:
    """The checkpoint written as `format` into the new folder `out`, which is returned; `gguf` is a file.

    format: a method's name, or name:variant with one of those that it writes. Every quantized layer keeps its codes and
    scales; `dense` is float32, which holds what they stand for. verify: read all of it back and compare before `out`
    appears. Raises Refused: unknown-format, format-not-written, not-representable, output-exists, cannot-write, and all
    that reading gives.
    """
    method, variant = writer_of(format)
    source = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    cache = source.kv_cache or (CHOICES["fp8"] if source.kv_scales else None)
    if method.name == "gguf":
        from qcore.gguf.write import convert_gguf

        if cache is not None:
            method.encode_kv_cache(cache, source.kv_scales)  # refuses
        return convert_gguf(source, Path(out), progress=progress, verify=verify)
    plan = {module: _holdable(method, module, entry) for module, entry in source.layers.items()}
    if method.name != "dense" and cache is None and not any(entry.scheme for entry in plan.values()):
        raise Refused(
            Refusal("not-representable", "never", str(source.path), "nothing in the checkpoint is quantized",
                    f"found no quantized layer to write as {method.name}", "Quantize the model, or convert it to dense.")
        )  # fmt: skip
    if method.name == "dense":
        config: dict[str, Any] | None = None
    else:
        config = method.encode_config(plan, variant)
    kv_config, kv_tensors = method.encode_kv_cache(cache, source.kv_scales) if cache is not None else ({}, {})
    if config is not None:
        config = _with_kv_cache(method, config, kv_config)
    kept = [name for name in source.parameters if cache is None or spelled(name) is None]
    with AtomicFolder(Path(out)) as target:
        metadata = method.encode_metadata(plan, config, source.own_dtype) if config is not None else {}
        writer = SafetensorsWriter(target.folder, metadata=metadata)
        total = sum(scheme is not None for scheme in source.plan.values()) + len(kept)
        for done, label in enumerate(_add_all(writer, source, method, plan, config, kept), 1):
            if progress:
                progress(label, done, total)
        for name, tensor in kv_tensors.items():
            writer.add(name, tensor)
        writer.close()
        _write_configs(source, target.folder, config)
        for name, content in method.encode_files(config).items() if config is not None else ():
            write_json(target.folder / name, content)
        if verify:
            _compare(source, open_checkpoint(target.folder), method, kept)
    return target.out


def check_written(source: Checkpoint, format: str) -> None:
    """Whether the format holds the schemes of the checkpoint's layers and of its kv cache, of which none is read. Raises Refused as `convert` does."""
    method, variant = writer_of(format)
    cache = source.kv_cache
    kv_config = {} if cache is None else method.encode_kv_cache(cache, {"attention": KvScales.ones(cache)})[0]
    if method.name not in ("dense", "gguf"):
        plan = {module: _holdable(method, module, entry) for module, entry in source.layers.items()}
        _with_kv_cache(method, method.encode_config(plan, variant), kv_config)


def _with_kv_cache(method: Method, config: Mapping[str, Any], kv_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what declares a kv cache. Raises Refused (not-representable) where weights and cache would share a word, and have two."""
    for key, word in kv_config.items():
        if isinstance(word, str) and config[key] != word:
            raise Refused(Refusal("not-representable", "never", "the kv cache", f"{method.name} has one {key} for weights and kv cache",
                                  f"found {config[key]} and {word}", "Choose a kv cache of the weights' kind, or another format."))  # fmt: skip
    return {**config, **kv_config}


def writer_of(format: str) -> tuple[Method, str]:
    """The method and the variant of NAME or NAME:VARIANT. Raises Refused (unknown-format) with those that there are."""
    methods = {method.name: method for method in registry().methods}
    name, _, variant = format.partition(":")
    if name not in methods:
        raise Refused(Refusal("unknown-format", "usage", format, "there is no checkpoint format of this name",
                              fix=f"Name one of: {', '.join(sorted(methods))}."))  # fmt: skip
    if variant and variant not in methods[name].written:
        known = ", ".join(f"{name}:{written}" for written in methods[name].written)
        raise Refused(Refusal("unknown-format", "usage", format, f"{name} has no such variant that is written",
                              fix=f"Name {name}{known and f', or one of: {known}'}."))  # fmt: skip
    return methods[name], variant


def _holdable(method: Method, module: str, entry: ModulePlan) -> ModulePlan:
    """The plan of a layer in the format: without ggml's blocks, and without embeddings that are quantized where it has none."""
    if entry.scheme is None or method.name == "dense":
        return entry
    if len(entry.shape) > 2 and not method.stacked:
        raise Refused(Refusal("not-representable", "notimpl", module, f"{method.name} is not written with experts stacked",
                              f"found {list(entry.shape)}", "Choose another format, such as dense."))  # fmt: skip
    if is_embedding(module) and not method.embeddings:
        log.warning(
            "%s becomes a plain float32 matrix of the same numbers: %s has no quantized embeddings", module, method.name
        )
        return replace(entry, scheme=None, reason="stored unquantized")
    return replace(entry, scheme=unblocked_scheme(entry.scheme))


def _add_all(
    writer: SafetensorsWriter,
    source: Checkpoint,
    method: Method,
    plan: Mapping[str, ModulePlan],
    config: Mapping[str, Any] | None,
    kept: list[str],
) -> Iterator[str]:
    """The tensors of each layer that was quantized, and what is as it was, by the names of what has been written; one layer, or a piece of a tensor, is in memory at a time."""
    for module, scheme in source.plan.items():
        if scheme is not None:
            plain = config is None or plan[module].scheme is None
            tensors = _dense(source, module) if plain else _encoded(source, method, module, config or {})
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            yield module
    for name in kept:
        writer.add_pieces(name, source.pieces(name), source.parameters[name].nbytes)
        yield name


def _encoded(source: Checkpoint, method: Method, module: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    layer = source.layer(module)
    return method.encode(module, replace(layer, weight=unblocked(layer.weight)), config)


def _dense(source: Checkpoint, module: str) -> dict[str, torch.Tensor]:
    layer = source.layer(module)
    if layer.input_multiplier is not None:
        raise Refused(Refusal("not-representable", "never", module, "a plain matrix has no vector that multiplies its input",
                              fix="Choose the format that the checkpoint is in, or modelopt."))  # fmt: skip
    dense = {f"{module}.weight": layer.weight.dequantize()}
    return dense if layer.bias is None else {**dense, f"{module}.bias": layer.bias}


def _write_configs(source: Checkpoint, folder: Path, quantization: Mapping[str, Any] | None) -> None:
    config = dict(source.config)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    else:
        config["dtype"] = "float32" if source.method != "dense" else config.get("dtype", "float32")
        config.pop("torch_dtype", None)
    write_json(folder / "config.json", config)
    home = source.files.folder
    if not source.files.path.is_dir():
        _write_tokenizer(source, folder)
        return
    for name in _CARRIED:
        if (home / name).is_file():
            own = safe_shard(home, name, named_by=home)  # a link might lead to what is nobody's to pass on
            with writing(folder):
                shutil.copyfile(own, folder / name)


def _write_tokenizer(source: Checkpoint, folder: Path) -> None:
    """The tokenizer that a file carries, as transformers saves it. Raises Refused (cannot-write)."""
    tokenizer = source.load_tokenizer()
    try:
        tokenizer.save_pretrained(str(folder))
    except BaseException as error:
        if not is_fault(error):
            raise
        raise Refused(
            Refusal("cannot-write", "usage", str(folder), "the tokenizer cannot be written", f"{type(error).__name__}: {error}",
                    "Free some space there, or choose a folder on another disk.")
        ) from error  # fmt: skip


def _compare(source: Checkpoint, written: Checkpoint, method: Method, kept: list[str]) -> None:
    """Reads everything back. Raises Refused (not-representable) where a number has changed."""
    import torch

    for module, entry in source.layers.items():
        same = written.layers.get(module)
        if same is None:
            _changed(method, module, "its weight")
        if entry.scheme is None and written.plan[module] is None:
            continue  # one of those that are kept
        if entry.scheme is None or written.plan[module] is None:
            if not torch.equal(source.dequantize(module), written.dequantize(module)):
                _changed(method, module, "its weight")
            continue
        before, after = source.layer(module), written.layer(module)
        ours, theirs = before.weight, after.weight
        if (
            ours.scheme.weight == theirs.scheme.weight
        ):  # in which order scales multiply is the format's, and no number in it
            ours = replace(ours, coarse_first=theirs.coarse_first)
        if not torch.equal(ours.dequantize(), theirs.dequantize()):
            _changed(method, module, "its weight")
        if before.weight.scheme.input != after.weight.scheme.input:
            _changed(method, module, f"its inputs' scheme {before.weight.scheme.input}")
        for part in ("bias", "input_scale", "input_zero", "input_multiplier"):
            if not _same(getattr(before, part), getattr(after, part)):
                _changed(method, module, f"its {part}")
    if source.kv_cache is not None and source.kv_cache != written.kv_cache:
        _changed(method, "the kv cache", f"its scheme {source.kv_cache}")
    for attention, own in source.kv_scales.items():
        again = written.kv_scales.get(attention)
        for side in ("k", "v"):
            if again is None:
                _changed(method, attention, f"its {side} cache's scale")
            cache, copy = getattr(own, side), getattr(again, side)
            if not _same(cache.scale, copy.scale) or not _same(cache.zero, copy.zero):
                _changed(method, attention, f"its {side} cache's scale or zero point")
    for name in kept:
        if name not in written.parameters or not _all_same(source.pieces(name), written.pieces(name)):
            _changed(method, name, "its values")


def _same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    """Whether both hold the same numbers, or neither does."""
    import torch

    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours.float(), theirs.float())


def _all_same(ours: Iterator[torch.Tensor], theirs: Iterator[torch.Tensor]) -> bool:
    """Whether two tensors are equal, of which some rows are given after the other."""
    import torch

    nothing = torch.empty(0)
    return all(torch.equal(*pair) for pair in zip_longest(ours, theirs, fillvalue=nothing))


def _changed(method: Method, subject: str, what: str) -> None:
    raise Refused(
        Refusal("not-representable", "never", subject, f"{method.name} does not hold it without changing its numbers",
                f"found that {what} would not be the same when read back", "Choose another format.")
    )  # fmt: skip
