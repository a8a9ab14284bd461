"""Tensors of every format, each spoiled in each way that its format has to notice, with the code of the refusal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mutations import SIZES, Held, Sample

NAN = {"F32": b"\0\0\xc0\x7f", "F16": b"\0\x7e", "BF16": b"\xc0\x7f", "F8_E4M3": b"\x7f", "F8_E8M0": b"\xff"}
OTHER = {1: "BOOL", 2: "U16", 4: "U32", 8: "C64"}
"""Types of the same size that no format stores."""
DENSE = ("layernorm", ".norm.", "gate_proj", "embed_tokens", "lm_head")

Change = Callable[[Sample], None]


def _flat(held: Held) -> None:
    held.shape = [math.prod(held.shape)] if len(held.shape) != 1 else [held.shape[0], 1]


def _longer(held: Held) -> None:
    held.data, held.shape = held.data * 2, [held.shape[0] * 2, *held.shape[1:]] if held.shape else [2]


def _typed(held: Held) -> None:
    held.dtype = OTHER[SIZES[held.dtype]]


def _nan(held: Held) -> None:
    held.data = NAN[held.dtype] * math.prod(held.shape)


def _ones(held: Held) -> None:
    """-1 of integers: an index or size out of range, e8m0's NaN, no UTF-8."""
    held.data = b"\xff" * len(held.data)


WAYS: dict[str, tuple[Callable[[Held], None], str]] = {
    "flat": (_flat, "bad-shape"),
    "longer": (_longer, "bad-shape"),
    "typed": (_typed, "bad-dtype"),
    "nan": (_nan, "bad-content"),
    "ones": (_ones, "bad-content"),
}
"""How a tensor is spoiled, and what it is refused with; `lost` is one more way, and missing-tensor its code."""
ALL = ("lost", "flat", "longer", "typed")

