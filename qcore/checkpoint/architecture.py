"""Which of transformers' models a checkpoint's config asks for, and what a config may not: code, and counting for ever."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qcore.checkpoint import rope
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qcore.checkpoint.open import Checkpoint

log = logging.getLogger("qcore")

_COUNTS = re.compile(r"layer|depth|labels|attention_types")
"""Keys whose numbers transformers counts up to while it makes a config."""
_LEAST = 1024
"""Such a number that any config may have: it costs nothing, and tools leave those of larger models behind."""


def model_class(checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The transformers class that the config asks for, imported, and the config. Code from the checkpoint is never run.

    Raises Refused (unknown-architecture, remote-code, bad-field).
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    _check_counts(checkpoint)
    _check_code(checkpoint)
    values = {k: v for k, v in checkpoint.config.items() if k not in ("dtype", "torch_dtype", "auto_map")}
    model_type = values.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    config_class = CONFIG_MAPPING[model_type] if known else None
    if config_class is None or config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        code, reason = "unknown-architecture", "the installed transformers has no causal language model of this type"
        if "auto_map" in checkpoint.config:
            code, reason = "remote-code", "its classes are Python code in the checkpoint, which is never run"
        raise Refused(
            Refusal(code, "notyet", str(checkpoint.path), reason, f"found model_type {model_type!r}",
                    "Upgrade transformers if a newer one has this type.", str(checkpoint.files.quantization_file),
                    field="model_type")
        )  # fmt: skip
    values = _with_rope(checkpoint, values)
    try:
        config = config_class.from_dict(values)
    except Exception as error:  # which one depends on the value and on transformers' version
        raise unbuildable(checkpoint, error) from error
    return MODEL_FOR_CAUSAL_LM_MAPPING[config_class], config


def _with_rope(checkpoint: Checkpoint, values: dict[str, Any]) -> dict[str, Any]:
    """The config with its rotary embedding where this transformers looks for it, of which version 4 would say nothing."""
    import transformers

    file = checkpoint.files.folder / "config.json"
    for doubt in rope.contradictions(values):
        log.warning("%s: %s", file, doubt)
    if int(transformers.__version__.split(".")[0]) > 4:
        return values
    try:
        return rope.of_version_4(values)
    except ValueError as error:
        raise Refused(
            Refusal("unknown-architecture", "notyet", str(checkpoint.path), "its layers differ in their rotary embeddings",
                    f"found {error}, which transformers {transformers.__version__} cannot say",
                    "Install transformers 5 or newer.", str(file), field="rope_parameters")
        ) from error  # fmt: skip


def unbuildable(checkpoint: Checkpoint, error: Exception) -> Refused:
    """The refusal of a config that transformers does not take."""
    return bad_file("bad-field", "transformers cannot build a model from the config", file=checkpoint.path,
                    field="config", found=f"{type(error).__name__}: {error}")  # fmt: skip


def _check_counts(checkpoint: Checkpoint) -> None:
    """Raises Refused (bad-field) where the config has a count that would be counted up to for ever."""
    most = max(len(checkpoint.files.source.tensors), _LEAST)
    for key, value in _numbers(checkpoint.config, ""):
        if (value > most and _COUNTS.search(key)) or (value < 0 and key == "num_hidden_layers"):
            raise bad_file("bad-field", "the config has more layers than the checkpoint has tensors, or fewer than none",
                           file=checkpoint.path, field=key, found=value, expected=f"0 to {most}")  # fmt: skip


def _check_code(checkpoint: Checkpoint) -> None:
    """Raises Refused (remote-code) where the config names a repository for transformers to fetch an implementation from:
    where the package `kernels` is installed, it would be downloaded and run."""
    for key, text in _implementations(checkpoint.config, ""):
        if "/" in text:
            raise Refused(
                Refusal("remote-code", "bad-file", str(checkpoint.path), "the config asks for code to be fetched, which is never done",
                        f"found {text!r:.200}, expected eager or sdpa", f"Remove {key} from config.json.",
                        str(checkpoint.files.folder / "config.json"), field=key)
            )  # fmt: skip


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
