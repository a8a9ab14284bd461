"""Where a config says how positions are rotated: rope_theta and rope_scaling in transformers 4, rope_parameters in 5.

Either version passes over what only the other writes, and then rotates by the default, 10000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def contradiction(config: Mapping[str, Any]) -> str | None:
    """What is wrong with a config that says it twice: a tool with transformers 4 adds its default to a config of 5."""
    stated, older = config.get("rope_parameters"), config.get("rope_theta")
    newer = stated.get("rope_theta") if isinstance(stated, dict) else None
    if newer is None or older is None or newer == older:
        return None
    return f"rope_theta is {older} and rope_parameters.rope_theta {newer}, which is used; the tool that wrote both ran with {older}"


def of_version_4(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same config in version 4's keys; None where kinds of layers have rotations of their own, which it has no keys for."""
    stated = config["rope_parameters"]
    if not isinstance(stated, dict):
        return dict(config)
    if any(isinstance(value, dict) for value in stated.values()):
        return None
    made = {key: value for key, value in config.items() if key != "rope_parameters"}
    made |= {key: stated[key] for key in ("rope_theta", "partial_rotary_factor") if key in stated}
    scaling = {key: value for key, value in stated.items() if key not in made}
    return made | {"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else made
