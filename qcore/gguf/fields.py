"""Metadata fields, checked: a wrong type or an impossible size is refused by the field's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcore.gguf.architectures import ARCHITECTURES, Architecture
from qcore.refusal import Refusal, Refused, bad_file


class Fields:
    """The metadata of one file. `key("block_count")` is looked up under the architecture's prefix."""

    def __init__(self, metadata: Mapping[str, Any], file: Path) -> None:
        self.metadata, self.file = metadata, file
        name = metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise Refused(
                Refusal("unknown-architecture", "notimpl", str(file), "this architecture is not read from GGUF yet",
                        f"found {name!r}, expected one of {', '.join(ARCHITECTURES)}",
                        "Use the model's safetensors checkpoint.", str(file), field="general.architecture")
            )  # fmt: skip
        self.architecture: Architecture = ARCHITECTURES[name]

    def size(self, key: str, default: int | None = None, *, most: int = 1 << 24, least: int = 1) -> int:
        """A whole number of the architecture's. Raises Refused (bad-field) where it is absent without a default."""
        value = self._get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number of the architecture's."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def has(self, key: str) -> bool:
        """Whether the architecture's field is there."""
        return f"{self.architecture.name}.{key}" in self.metadata

    def wrong(self, key: str, found: object, expected: str) -> Refused:
        """The refusal for a field of the architecture's."""
        name = key if key.startswith("tokenizer.") else f"{self.architecture.name}.{key}"
        return bad_file("bad-field", "a metadata field has a value that the model cannot have", file=self.file,
                        field=name, found=found, expected=expected)  # fmt: skip

    def _get(self, key: str, default: float | None) -> Any:
        return self.metadata.get(f"{self.architecture.name}.{key}", default)
