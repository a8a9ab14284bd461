"""A small checkpoint of every format and of its important variants, by name, and all that reading one exercises.

Most are what the format's own tests write: a test is called with the folder that it shall write into.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qcore
import test_auto_round
import test_awq
import test_bitsandbytes
import test_compressed_floats
import test_compressed_tensors
import test_deepspeedfp
import test_fp8
import test_gptq
import test_inc
import test_kernel_layouts
import test_kv_cache
import test_modelopt
import test_quark
import test_torchao
from makers import dense_llama, write
from qcore.checkpoint.gguf_writer import GgufTensor, write_gguf
from qcore.discovery import registry
from test_gguf_model import converted as gguf_tensors
from test_gguf_model import metadata_of, original_of

Maker = Callable[[Path], object]


def auto_round(packing: str) -> Maker:
    name = test_auto_round.UP
    layers = {name: test_auto_round.layer(name, 4, 32, packing, sym=False)[0]}
    return lambda folder: test_auto_round.checkpoint(
        folder, layers, packing_format=packing, extra_config={".*gate.*": {"bits": 16}}
    )


def auto_round_float(kind: str) -> Maker:
    parts, _, config, _ = test_auto_round.float_layer(kind)
    layers = {test_auto_round.UP: {f"{test_auto_round.UP}.{part}": tensor for part, tensor in parts.items()}}
    return lambda folder: test_auto_round.checkpoint(
        folder, layers, packing_format="auto_round:llm_compressor", **config
    )


def compressed(name: str) -> Maker:
    scheme, parts, _ = test_compressed_floats.compressed(name)
    return lambda folder: test_compressed_floats.checkpoint(folder, name, scheme, parts)


def compressed_order(folder: Path) -> None:
    parts = {**test_compressed_tensors.PACKED, "weight_g_idx": (torch.arange(96) // 32).flip(0).int()}
    test_compressed_tensors.checkpoint(folder, parts, test_compressed_tensors.arguments(actorder="group"))


def fp8(kind: str, method: str = "fp8", **config: Any) -> Maker:
    return lambda folder: test_fp8.checkpoint(
        folder, test_fp8.made(kind)[0], method, ignored_layers=["lm_head"], **config
    )


def quark(dtype: str, scheme: str, weight: Any, given: Any = None, **extra: float) -> Maker:
    def make(folder: Path) -> object:
        parts = test_quark.made(dtype, scheme)[0] | {name: torch.tensor(value) for name, value in extra.items()}
        return test_quark.checkpoint(folder, parts, weight, given)

    return make


def gguf(kind: str) -> Maker:
    """A llama whose matrices are of zeros in one block type, and whose vectors are plain."""

    def make(folder: Path) -> None:
        from qcore.blocks.types import BLOCK_TYPES

        block, tensors = BLOCK_TYPES[kind.lower()], []
        for name, values in gguf_tensors("llama", original_of("llama")).items():
            if values.dim() == 2 and values.shape[1] % block.elements == 0:
                rows = torch.zeros(values.shape[0], values.shape[1] // block.elements * block.nbytes, dtype=torch.uint8)
                tensors.append(GgufTensor(name, kind, tuple(values.shape), lambda rows=rows: [rows]))
            else:
                tensors.append(GgufTensor(name, "F32", tuple(values.shape), lambda values=values: [values.float()]))
        folder.mkdir(parents=True, exist_ok=True)
        write_gguf(folder / "model.gguf", metadata_of("llama"), tensors)

    return make


SPEC, MX4 = test_quark.spec, test_quark.spec("fp4", "per_group", group_size=32, scale_format="e8m0")
VARIANTS: dict[str, Maker] = {
    "dense": lambda folder: write(folder, dense_llama()),
    "gptq-v1": lambda folder: test_gptq.checkpoint(folder, desc_act=True, config={"dynamic": {"-:.*gate.*": {}}}),
    "gptq-v2": lambda folder: test_gptq.checkpoint(folder, bits=3, v1=False),
    "gptq-planar": lambda folder: test_kernel_layouts.test_planes(folder, 5, False),
    "gptq-marlin": lambda folder: test_kernel_layouts.test_marlin(folder, "gptq", 32),
    "gptq-bitblas": lambda folder: test_kernel_layouts.test_bitblas(folder, 4, "quantized", torch.float16, "gptq"),
    "awq-gemm": lambda folder: test_awq.checkpoint(folder),
    "awq-gemv": lambda folder: test_awq.checkpoint(folder, layout="gemv", padding=4),
    "awq-gemv_fast": lambda folder: test_kernel_layouts.test_gemv_fast(folder),
    "awq-marlin": lambda folder: test_kernel_layouts.test_marlin(folder, "awq", -1),
    "bitblas-rescale": lambda folder: test_kernel_layouts.test_bitblas(folder, 2, "rescale", torch.float16, "bitblas"),
    "bitblas-original": lambda folder: test_kernel_layouts.test_bitblas(folder, 8, "original", torch.float16, "bitblas"),
    **{f"auto-round-{name}": auto_round(f"auto_round{name and ':'}{name}") for name in ("", "auto_gptq", "auto_awq")},
    **{f"auto-round-{kind}": auto_round_float(kind) for kind in test_auto_round.FLOATS},
    "bitsandbytes-nf4": lambda folder: test_bitsandbytes.checkpoint(folder, test_bitsandbytes.four_bits(nested=True)[0]),
    "bitsandbytes-fp4": lambda folder: test_bitsandbytes.checkpoint(folder, test_bitsandbytes.four_bits("fp4")[0]),
    "bitsandbytes-int8": lambda folder: test_bitsandbytes.checkpoint(folder, test_bitsandbytes.int8()[0]),
    "compressed-tensors-pack": lambda folder: test_compressed_tensors.test_packed_integers(folder, 4, False, "group"),
    "compressed-tensors-order": compressed_order,
    "compressed-tensors-int": lambda folder: test_compressed_tensors.test_integers_one_to_a_byte(folder, "channel", 8),
    "compressed-tensors-float": lambda folder: test_compressed_tensors.test_fp8(folder, "block"),
    **{f"compressed-tensors-{name}": compressed(name) for name in ("NVFP4", "MXFP4", "MXFP6A8", "MXFP8")},
    "compressed-tensors-kv": lambda folder: test_kv_cache.made(folder, test_kv_cache.scales(), test_kv_cache.FP8),
    "fp8-tensor": fp8("tensor", activation_scheme="static"),
    "fp8-block": fp8("block", weight_block_size=[32, 48]),
    "fp8-e8m0": fp8("e8m0", weight_block_size=[128, 128], scale_fmt="ue8m0"),
    "fp8-fbgemm": fp8("channel", "fbgemm_fp8", activation_scale_ub=1200.0),
    **{f"modelopt-{name}": lambda folder, name=name: test_modelopt.checkpoint(folder, test_modelopt.made(name)[0], name)
       for name in test_modelopt.ALGORITHMS},
    "quark-fp8": quark("fp8_e4m3", "per_tensor", SPEC("fp8_e4m3"), SPEC("fp8_e4m3"), input_scale=0.1),
    "quark-int8": quark("int8", "per_channel", SPEC("int8", "per_channel")),
    "quark-uint4": quark("uint4", "per_group", SPEC("uint4", "per_group", group_size=32)),
    "quark-channel": quark("uint4", "per_channel", SPEC("uint4", "per_channel")),
    "quark-mxfp4": quark("fp4", "per_group", MX4, {**MX4, "is_dynamic": True}),
    "quark-fp6": quark("fp6_e2m3", "per_group", {**MX4, "dtype": "fp6_e2m3"}),
    "quark-nvfp4": quark("nvfp4", "per_tensor", test_quark.NV),
    "quark-w4a8": quark("w4a8", "per_tensor", [SPEC("fp8_e4m3"), SPEC("int4", "per_channel")]),
    **{f"torchao-{kind}": lambda folder, kind=kind: test_torchao.checkpoint(folder, kind) for kind in (
        "Int8Tensor-dynamic", "IntxUnpackedToInt8Tensor-4a8", "Float8Tensor-row", "Int4Tensor-fp8", "Int4PlainInt32Tensor",
        "Int4TilePackedTo4dTensor", "MXTensor-inputs", "NVFP4Tensor-swizzled")},
    "deepspeedfp": test_deepspeedfp.checkpoint,
    "inc-saved": test_inc.saved,
    **{f"gguf-{kind}": gguf(kind) for kind in ("Q4_0", "Q8_0", "MXFP4", "IQ4_NL")},
}  # fmt: skip
"""By the method's name, then the variant's."""


FORMATS = sorted((method.name for method in registry().methods), key=len, reverse=True)


def format_of(variant: str) -> str:
    """The name of the method that reads the variant."""
    return next(name for name in FORMATS if variant.startswith(name))


def lean(folder: Path) -> Path:
    """The same checkpoint with all large unquantized tensors but one left out: changing many of them is then cheap."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    kept = {n: t for n, t in tensors.items() if t.dtype != torch.float32 or t.numel() < 2048 or "gate_proj" in n}
    save_file(kept, file, metadata)
    return folder


def made(variant: str, folder: Path) -> Path:
    """The variant's checkpoint, in `folder`."""
    torch.manual_seed(0)
    VARIANTS[variant](folder)
    return folder if variant.startswith("gguf") else lean(folder)


def read_all(path: Path) -> None:
    """Opens, plans, and decodes every module and parameter. Raises Refused; whatever else is raised is a mistake."""
    opened = qcore.open_checkpoint(path)
    _ = opened.format_version, opened.config, opened.own_dtype, opened.kv_cache, opened.kv_scales, opened.size_bytes
    for module, scheme in opened.plan.items():
        if scheme is not None:
            layer = opened.layer(module)
            weight = layer.weight.dequantize()
            assert weight.shape == opened.layers[module].shape, (module, weight.shape, opened.layers[module].shape)
            assert weight.dtype == torch.float32
    for name in opened.parameters:
        opened.parameter(name)
