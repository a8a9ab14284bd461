"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from qcore.refusal import Refusal, Refused

Path = Annotated[str, typer.Argument(help="A safetensors folder, a .gguf file, or a folder with one.", metavar="PATH")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; everything else on stderr.")]
Device = Annotated[str, typer.Option(help="A device that `qcore doctor` lists; auto takes QCORE_DEVICE, or the best.")]
Dtype = Annotated[
    str, typer.Option(help="Activations: auto (what the device runs fastest), checkpoint, float32, bfloat16, float16.")
]
Activations = Annotated[str, typer.Option(help="exact, or int8: kernels may round activations to 8 bits.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Quantize what is not: bitsandbytes:nf4 (fp4, int8, nf4-double), or a scheme such as W4A16-g128-sym."
    ),
]

KvCache = Annotated[
    str,
    typer.Option(
        help="auto (as the checkpoint declares), none, fp8, fp8_e4m3, fp8_e5m2 or int8: keys and values in 8 bits."
    ),
]


_DTYPES = ("auto", "checkpoint", "float32", "bfloat16", "float16")


def checked_dtype(value: str) -> str:
    """`value`, if it is one of --dtype's. Raises Refused (bad-argument)."""
    if value not in _DTYPES:
        raise Refused(Refusal("bad-argument", "usage", "--dtype", "the option does not take this value",
                              f"found {value!r}", f"Use one of: {', '.join(_DTYPES)}."))  # fmt: skip
    return value


def checked_prompt(text: str) -> str:
    """`text`, if it says anything. Raises Refused (bad-argument)."""
    if not text.strip():
        raise Refused(Refusal("bad-argument", "usage", "--prompt", "the prompt is empty", fix="Say something with -p."))
    return text
