"""The rows of the support matrix, as queries, and the seed table that qcore is measured against.

A row asks: can one of these formats be read, and does a kernel (of this family, where one is named) take every one of
these schemes? Formats and kernel families are rows alike, and qcore.support.matrix computes both by one path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from qcore.blocks.types import BLOCK_TYPES
from qcore.kernel import Op
from qcore.platform import COLUMNS
from qcore.refusal import Refusal, Refused
from qcore.scheme import Scheme

Kind = Literal["format", "kernel family"]


@dataclass(frozen=True)
class Row:
    """One row.

    methods: formats, by `Method.name`, or `name:variant` of `Method.variants`; one that can be read suffices, and none
    are needed where this is empty. family: of the kernels that count; empty takes any. schemes: all must have a kernel.
    platforms: the only ones on which it can be; empty: any. because: why there can be none on the others.
    """

    id: str
    title: str
    kind: Kind
    methods: tuple[str, ...]
    schemes: tuple[str, ...]
    family: str = ""
    op: Op = "linear"
    platforms: tuple[str, ...] = ()
    because: str = ""

    @cached_property
    def parsed(self) -> tuple[Scheme, ...]:
        """`schemes`, parsed."""
        return tuple(map(Scheme.parse, self.schemes))


_INT4 = ("W4A16-g128-sym", "W4A16-g128-asym")
_AFFINE = ("W2A16-g64-asym", "W3A16-g128-asym", "W4A16-g128-asym", "W8A16-g128-asym")
_SYMMETRIC = ("W2A16-g64-sym", "W3A16-g128-sym", "W4A16-g128-sym", "W8A16-g128-sym")
_INT8 = ("W8A8-int8-dyn", "W8A8-int8-static")
_FP8 = ("W8A8-fp8-static", "W8A8-fp8-dyn")
_CT = "compressed-tensors"

ROWS: tuple[Row, ...] = (
    Row("awq", "AWQ", "format", ("awq",), ("W4A16-g128-asym",)),
    Row("gptq", "GPTQ", "format", ("gptq",), (*_INT4, "W4A16-g128-sym-actorder", "W8A16-g128-sym")),
    Row("marlin", "Marlin", "kernel family", (), (*_INT4, "W8A16-g128-sym", "W8A16-fp8-channel"), "marlin",
        platforms=("turing", "ampere", "ada", "hopper", "blackwell"),
        because="its weights lie as the fragments of mma.m16n8k8 and m16n8k16, instructions of compute capability 7.5 and later"),
    Row("int8_w8a8", "INT8 W8A8", "format", (_CT,), _INT8),
    Row("fp8_w8a8", "FP8 W8A8", "format", (_CT,), (*_FP8, "W8A8-fp8-block128")),
    Row("bitblas", "BitBLAS", "format", ("bitblas",), ("W1A16-g128-sym", "W2A16-g128-asym", "W4A16-g128-asym")),
    Row("bitblas_gptq", "BitBLAS (GPTQ)", "format", ("gptq:bitblas",), _INT4),
    Row("bitsandbytes", "bitsandbytes", "format", ("bitsandbytes",), (
        "W4A16-nf4-g64", "W4A16-nf4-flat64:dynamic8+flat16384", "W4A16-fp4-g64",
        "W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0")),
    Row("deepspeedfp", "DeepSpeedFP", "format", ("deepspeedfp",), ("W6A16-e3m2-g512", "W8A16-e4m3-g512")),
    Row("gguf", "GGUF", "format", ("gguf",), tuple(f"W{t.bits}A16-gguf:{t.name}" for t in BLOCK_TYPES.values())),
    Row("inc_w8a8", "INC (W8A8)", "format", ("inc",), _FP8),
    Row("int4_w4a16", "INT4 W4A16", "format", (_CT,), (*_INT4, "W4A16-channel-sym", "W8A16-channel-sym")),
    Row("gptqmodel", "GPTQModel", "format", ("gptq",), (*_SYMMETRIC, *_AFFINE, "W4A16-g128-sym-actorder")),
    Row("auto_round", "AutoRound", "format", ("auto-round",), (*_SYMMETRIC, *_AFFINE)),
    Row("modelopt_fp8", "ModelOpt FP8", "format", ("modelopt",), _FP8),
    Row("modelopt_nvfp4", "ModelOpt NVFP4", "format", ("modelopt",), ("W4A4-nvfp4", "W4A16-nvfp4")),
    Row("quark", "Quark", "format", ("quark",), (*_FP8, *_INT8, "W4A4-mxfp4", "W4A16-g128-asym")),
    Row("torchao", "TorchAO", "format", ("torchao",), ("W4A16-g64-zfloat", "W8A16-channel-sym", *_INT8[:1], *_FP8[1:])),
    Row("mxfp4", "MXFP4", "format", ("mxfp4", f"{_CT}:mxfp4-pack-quantized"), ("W4A16-mxfp4", "W4A4-mxfp4")),
    Row("nvfp4", "NVFP4", "format", (f"{_CT}:nvfp4-pack-quantized",), ("W4A16-nvfp4", "W4A4-nvfp4")),
    Row("kv_cache_fp8", "FP8 KV cache", "format", (), ("W8A16-fp8-tensor",), op="kv_cache"),
    Row("kv_cache_int8", "INT8 KV cache", "format", (), ("W8A16-tensor-sym",), op="kv_cache"),
)  # fmt: skip
"""Every row: the seed table's first, in its order, then ours."""


def known_row(name: str) -> str:
    """`name` if it is a row of the matrix. Raises Refused (unknown-row)."""
    if name in {row.id for row in ROWS}:
        return name
    fix = f"Name one of: {', '.join(row.id for row in ROWS)}."
    raise Refused(Refusal("unknown-row", "usage", name, "no row of the matrix has this name", fix=fix))


_SEED_COLUMNS = tuple(column.id for column in COLUMNS[:11])
_SEED = {
    "awq":          ". x x x x . x . x . .",
    "gptq":         "x x x x x . x . x . .",
    "marlin":       ". . x x x . . . . . .",
    "int8_w8a8":    ". x x x x . . . x x x",
    "fp8_w8a8":     ". . . x x x . . . x .",
    "bitblas":      "x x x x x . . . . . .",
    "bitblas_gptq": ". . x x x . . . . . .",
    "bitsandbytes": "x x x x x . . . . . .",
    "deepspeedfp":  "x x x x x . . . . . .",
    "gguf":         "x x x x x x . . . . .",
    "inc_w8a8":     ". . . . . . . x . . .",
}  # fmt: skip

BASELINE: dict[tuple[str, str], bool] = {
    (row, platform): mark == "x"
    for row, marks in _SEED.items()
    for platform, mark in zip(_SEED_COLUMNS, marks.split(), strict=True)
}
"""The seed table: whether the widely published support table ticks (row, platform). 121 cells, 52 ticks."""