# By variant: a part and the ways to spoil it, with the code where it is another. A way that is not there makes another
# checkpoint that can be read: one more row of a matrix that nothing else counts, a part that may be absent.
TABLE: dict[str, str] = {
    "gptq-v1": "g_idx: all ones; qweight: all; qzeros: all; scales: all nan",
    "gptq-v2": "g_idx: flat longer typed ones; qweight: all; qzeros: all; scales: all nan",
    "gptq-planar": "g_idx: flat longer typed ones; qweight: all; qzeros: all; scales: all nan",
    "gptq-marlin": "B: all; s: all nan",
    "gptq-bitblas": "scales: all nan; qweight: all; qzeros: all",
    "awq-gemm": "qweight: all; qzeros: all; scales: all nan",
    "awq-gemv": "qweight: all; qzeros: all; scales: all nan",
    "awq-gemv_fast": "qzeros: all nan; scales: all nan; qweight: all",
    "awq-marlin": "qweight: lost flat typed; scales: all nan",
    "bitblas-rescale": "scales: all nan; zeros: all nan; qweight: all",
    "bitblas-original": "scales: all nan; zeros: all nan; qweight: all",
    "auto-round-": "qweight: all; qzeros: all; scales: all nan",
    "auto-round-auto_gptq": "qweight: all; qzeros: all; scales: all nan",
    "auto-round-auto_awq": "qweight: all; qzeros: flat longer typed; scales: all nan",
    "auto-round-MXFP4": "weight_packed: all; weight_scale: lost longer typed ones",
    "auto-round-MXFP8": "weight: lost flat longer typed=missing-tensor; weight_scale: lost longer typed ones",
    "auto-round-NVFP4": (
        "input_global_scale: lost longer typed nan; weight_global_scale: lost longer typed nan; "
        "weight_scale: lost longer typed nan; weight_packed: all"
    ),
    "auto-round-FP8_STATIC": (
        "input_scale: lost longer typed nan; weight_scale: lost longer typed nan; "
        "weight: lost flat longer typed=missing-tensor"
    ),
    "auto-round-FPW8A16": "weight_scale: lost longer typed nan; weight: lost flat typed=missing-tensor",
    "auto-round-FP8_BLOCK": "weight_scale_inv: lost longer typed nan; weight: lost flat longer typed=missing-tensor",
    "bitsandbytes-nf4": (
        "weight.nested_absmax: all nan; weight.nested_quant_map: all nan; weight.quant_map: all nan; "
        "weight: lost longer typed; weight.absmax: all; "
        "weight.quant_state.bitsandbytes__nf4: lost=missing-tensor longer=bad-json typed ones=bad-text"
    ),
    "bitsandbytes-fp4": (
        "weight.absmax: all nan; weight.quant_map: all nan; weight: lost longer typed; "
        "weight.quant_state.bitsandbytes__fp4: lost=missing-tensor longer=bad-json typed ones=bad-text"
    ),
    "bitsandbytes-int8": (
        "SCB: lost=missing-tensor flat longer typed nan; weight: all; weight_format: ones=unknown-variant"
    ),
    "compressed-tensors-pack": (
        "weight_shape: all ones=bad-shape; weight_packed: longer typed; weight_zero_point: all; weight_scale: all nan"
    ),
    "compressed-tensors-order": (
        "weight_shape: all ones=bad-shape; weight_scale: all nan; weight_g_idx: all; weight_packed: longer typed"
    ),
    "compressed-tensors-int": "weight_scale: all nan; weight: longer typed",
    "compressed-tensors-float": "weight_scale: all nan; weight: longer typed",
    "compressed-tensors-NVFP4": (
        "input_global_scale: all nan; weight_global_scale: all nan; weight_scale: all nan; weight_packed: longer typed"
    ),
    "compressed-tensors-MXFP4": "weight_packed: longer typed; weight_scale: all ones",
    "compressed-tensors-MXFP6A8": "weight_packed: longer typed; weight_scale: all ones",
    "compressed-tensors-MXFP8": "weight: longer typed; weight_scale: all ones",
    "fp8-tensor": (
        "input_scale: lost longer typed nan; weight_scale: lost longer typed nan; "
        "weight: lost flat typed=missing-tensor"
    ),
    "fp8-block": "weight_scale_inv: all nan; weight: lost flat longer typed=missing-tensor",
    "fp8-e8m0": "weight_scale_inv: lost longer typed nan ones; weight: lost flat longer typed=missing-tensor",
    "fp8-fbgemm": "weight_scale: lost longer typed nan; weight: lost flat longer typed=missing-tensor",
    "modelopt-FP8": "input_scale: longer typed nan; weight_scale: lost longer typed nan; weight: lost flat typed",
    "modelopt-FP8_PER_CHANNEL_PER_TOKEN": "weight_scale: lost longer typed nan; weight: all",
    "modelopt-FP8_PB_WO": "weight_scale: lost longer typed nan; weight: all",
    "modelopt-NVFP4": (
        "input_scale: lost longer typed nan; weight_scale_2: lost longer typed nan; weight_scale: all nan; weight: all"
    ),
    "modelopt-W4A16_NVFP4": "weight_scale_2: lost longer typed nan; weight_scale: all nan; weight: all",
    "modelopt-MXFP8": "weight: all; weight_scale: all ones",
    "modelopt-W4A16_AWQ": "pre_quant_scale: flat longer typed nan; weight_scale: all nan; weight: all",
    "modelopt-W8A8_SQ_PER_CHANNEL": (
        "input_scale: longer typed nan; pre_quant_scale: flat longer typed nan; "
        "weight_scale: lost longer typed nan; weight: all"
    ),
    "modelopt-NVFP4_AWQ": (
        "input_scale: lost longer typed nan; pre_quant_scale: flat longer typed nan; "
        "weight_scale_2: lost longer typed nan; weight_scale: all nan; weight: all"
    ),
    "modelopt-W4A8_NVFP4_FP8": (
        "input_scale: longer typed nan; weight_scale_2: lost longer typed nan; weight_scale: all nan; weight: all"
    ),
    "modelopt-MXFP4": "weight: all; weight_scale: all ones",
    "modelopt-W4A8_MXFP4_FP8": "input_scale: longer typed nan; weight: all; weight_scale: all ones",
    "modelopt-W4A8_AWQ": (
        "input_scale: lost longer typed nan; pre_quant_scale: flat longer typed nan; weight_scale: all nan; weight: all"
    ),
    "modelopt-W8A16": "weight_scale: lost longer typed nan; weight: all",
    "quark-fp8": "input_scale: lost longer typed nan; weight_scale: lost longer typed nan; weight: lost flat typed",
    "quark-int8": "weight_scale: lost longer typed nan; weight: all; weight_zero_point: ones",
    "quark-uint4": "weight_scale: all nan; weight: all; weight_zero_point: all",
    "quark-channel": "weight_scale: lost longer typed nan; weight: all; weight_zero_point: all",
    "quark-mxfp4": "weight: all; weight_scale: all ones",
    "quark-fp6": "weight: all; weight_scale: all ones",
    "quark-nvfp4": "weight_scale_2: lost longer typed nan; weight_scale: all nan; weight: all",
    "quark-w4a8": "weight_scale: lost longer typed nan; weight_scale_2: lost longer typed nan; weight: all",
    "torchao-Int8Tensor-dynamic": "_weight_scale: all nan; _weight_qdata: all; _weight_zero_point: all",
    "torchao-IntxUnpackedToInt8Tensor-4a8": "_weight_scale: all nan; _weight_qdata: all; _weight_zero_point: all",
    "torchao-Float8Tensor-row": "_weight_scale: all nan; _weight_qdata: all",
    "torchao-Int4Tensor-fp8": "_weight_scale: all nan; _weight_zero_point: all nan; _weight_qdata: all",
    "torchao-Int4PlainInt32Tensor": "_weight_scale: all nan; _weight_qdata: all; _weight_zero_point: all ones",
    "torchao-Int4TilePackedTo4dTensor": "_weight_qdata: all; _weight_scale_and_zero: all nan",
    "torchao-MXTensor-inputs": "_weight_scale: lost longer typed nan ones; _weight_qdata: all",
    "torchao-NVFP4Tensor-swizzled": (
        "_weight_per_tensor_scale: all nan; _weight_scale: lost longer typed nan; _weight_qdata: all"
    ),
}


def _named(sample: Sample, part: str) -> str:
    return next(name for name in sample.tensors if name.endswith(f".{part}") and not any(d in name for d in DENSE))


def _spoiled(part: str, way: str) -> Change:
    def change(sample: Sample) -> None:
        name = _named(sample, part)
        if way == "lost":
            del sample.tensors[name]
        else:
            WAYS[way][0](sample.tensors[name])

    return change


def tensor_cases() -> Iterator[tuple[str, str, str, Change]]:
    """Variant, what is done, the code, and the change."""
    for variant, rows in TABLE.items():
        for row in rows.split("; "):
            part, _, words = row.partition(": ")
            for word in " ".join(ALL).join(words.split("all")).split():
                way, _, code = word.partition("=")
                expected = code or (WAYS[way][1] if way in WAYS else "missing-tensor")
                yield variant, f"{part} {way}", expected, _spoiled(part, way)
