"""bitsandbytes' config and tensors, made from schemes and weights: the inverse of what its method reads.

Sources: bitsandbytes' QuantState.as_dict and Linear8bitLt, transformers' BitsAndBytesConfig.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcore.elements import Codebook, FlatGroup, Group, Int, Level, PerChannel, PerToken
from qcore.layouts.affine import unholdable
from qcore.method import ModulePlan, is_embedding
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors, QuantizedTensor

NAME = "bitsandbytes"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
WRITTEN = ("nf4", "fp4", "int8")


def config_of(plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
    """BitsAndBytesConfig's keys: one of 4 and 8 bits for the whole, one threshold. Raises Refused (not-representable)."""
    kinds = {}
    for module, entry in plan.items():
        if entry.scheme is not None:
            kinds[module] = _kind(module, entry)
            if (kinds[module] == "int8") != (next(iter(kinds.values())) == "int8"):
                unholdable(NAME, module, entry.scheme, "4 or 8 bits in all layers")
            if variant and kinds[module] != variant:
                unholdable(NAME, module, entry.scheme, variant)
    common = Counter(kinds.values()).most_common(1)[0][0] if kinds else variant or WRITTEN[0]
    thresholds = {_threshold(entry.scheme): module for module, entry in plan.items() if entry.scheme is not None}
    if len(thresholds) > 1:
        unholdable(NAME, min(thresholds.values()), f"thresholds {sorted(thresholds)}", "one for all layers")
    computes = {entry.computes or "float32" for entry in plan.values() if entry.scheme is not None}
    kept = [module for module, entry in plan.items() if entry.scheme is None and not is_embedding(module)]
    # An output layer that shares the embedding's weight is no module of the checkpoint, and is to be left alone too.
    skipped = list(dict.fromkeys([*kept, *(() if "lm_head" in kinds else ("lm_head",))]))
    return {
        "quant_method": NAME, "load_in_4bit": common != "int8", "load_in_8bit": common == "int8",
        "bnb_4bit_quant_type": common if common != "int8" else "fp4", "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": any(e.scheme and len(e.scheme.weight.scales) == 2 for e in plan.values()),
        "bnb_4bit_compute_dtype": computes.pop() if len(computes) == 1 else "float32", "llm_int8_threshold": next(iter(thresholds), 6.0),
        "llm_int8_skip_modules": skipped,
    }  # fmt: skip


def _kind(module: str, entry: ModulePlan) -> str:
    scheme = entry.scheme
    assert scheme is not None
    if is_embedding(module) or len(entry.shape) != 2:
        unholdable(NAME, module, "an embedding or stacked experts", "linear layers")
    if isinstance(scheme.weight.element, Codebook):
        _sizes(module, scheme, entry.shape[1])
        return scheme.weight.element.name
    if scheme.weight != TensorScheme(Int(8, signed=True), (Level(PerChannel()),)) or not _llm_int8(scheme.input):
        unholdable(NAME, module, scheme, "nf4, fp4 or LLM.int8")
    return "int8"


def _llm_int8(given: TensorScheme | None) -> bool:
    """Whether inputs are int8 by token, but for columns beyond a threshold."""
    if given is None or given.outliers is None:
        return False
    return given == TensorScheme(Int(8, signed=True), (Level(PerToken()),), dynamic=True, outliers=given.outliers)


def _threshold(scheme: Scheme) -> float:
    """llm_int8_threshold, which 4 bits do not use."""
    if isinstance(scheme.weight.element, Codebook):
        return 6.0
    assert scheme.input is not None and scheme.input.outliers is not None
    return 0.0 if math.isinf(scheme.input.outliers) else scheme.input.outliers


