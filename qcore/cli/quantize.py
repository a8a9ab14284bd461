"""qcore quantize: makes a quantized checkpoint of an unquantized one, without calibration so far."""

from __future__ import annotations

import pathlib
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qcore.cli import options
from qcore.cli.output import mebibytes, note, print_json, progress_bar
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from qcore.checkpoint.open import Checkpoint


def quantize_command(
    path: options.Path,
    scheme: Annotated[
        str,
        typer.Option(
            help="W4A16, FP8_DYNAMIC, W4A16-g64-asym, bitsandbytes:nf4, ...; for GGUF Q4_K_M, Q8_0, IQ3_XXS, ..."
        ),
    ],
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="The new folder, for gguf the new file.")],
    format: Annotated[
        str,
        typer.Option(
            "--format", "-f", help="As for convert; without it gguf, bitsandbytes or compressed-tensors, by the scheme."
        ),
    ] = "",
    algorithm: Annotated[str, typer.Option(help="rtn, or another that qcore plugins lists.")] = "",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Parts of the names of layers that stay as they are; without it lm_head.")
    ] = None,
    imatrix: Annotated[
        pathlib.Path | None, typer.Option(help="GGUF: an importance matrix that llama-imatrix wrote.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(help="GGUF: PATTERN=TYPE, the type of tensors whose GGUF name the expression is found in."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Quantize a model's weights into a new checkpoint.

    Example: qcore quantize ./model --scheme Q4_K_M --out model.Q4_K_M.gguf

    Example: qcore quantize ./model --scheme W4A16 --format gptq --out ./model-gptq
    """
    from qcore.checkpoint.open import open_checkpoint
    from qcore.gguf.recipes import is_recipe
    from qcore.scheme import PRESETS

    usual = "bitsandbytes" if scheme.startswith("bitsandbytes:") else "compressed-tensors"
    format = format or ("gguf" if is_recipe(scheme) and scheme not in PRESETS else usual)

    for option, given, wanted in (
        ("--imatrix", imatrix, "gguf"), ("--tensor-type", tensor_type, "gguf"),
        ("--algorithm", algorithm, "compressed-tensors"), ("--ignore", ignore, "compressed-tensors"),
    ):  # fmt: skip
        if given and (format == "gguf") != (wanted == "gguf"):
            raise Refused(Refusal("bad-argument", "usage", option, f"the option is not for {format}",
                                  fix=f"Leave it out, or write --format {wanted}."))  # fmt: skip
    if format == "gguf":
        from qcore.gguf.make import recipe_of, save_gguf

        recipe_of(scheme)
        overrides = dict(map(_override, tensor_type or ()))
        source = open_checkpoint(path)
        with progress_bar("quantizing") as progress:
            written = save_gguf(source, out, scheme, importance=imatrix, overrides=overrides, progress=progress)
    else:
        from qcore.convert import convert, writer_of

        writer_of(format)
        source = open_checkpoint(path)
        how = f"{algorithm}:{scheme}" if algorithm else scheme
        try:
            asked = source.quantized(how) if ignore is None else source.quantized(how, ignore)
        except Refused as error:
            fix = f"{error.refusal.fix} For GGUF files, name a mixture or a type of llama.cpp's, such as Q4_K_M."
            raise Refused(replace(error.refusal, fix=fix)) from error
        if not any(entry.algorithm for entry in asked.layers.values()):
            raise Refused(Refusal("bad-argument", "usage", path, "no layer of it is left to be quantized",
                                  f"found {source.method} and --ignore {', '.join(ignore or ('lm_head',))}",
                                  "Name an unquantized checkpoint; qcore convert writes a quantized one anew."))  # fmt: skip
        with progress_bar("quantizing") as progress:
            written = convert(asked, format, out, progress=progress)
    _say(source, written, format, scheme, json=json)


def _say(source: Checkpoint, written: pathlib.Path, format: str, scheme: str, *, json: bool) -> None:
    files = [written] if written.is_file() else [*written.glob("*.safetensors")]
    size = sum(file.stat().st_size for file in files)
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
