"""Where a config says how positions are rotated: rope_theta and rope_scaling in transformers 4, rope_parameters in 5.

Version 5 reads both. Version 4 passes over what only 5 writes, and then rotates by its default, 10000.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def contradictions(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a config, or one inside it, that says it twice: a tool with transformers 4 adds its default to one of 5."""
    stated, older = config.get("rope_parameters"), config.get("rope_theta")
    newer = stated.get("rope_theta") if isinstance(stated, dict) else None
    if newer is not None and older is not None and newer != older:
        yield f"rope_theta is {older} and rope_parameters.rope_theta {newer}, which is used; the tool that wrote both ran with {older}"
    for inner in config.values():
        if isinstance(inner, dict):
            yield from contradictions(inner)


def of_version_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config, and those inside it, in version 4's keys. Raises ValueError where kinds of layers have rotations of their
    own, which it has no keys for."""
    made = {
        key: of_version_4(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "rope_parameters"
    }
    stated = config.get("rope_parameters")
    if not isinstance(stated, dict):
        return made
    if any(isinstance(value, dict) for value in stated.values()):
        raise ValueError("rope_parameters by kind of layer")
    made |= {key: stated[key] for key in ("rope_theta", "partial_rotary_factor") if key in stated}
    scaling = {key: value for key, value in stated.items() if key not in made}
    return made | {"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else made