def _sizes(module: str, scheme: Scheme, columns: int) -> tuple[int, int | None]:
    """Elements of a block, and blocks of a nested one. Raises Refused (not-representable)."""
    fine, *coarse = scheme.weight.scales
    grid = fine.granularity
    size = columns if isinstance(grid, PerChannel) else grid.size if isinstance(grid, Group | FlatGroup) else 0
    ragged = isinstance(grid, Group) and columns % grid.size
    if (
        size not in BLOCK_SIZES
        or ragged
        or scheme.input is not None
        or fine.type != ("dynamic8" if coarse else "float")
    ):
        unholdable(NAME, module, scheme, f"absmax of {', '.join(map(str, BLOCK_SIZES))} elements")
    if not coarse:
        return size, None
    whole = coarse[0].granularity
    if len(coarse) > 1 or not isinstance(whole, FlatGroup) or whole.size % size:
        unholdable(NAME, module, scheme, "one level of nested absmax")
    return size, whole.size // size


def pack_layer(module: str, layer: LayerTensors) -> dict[str, torch.Tensor]:
    """The module's tensors. Raises Refused (not-representable)."""
    if layer.input_multiplier is not None:
        unholdable(NAME, module, "a vector that multiplies the input", "none")
    weight = layer.weight
    tensors = (
        _four_bits(module, weight) if isinstance(weight.scheme.weight.element, Codebook) else _int8(module, weight)
    )
    return tensors if layer.bias is None else {**tensors, f"{module}.bias": layer.bias}


def _four_bits(module: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    import torch

    rows, columns = weight.shape
    size, nested = _sizes(module, weight.scheme, columns)
    element = weight.scheme.weight.element
    assert isinstance(element, Codebook) and weight.table is not None
    parts = {"": flat_nibbles(weight.codes, columns), ".absmax": weight.scales[0].flatten(), ".quant_map": weight.table}
    # dtype: what bitsandbytes dequantizes to; the numbers are float32's.
    state: dict[str, Any] = {
        "quant_type": element.name,
        "blocksize": size,
        "dtype": "float32",
        "shape": [rows, columns],
    }
    if nested is not None:
        assert weight.scale_table is not None and weight.offset is not None
        parts |= {".nested_absmax": weight.scales[1].flatten(), ".nested_quant_map": weight.scale_table}
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": float(weight.offset)}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts[f".quant_state.bitsandbytes__{element.name}"] = text
    return {f"{module}.weight{part}": tensor for part, tensor in parts.items()}


def _int8(module: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    import torch

    scales = weight.scales[0].double()
    absmax = (scales / int8_step()).float()
    if not torch.equal(int8_scales(absmax), scales):
        unholdable(NAME, module, "scales that are not LLM.int8's", "absmax / 127, as bitsandbytes multiplies it out")
    return {f"{module}.weight": weight.codes, f"{module}.SCB": absmax.flatten(),
            f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip


def int8_step() -> torch.Tensor:
    """1 / 127 as float32 has it, in float64: what bitsandbytes multiplies by."""
    import torch

    return torch.tensor(1 / 127, dtype=torch.float32).double()


def int8_scales(absmax: torch.Tensor) -> torch.Tensor:
    """float32 [N, 1] -> float64: bitsandbytes computes q absmax (1 / 127) from left to right. absmax is a float16's value, so
    that q absmax is exact in float32, and the product with this scale, rounded once, is its number in every bit."""
    return absmax.double() * int8_step()


def rows_of_nibbles(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The flattened codes, first one high, as rows with the first one low: uint8 [N, ceil(K / 2)]."""
    import torch

    from qcore.bits import pack

    flat = stored.contiguous().view(torch.uint8).flatten()
    if columns % 2 == 0:
        return (flat << 4 | flat >> 4).view(rows, columns // 2)
    codes = torch.stack([flat >> 4, flat & 15], -1).flatten()[: rows * columns]
    return pack(codes.view(rows, columns), 4)


def flat_nibbles(codes: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `rows_of_nibbles`: uint8 [ceil(N K / 2), 1]."""
    import torch

    from qcore.bits import unpack

    if columns % 2 == 0:
        flat = codes.flatten()
        return (flat << 4 | flat >> 4).unsqueeze(1)
    single = unpack(codes, 4, columns).flatten()
    pairs = torch.nn.functional.pad(single, (0, single.numel() % 2)).view(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1]).unsqueeze(1)
