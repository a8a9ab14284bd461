"""Metadata fields, checked: a wrong type or an impossible size is refused by the field's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcore.checkpoint.source import TensorInfo
from qcore.gguf.architectures import ARCHITECTURES, MIXTURES, Architecture
from qcore.refusal import Refusal, Refused, bad_file


class Fields:
    """The metadata of one file. A key such as "block_count" is looked up under the architecture's prefix.

    Raises Refused: missing-tensor for a file without tensors, unknown-architecture.
    """

    def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        if not tensors:
            raise bad_file("missing-tensor", "the file holds no tensors", file="GGUF", expected="a model's weights",
                           fix="Vocabulary-only files cannot be run; use the model's own file.")  # fmt: skip
        self.metadata = metadata
        self.file: Path = next(iter(tensors.values())).file
        name = metadata.get("general.architecture")
        mixed = isinstance(name, str) and bool(metadata.get(f"{name}.expert_count"))
        rows = MIXTURES if mixed else ARCHITECTURES
        if not isinstance(name, str) or name not in rows:
            if mixed and name in ARCHITECTURES:
                raise bad_file("bad-field", "the architecture has no experts", file=self.file, field=f"{name}.expert_count",
                               found=metadata[f"{name}.expert_count"], expected="0")  # fmt: skip
            raise Refused(
                Refusal("unknown-architecture", "notimpl", str(self.file), "this architecture is not read from GGUF yet",
                        f"found {name!r:.200}, expected one of {', '.join({**ARCHITECTURES, **MIXTURES})}",
                        "Use the model's safetensors checkpoint.", str(self.file), field="general.architecture")
            )  # fmt: skip
        self.architecture: Architecture = rows[name]

    def size(self, key: str, default: int | None = None, *, most: int = 1 << 24, least: int = 1) -> int:
        """A whole number of the architecture's. Raises Refused (bad-field) where it is absent without a default."""
        value = self.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number of the architecture's."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def has(self, key: str) -> bool:
        """Whether the architecture's field is there."""
        return self.name(key) in self.metadata

    def get(self, key: str, default: Any = None) -> Any:
        """The architecture's field, unchecked."""
        return self.metadata.get(self.name(key), default)

    def name(self, key: str) -> str:
        """The key as the file spells it."""
        return key if key.startswith("tokenizer.") else f"{self.architecture.name}.{key}"

    def wrong(self, key: str, found: object, expected: str) -> Refused:
        """The refusal of a value that no model has."""
        return bad_file("bad-field", "a metadata field has a value that the model cannot have", file=self.file,
                        field=self.name(key), found="nothing" if found is None else found, expected=expected)  # fmt: skip

    def not_read(
        self, key: str | None, reason: str, found: object, expected: str, *, tensor: str | None = None
    ) -> Refused:
        """The refusal of a variant that is not implemented, for a field or for a tensor's values."""
        return Refused(
            Refusal("unknown-variant", "notimpl", str(self.file), reason, f"found {found!r:.200}, expected {expected}",
                    "Use the model's safetensors checkpoint.", str(self.file), tensor, key and self.name(key))
        )  # fmt: skip
