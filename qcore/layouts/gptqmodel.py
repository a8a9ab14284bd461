"""What GPTQModel's configs say of single layers, and what they ask for beside the weights.

`dynamic` has regular expressions that are tried in order. A pattern matches at the beginning of a module's name (re.match), and
the first that does counts. `+:`, or nothing, before it changes the numbers; `-:` says that the module is not quantized.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qcore.checkpoint.patterns import matches
from qcore.method import CheckpointFiles, ModulePlan, is_embedding
from qcore.refusal import Refusal, Refused, bad_file

Dynamic = Mapping[str, Mapping[str, Any]]

_COMPUTED = {
    "activation": "quantizes the inputs of some layers",
    "rotation": "rotates the inputs of down_proj while the model runs",
    "adapter": "adds a LoRA to the layers",
    "rotation_config": "rotates the inputs of layers while the model runs",
    "spinquant_config": "rotates the inputs of layers while the model runs",
}
"""Keys under which a model computes more than its weights say; the last two are AutoRound's, whatever it exports to."""


def refuse_computed(files: CheckpointFiles, config: Mapping[str, Any]) -> None:
    """Raises Refused (unknown-variant) where the model needs more than its weights."""
    for key, what in _COMPUTED.items():
        if config.get(key):
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(files.path), f"the tool that wrote it {what}, which is not read",
                        f"found {key} {config[key]!r}, expected none", f"Quantize the model without {key}.",
                        str(files.quantization_file), field=f"quantization_config.{key}")
            )  # fmt: skip


def agreed_layout(files: CheckpointFiles, config: Mapping[str, Any]) -> None:
    """Raises Refused (bad-field) where two keys name layouts that differ: tools do not agree which of them wins."""
    named = {key: str(config[key]).lower() for key in ("version", "checkpoint_format", "format") if config.get(key)}
    if len(set(named.values())) > 1:
        *_, key = named
        raise bad_file("bad-field", "the config names two layouts", file=files.quantization_file,
                       field=f"quantization_config.{key}", found=", ".join(f"{k} {v:.80}" for k, v in named.items()),
                       expected="one", fix="Keep the key that the tool wrote, and remove the other.")  # fmt: skip


def wrote(meta: object) -> bool:
    """Whether GPTQModel wrote the tensors, as its configs say in `meta`: `quantizer` has names with versions."""
    stated = meta.get("quantizer") if isinstance(meta, dict) else None
    names = stated if isinstance(stated, list) else [stated]
    return any(str(name).lower().startswith("gptqmodel:") for name in names)


def overrides(files: CheckpointFiles, dynamic: Dynamic | None, module: str) -> tuple[Mapping[str, Any], str]:
    """What the first pattern that fits says of the module, and the pattern; nothing where none fits."""
    for pattern, entry in (dynamic or {}).items():
        if _matches(files, pattern, module):
            return entry, pattern
    return {}, ""


def exclusion(files: CheckpointFiles, dynamic: Dynamic | None, module: str) -> str:
    """Why the module is not quantized, where a pattern says so."""
    for pattern in dynamic or {}:
        if pattern.startswith("-:") and _matches(files, pattern, module):
            return f"excluded by dynamic pattern {pattern!r}"
    return ""


def spread(
    plan: Mapping[str, ModulePlan], numbers: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The commonest numbers, and `dynamic` for the modules of the plan that differ or are not quantized."""
    common = dict(Counter(tuple(own.items()) for own in numbers.values()).most_common(1)[0][0])
    dynamic: dict[str, dict[str, Any]] = {}
    for module, entry in plan.items():
        if entry.scheme is None and not is_embedding(module) and not module.endswith("lm_head"):
            dynamic[f"-:{_exact(module)}"] = {}
    dynamic |= {f"+:{_exact(module)}": dict(own) for module, own in numbers.items() if own != common}
    return common, dynamic


def stated(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The module's numbers in a config that `spread` made."""
    own: Mapping[str, Any] = config.get("dynamic", {}).get(f"+:{_exact(module)}", config)
    return own


def _exact(module: str) -> str:
    return f"^{re.escape(module)}$"


def _matches(files: CheckpointFiles, pattern: str, module: str) -> bool:
    bare = pattern.removeprefix("+:").removeprefix("-:")
    return matches(bare, module, file=files.quantization_file, field="quantization_config.dynamic")
