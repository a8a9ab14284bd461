"""qcore inspect: what a checkpoint holds."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

from qcore.cli import options
from qcore.cli.layers import collapse
from qcore.cli.output import mebibytes, print_json, print_table


def inspect(path: options.Path, json: options.Json = False) -> None:
    """Show a checkpoint's format, its schemes and what each layer is stored as. Reads no weights.

    Example: qcore inspect ./model
    """
    from qcore.checkpoint.open import open_checkpoint

    document = describe(open_checkpoint(path))
    if json:
        print_json(document)
        return
    for title, key in (("format", "method"), ("version", "format_version"), ("architecture", "architecture"),
                       ("kv cache", "kv_cache")):  # fmt: skip
        if document[key]:
            print(f"{title:12}  {document[key]}")
    print(f"{'parameters':12}  {document['parameters']:,}")
    print(f"{'size':12}  {mebibytes(document['size_bytes'])} MiB, {document['bits_per_weight']:.2f} bits per weight\n")
    print_table(("scheme", "modules"), document["schemes"].items())
    print()
    rows = [(layer["module"], (layer["scheme"] or "not quantized", layer["reason"])) for layer in document["layers"]]
    print_table(("module", "scheme", "reason"), ((names, *facts) for names, facts in collapse(rows)))


def describe(checkpoint: Any) -> dict[str, Any]:
    """The command's JSON document."""
    layers = checkpoint.layers
    counted = sum(prod(entry.shape) for entry in layers.values())
    for name, info in checkpoint.parameters.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or module not in layers:
            counted += prod(info.shape)
    schemes = Counter(str(entry.scheme or "not quantized") for entry in layers.values())
    architectures = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "")]
    return {
        "method": checkpoint.method,
        "format_version": checkpoint.format_version,
        "architecture": architectures[0],
        "parameters": counted,
        "size_bytes": checkpoint.size_bytes,
        "bits_per_weight": round(8 * checkpoint.size_bytes / max(counted, 1), 4),
        "kv_cache": str(checkpoint.kv_cache) if checkpoint.kv_cache else None,
        "schemes": dict(schemes.most_common()),
        "layers": [
            {"module": module, "scheme": str(entry.scheme) if entry.scheme else None, "reason": entry.reason}
            for module, entry in layers.items()
        ],
    }
