"""Other tools that multiply by quantized weights, where they are installed: each from the same layer, as its users would set it.

A tool that does not hold the weight's scheme is left out. Those that round weights by themselves are given the layer's numbers, so
that they read as many bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from qcore.bench import ggml
from qcore.bench.contenders import Contender, Product
from qcore.bench.vllm_cpu import of_vllm
from qcore.blocks.types import BLOCK_TYPES
from qcore.elements import Block, Codebook, Group, Int, PerChannel

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors


def of_tools(layer: LayerTensors, exact: bool) -> Iterator[Contender]:
    """exact: whether activations are to stay whole; some tools round them all the same."""
    weight = layer.weight.scheme.weight
    grid, inputs = weight.granularity, layer.weight.scheme.input
    whole = isinstance(weight.element, Int) and weight.element.bits in (4, 8)
    if ggml.installed() and inputs is None:
        yield from _ggml(layer)
    if isinstance(weight.element, Codebook) and isinstance(grid, Group) and _has("bitsandbytes"):
        yield _bitsandbytes(layer, weight.element.name, grid.size)
    if whole and isinstance(grid, Group) and layer.weight.zeros is None and inputs is None:
        if _has("onnxruntime") and _has("onnx"):
            yield _onnxruntime(layer, grid.size, exact)
        if _has("auto_round_kernel"):
            yield _auto_round_kernel(layer, grid.size, exact)
    yield from of_vllm(layer, exact)
    int8, elements = Int(8, signed=True), (weight.element, inputs.element if inputs is not None else None)
    if elements == (int8, int8) and isinstance(grid, PerChannel) and hasattr(torch, "_int_mm"):
        yield _int_mm(layer)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _ggml(layer: LayerTensors) -> Iterator[Contender]:
    """The same blocks; for integers of 4 and 8 bits in groups, the type of ggml's that comes nearest."""
    weight = layer.weight
    element, grid = weight.scheme.weight.element, weight.scheme.weight.granularity
    if isinstance(element, Block):
        kind, data = BLOCK_TYPES[element.type], weight.codes.contiguous()
    elif isinstance(element, Int) and isinstance(grid, Group) and element.bits in (4, 8) and weight.shape[1] % 32 == 0:
        kind = BLOCK_TYPES["q4_0" if element.bits == 4 else "q8_0"]
        data = ggml.quantized(kind.id, weight.dequantize())
    else:
        return

    def make() -> Product:
        return ggml.Product(kind.id, data, (weight.shape[0], weight.shape[1]))

    yield Contender(f"ggml {kind.name}", make, data.nbytes, torch.float32)


def _bitsandbytes(layer: LayerTensors, kind: str, block: int) -> Contender:
    """bitsandbytes' own quantization of the same numbers: its codes are as many, whatever their values."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    dense_weight = layer.weight.dequantize(torch.bfloat16)
    rows, columns = dense_weight.shape

    def make() -> Product:
        packed, state = quantize_4bit(dense_weight, blocksize=block, quant_type=kind)
        linear = Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type=kind)
        linear.weight = Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=linear)
        product: Product = linear.eval()
        return product

    return Contender("bitsandbytes", make, layer.weight.nbytes, torch.bfloat16)


def _onnxruntime(layer: LayerTensors, block: int, exact: bool) -> Contender:
    """MatMulNBits of com.microsoft: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Codes are unsigned,
    [N, groups, bytes of a group]; accuracy_level 4 rounds activations to int8, 1 keeps them in float32."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    element = layer.weight.scheme.weight.element
    assert isinstance(element, Int)
    rows, columns = layer.weight.shape
    codes = layer.weight.codes if element.bits == 4 else layer.weight.codes.to(torch.int16).add(128).to(torch.uint8)
    blocks = codes.reshape(rows, columns // block, -1).contiguous()
    scales = layer.weight.scales[0].float().contiguous()
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=element.bits,
                            block_size=block, accuracy_level=1 if exact else 4)  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", size])
        for name, size in (("x", columns), ("y", rows))
    ]
    parts = [numpy_helper.from_array(part.numpy(), name) for name, part in (("codes", blocks), ("scales", scales))]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], parts)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()

    def make() -> Product:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def product(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

        return product

    return Contender("onnxruntime MatMulNBits", make, blocks.nbytes + scales.nbytes, torch.float32)


def _auto_round_kernel(layer: LayerTensors, block: int, exact: bool) -> Contender:
    """ARK of auto-round-lib, woqgemm: codes [K, N] and scales [K / group, N] are repacked; it computes in float32 or int8."""
    import auto_round_kernel as ark

    element = layer.weight.scheme.weight.element
    assert isinstance(element, Int)
    rows, columns = layer.weight.shape
    kind, compute = f"int{element.bits}", "fp32" if exact else "int8"
    scales = layer.weight.scales[0].float()
    codes = (layer.weight.dequantize() / scales.repeat_interleave(block, 1)).round().to(torch.int8)
    zeros = torch.zeros(columns // block, rows, dtype=torch.int8)
    none = torch.empty(0)

    def make() -> Product:
        packed = ark.repack_quantized_weight(
            codes.t().contiguous(), scales.t().contiguous(), zeros, block, compute, kind, "fp32", False
        )

        def product(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = ark.woqgemm(x, packed, none, rows, columns, block, compute, kind, "fp32", False)
            return result

        return product

    return Contender("auto-round-lib woqgemm", make, layer.weight.nbytes, torch.float32)


def _int_mm(layer: LayerTensors) -> Contender:
    """torch._int_mm with activations rounded by token, as torchao does it."""
    codes, scales = layer.weight.codes, layer.weight.scales[0].float().flatten()

    def make() -> Product:
        turned = codes.clone().t()

        def product(x: torch.Tensor) -> torch.Tensor:
            scale = x.abs().amax(-1, keepdim=True).float() / 127.5
            rounded = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
            return (torch._int_mm(rounded, turned) * (scale * scales)).to(x.dtype)

        return product

    return Contender("torch._int_mm", make, codes.nbytes, torch.bfloat16)
