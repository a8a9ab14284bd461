"""qcore quantize: makes quantized checkpoints. So far it makes GGUF files."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from qcore.cli import options
from qcore.cli.output import mebibytes, note, print_json, progress_bar
from qcore.refusal import Refusal, Refused


def quantize_command(
    path: options.Path,
    scheme: Annotated[str, typer.Option(help="A mixture of llama.cpp's, or a type: Q4_K_M, Q8_0, IQ3_XXS, BF16, ...")],
    out: Annotated[str, typer.Option(help="The new file.")],
    format: Annotated[str, typer.Option(help="gguf.")] = "gguf",
    imatrix: Annotated[str | None, typer.Option(help="An importance matrix that llama-imatrix wrote.")] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=TYPE: the type of tensors whose GGUF name the expression is found in."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Quantize a model's weights into a new checkpoint.

    Example: qcore quantize ./model --format gguf --scheme Q4_K_M --out model.Q4_K_M.gguf
    """
    overrides = dict(map(_override, tensor_type or ()))
    if format != "gguf":
        from qcore.convert import writer_of

        writer_of(format)
        raise Refused(Refusal("format-not-written", "notimpl", format, "checkpoints of this format are not made yet",
                              fix="Use --format gguf, or qcore convert for a model that is quantized already."))  # fmt: skip
    from qcore.gguf.make import recipe_of, save_gguf

    recipe_of(scheme)

    from qcore.checkpoint.open import open_checkpoint

    source = open_checkpoint(path)
    importance = pathlib.Path(imatrix) if imatrix is not None else None
    with progress_bar("quantizing") as progress:
        written = save_gguf(
            source, pathlib.Path(out), scheme, importance=importance, overrides=overrides, progress=progress
        )
    size = written.stat().st_size
    if json:
        print_json({"out": str(written), "format": format, "scheme": scheme, "size_bytes": size})
    else:
        note(f"{written}: {mebibytes(size)} MiB, from {mebibytes(source.size_bytes)} MiB.")


def _override(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not equals:
        raise Refused(Refusal("bad-argument", "usage", "--tensor-type", "the option does not take this value",
                              f"found {text!r}", "Write PATTERN=TYPE, such as ffn_down=q6_k."))  # fmt: skip
    return pattern, kind
