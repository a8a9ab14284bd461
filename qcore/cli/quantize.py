"""qcore quantize: makes a quantized checkpoint of an unquantized one, with calibration or without."""

from __future__ import annotations

import pathlib
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qcore.calibration import ITERATIONS, SAMPLES, SEQLEN
from qcore.cli import options
from qcore.cli.output import mebibytes, note, print_json, progress_bar
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qcore.calibration.run import Quantized
    from qcore.checkpoint.open import Checkpoint


def quantize_command(
    path: options.Path,
    scheme: Annotated[
        str,
        typer.Option(
            help="W4A16, FP8_DYNAMIC, W4A16-g64-asym, bitsandbytes:nf4, ...; for GGUF Q4_K_M, Q8_0, IQ3_XXS, ...; none with --kv-cache: weights stay as they are."
        ),
    ],
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="The new folder, for gguf the new file.")],
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help="As for convert; without it gguf, bitsandbytes or compressed-tensors, by the scheme. With --calibration it may be given several times: a folder each, in --out.",
        ),
    ] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            help="rtn, gptq, awq, auto_round or another that qcore plugins lists, or several joined, as smoothquant+gptq and hadamard+gptq; with --calibration gptq. For GGUF gptq or imatrix."
        ),
    ] = "",
    calibration: Annotated[
        pathlib.Path | None,
        typer.Option(help="A text like those that the model will read: layers are quantized by what they see of it."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of the calibration text, at most.")] = SAMPLES,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = SEQLEN,
    iterations: Annotated[
        int, typer.Option(min=0, help="Steps in which auto_round learns each block's roundings.")
    ] = ITERATIONS,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=9,
            help="Bits per weight of all layers together: each gets those that lose least, in schemes like the one that is named. With --calibration.",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="What does a calibrated run's work: local (this process), or ray (its tasks).")
    ] = "local",
    kv_cache: Annotated[
        str,
        typer.Option(
            help="With --calibration: find scales of keys and values for fp8, fp8_e5m2 or int8; fp8_per_head and int8_per_head find one for each head."
        ),
    ] = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a calibrated run was stopped.")] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that stay as they are: a part of their names, or re: and an expression for the beginning; without it lm_head."
        ),
    ] = None,
    imatrix: Annotated[
        pathlib.Path | None, typer.Option(help="GGUF: an importance matrix that llama-imatrix wrote.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(help="GGUF: PATTERN=TYPE, the type of tensors whose GGUF name the expression is found in."),
    ] = None,
    plot: Annotated[
        pathlib.Path | None, typer.Option(help="With --calibration: draw the error of each layer into this PNG file.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Quantize a model's weights into a new checkpoint.

    Example: qcore quantize ./model --scheme Q4_K_M --out model.Q4_K_M.gguf

    Example: qcore quantize ./model --scheme W4A16 --format gptq --out ./model-gptq

    Example: qcore quantize ./model --scheme W4A16 --algorithm gptq --calibration text.txt --out ./model-w4a16

    Example: qcore quantize ./model --scheme W8A8 --algorithm hadamard+gptq --calibration text.txt --out ./model-w8a8

    Example: qcore quantize ./model --scheme FP8 --kv-cache fp8 --calibration text.txt --out ./model-fp8

    Example: qcore quantize ./model --scheme Q4_K_M --calibration text.txt --out model.Q4_K_M.gguf
    """
    from qcore.checkpoint.kv_scales import calibrated_scheme
    from qcore.cli.plots import draw_errors, pyplot
    from qcore.gguf.recipes import is_recipe
    from qcore.scheme import PRESETS

    if plot is not None:
        pyplot()
    calibrated_scheme(kv_cache, "--kv-cache")
    usual = "bitsandbytes" if scheme.startswith("bitsandbytes:") else "compressed-tensors"
    formats = format or ["gguf" if is_recipe(scheme) and scheme not in PRESETS else usual]
    by_format: dict[str, tuple[object, bool]] = {
        "--imatrix": (imatrix, True), "--tensor-type": (tensor_type, True), "--ignore": (ignore, False), "--target-bpw": (target_bpw, False),
    }  # fmt: skip
    if calibration is None:
        by_format["--algorithm"] = (algorithm, False)
    elif imatrix is not None:
        raise Refused(Refusal("bad-argument", "usage", "--imatrix", "calibration finds out itself how important columns are",
                              fix="Leave one of --imatrix and --calibration out."))  # fmt: skip
    _check(formats, calibration is not None, by_format, {"--resume": resume, "--plot": plot is not None, "--samples": samples != SAMPLES, "--seqlen": seqlen != SEQLEN, "--iterations": iterations != ITERATIONS, "--target-bpw": target_bpw is not None, "--engine": engine != "local", "--kv-cache": kv_cache != "none"})  # fmt: skip
    errors: Mapping[str, float] = {}
    unseen: Sequence[str] = ()
    if calibration is not None:
        source, made = _calibrated(
            path,
            scheme,
            algorithm,
            calibration,
            out,
            formats,
            ignore,
            samples,
            seqlen,
            iterations,
            target_bpw,
            kv_cache,
            engine,
            tensor_type,
            resume=resume,
        )
        written, errors, unseen = [*made.paths], made.errors, made.unseen
        if unseen:
            note(f"{len(unseen)} layers of experts that no token of the text was sent to are rounded to nearest: {', '.join(unseen[:3])}{', ...' if unseen[3:] else ''}")  # fmt: skip
    elif formats == ["gguf"]:
        source, written = _gguf(path, scheme, out, imatrix, tensor_type)
    else:
        source, written = _plain(path, scheme, algorithm, out, formats[0], ignore)
    if plot is not None:
        draw_errors(errors, plot, out.name)
    if json:
        layers = [{"module": module, "error": error} for module, error in errors.items()]
        print_json({
            **_facts(written[0], formats[0], scheme),
            "kv_cache": kv_cache, "outputs": [_facts(*one, scheme) for one in zip(written, formats, strict=True)],
            "layers": layers, "unseen": list(unseen),
        })  # fmt: skip
        return
    for one in written:
        note(f"{one}: {mebibytes(_size(one))} MiB, from {mebibytes(source.size_bytes)} MiB.")


def _check(
    formats: Sequence[str],
    calibrated: bool,
    by_format: dict[str, tuple[object, bool]],
    by_calibration: dict[str, bool],
) -> None:
    """Raises Refused (bad-argument) where an option goes with another kind of run. by_format: whether it is for gguf."""
    for option, (given, gguf) in by_format.items():
        if given and ("gguf" in formats) != gguf:
            raise Refused(Refusal("bad-argument", "usage", option, f"the option is not for {' and '.join(formats)}",
                                  fix=f"Leave it out, or write --format {'gguf' if gguf else 'compressed-tensors'}."))  # fmt: skip
    if calibrated:
        return
    for option, asked in by_calibration.items():
        if asked:
            raise Refused(Refusal("bad-argument", "usage", option, "the option goes with calibration",
                                  fix="Name a text by --calibration, or leave it out."))  # fmt: skip
    if len(formats) > 1:
        raise Refused(Refusal("bad-argument", "usage", "--format", "several formats are written of a calibrated run alone",
                              f"found {', '.join(formats)}", "Name one, or a text by --calibration."))  # fmt: skip


def _calibrated(
    path: str, scheme: str, algorithm: str, text: pathlib.Path, out: pathlib.Path, formats: list[str],
    ignore: list[str] | None, samples: int, seqlen: int, iterations: int, target_bpw: float | None, kv_cache: str, engine: str,
    tensor_type: list[str] | None, *, resume: bool,
) -> tuple[Checkpoint, Quantized]:  # fmt: skip
    import time

    from qcore.calibration.run import BlockDone, quantize
    from qcore.checkpoint.in_flight import UNTOUCHED
    from qcore.checkpoint.open import open_checkpoint
    from qcore.cli.evaluate import read_text
    from qcore.cli.output import peak_rss_mib

    began, first = time.monotonic(), 0

    def say(done: BlockDone) -> None:
        nonlocal first
        first = first or done.number
        each = (time.monotonic() - began) / (done.number - first + 1)
        left = each * (done.blocks - done.number)
        note(f"block {done.number} of {done.blocks}: error {done.error:.3g}, {done.bits:.2f} bits per weight, {left:.0f} s left, {peak_rss_mib():.0f} MiB at most")  # fmt: skip

    source = open_checkpoint(path)
    written = quantize(
        source, scheme, algorithm, read_text(text), out=out, format=formats,
        ignore=UNTOUCHED if ignore is None else ignore, samples=samples, seqlen=seqlen, iterations=iterations, target_bpw=target_bpw,
        kv_cache=kv_cache, engine=engine, resume=resume, done=say,
        overrides=dict(map(_override, tensor_type or ())),
    )  # fmt: skip
    return source, written


def _gguf(
    path: str, scheme: str, out: pathlib.Path, imatrix: pathlib.Path | None, tensor_type: list[str] | None
) -> tuple[Checkpoint, list[pathlib.Path]]:
    from qcore.checkpoint.open import open_checkpoint
    from qcore.gguf.make import recipe_of, save_gguf

    recipe_of(scheme)
    overrides = dict(map(_override, tensor_type or ()))
    source = open_checkpoint(path)
    with progress_bar("quantizing") as progress:
        return source, [save_gguf(source, out, scheme, importance=imatrix, overrides=overrides, progress=progress)]


def _plain(
    path: str, scheme: str, algorithm: str, out: pathlib.Path, format: str, ignore: list[str] | None
) -> tuple[Checkpoint, list[pathlib.Path]]:
    from qcore.checkpoint.in_flight import UNTOUCHED, nothing_left
    from qcore.checkpoint.open import open_checkpoint
    from qcore.convert import convert, writer_of
    from qcore.discovery import registry

    writer_of(format)
    if any(row.calibrated and row.name == algorithm for row in registry().algorithms):
        raise Refused(Refusal("bad-argument", "usage", "--algorithm", f"{algorithm} quantizes layers by what they see of a text",
                              fix="Name a text like those that the model will read by --calibration FILE."))  # fmt: skip
    source = open_checkpoint(path)
    how = f"{algorithm}:{scheme}" if algorithm else scheme
    try:
        asked = source.quantized(how) if ignore is None else source.quantized(how, ignore)
    except Refused as error:
        fix = f"{error.refusal.fix} For GGUF files, name a mixture or a type of llama.cpp's, such as Q4_K_M."
        raise Refused(replace(error.refusal, fix=fix)) from error
    if not any(entry.algorithm for entry in asked.layers.values()):
        raise nothing_left(path, source.method, UNTOUCHED if ignore is None else ignore)
    with progress_bar("quantizing") as progress:
        return source, [convert(asked, format, out, progress=progress)]


def _facts(written: pathlib.Path, format: str, scheme: str) -> dict[str, object]:
    return {"out": str(written), "format": format, "scheme": scheme, "size_bytes": _size(written)}


def _size(written: pathlib.Path) -> int:
    """Bytes of the weights."""
    files = [written] if written.is_file() else [*written.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files)


def _override(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not equals:
        raise Refused(Refusal("bad-argument", "usage", "--tensor-type", "the option does not take this value",
                              f"found {text!r}", "Write PATTERN=TYPE, such as ffn_down=q6_k."))  # fmt: skip
    return pattern, kind
