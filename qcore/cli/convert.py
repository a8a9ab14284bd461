"""qcore convert: a checkpoint of one format as one of another."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from qcore.cli.output import print_json, progress_bar


def convert_command(
    path: Annotated[str, typer.Argument(help="A safetensors folder or a GGUF file.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="The format to write: gptq, awq, compressed-tensors, gguf, dense, ...; gptq:gptq_v2 names a variant.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The new folder, for gguf the new file; nothing is ever overwritten.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a checkpoint in another format, where that format holds the very same numbers.

    Codes and scales are repacked, never rounded: what is written is read back and compared before the folder appears.
    A layer that the format cannot hold is refused by name. `dense` writes float32.

    Example: qcore convert ./model-gptq --format compressed-tensors --out ./model-ct
    """
    from qcore.checkpoint.open import open_checkpoint
    from qcore.convert import convert

    with progress_bar("converting") as progress:
        written = convert(path, format, out, progress=progress)
    result = open_checkpoint(written)
    schemes = Counter(str(scheme or "unquantized") for scheme in result.plan.values())
    if json:
        print_json({"path": str(written), "method": result.method, "size_bytes": result.size_bytes, "schemes": schemes})
        return
    print(f"{written}: {result.method}, {result.size_bytes / 2**20:.1f} MiB, the same numbers as {path}")
    for scheme, count in schemes.items():
        print(f"  {count:4d} {scheme}")
