"""Checking a config against a pydantic model, so that a wrong field is refused by name and never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qcore.refusal import bad_file


class Settings(BaseModel):
    """Base of the models: immutable, and blind to keys that only the tool that made the checkpoint uses."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        arbitrary_types_allowed=False,
        allow_inf_nan=False,
        defer_build=True,  # one command reads one format: the others' models need no validator
    )


S = TypeVar("S", bound=Settings)


def check(model: type[S], data: Mapping[str, Any], *, file: Path, prefix: str = "quantization_config") -> S:
    """`data` as a `model`. Raises Refused (bad-field) with the first wrong field's path."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([prefix, *(str(part) for part in first["loc"])])
        raise bad_file(
            "bad-field",
            "a field of the config has a value that the format does not allow",
            file=file,
            field=field,
            found=first.get("input"),
            expected=first["msg"],
            fix="Compare the config with the one that the quantizing tool wrote, and restore the field.",
        ) from error
