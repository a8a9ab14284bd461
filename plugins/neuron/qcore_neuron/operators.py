"""What Neuron's compiler is known to take: operations and types of StableHLO, each with the page of AWS's that says so; and those of torch's operators that kernels
here call.

AWS publishes no list of neuronx-cc's operations: the compiler prints it (`neuronx-cc list-operators --framework XLA`). Published are the list of its predecessor for
Inf1, with the same command, and the source of NKIPy, AWS's own way from numpy to neuronx-cc, which writes HLO; an operation is taken here if one of the two has it.
What is refused, AWS's pages on the compiler's errors say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_DOCS = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest"
LIST = f"{_DOCS}/release-notes/archive/neuron-cc/neuron-cc-ops/neuron-cc-ops-xla.html"
NKIPY = "https://github.com/aws-neuron/nkipy/blob/b91c9800bb096d1686befcd43fe9e92b408d4912/nkipy/src/nkipy/core/ops/_hlo_impls.py"
TYPES_PAGE = f"{_DOCS}/about-neuron/arch/neuron-features/data-types.html"
QUANTIZATION = f"{_DOCS}/libraries/nxd-inference/developer_guides/feature-guide.html"
SETTING = "--experimental-unsafe-fp8e4m3fn-as-fp8e4m3"
"""The compiler's flag that takes e4m3fn for IEEE 754's e4m3 on chips before Trn3."""


def error_page(code: str) -> str:
    """The page on an error of the compiler, `EVRF051`."""
    return f"{_DOCS}/compiler/error-codes/{code}.html"


@dataclass(frozen=True)
class Known:
    """name: StableHLO's. listed: the source's own word. source: its address."""

    name: str
    listed: str
    source: str


OPERATIONS: Mapping[str, Known] = MappingProxyType(
    {
        known.name: known
        for known in (
            Known("abs", "Abs", LIST), Known("add", "Add", LIST), Known("broadcast_in_dim", "BroadcastInDim", LIST), Known("ceil", "Ceil", LIST),
            Known("clamp", "Clamp", LIST), Known("compare", "Compare", LIST), Known("concatenate", "Concatenate", LIST), Known("constant", "Constant", LIST),
            Known("convert", "ConvertElementType", LIST), Known("divide", "Div", LIST), Known("dot_general", "DotGeneral", LIST), Known("floor", "Floor", LIST),
            Known("gather", "Gather", LIST), Known("iota", "Iota", LIST), Known("log", "Log", LIST), Known("maximum", "Max", LIST),
            Known("minimum", "Min", LIST), Known("multiply", "Mul", LIST), Known("negate", "Neg", LIST), Known("reduce", "Reduce", LIST),
            Known("reshape", "Reshape", LIST), Known("select", "Select", LIST), Known("sign", "Sign", LIST), Known("slice", "Slice", LIST),
            Known("subtract", "Sub", LIST), Known("transpose", "Transpose", LIST), Known("shift_right_logical", "ShiftRightLogical", LIST),
            Known("and", "and", NKIPY), Known("not", "not", NKIPY), Known("or", "or", NKIPY), Known("xor", "xor", NKIPY),
        )
    }
)  # fmt: skip

REDUCTIONS = ("add", "maximum", "minimum", "multiply")
"""What a reduction may compute (the list's note on Reduce)."""

TYPES: Mapping[str, Known] = MappingProxyType(
    {
        known.name: known
        for known in (
            Known("f32", "FP32", TYPES_PAGE), Known("f16", "FP16", TYPES_PAGE), Known("bf16", "BF16", TYPES_PAGE), Known("f8E5M2", "FP8_e5m2", TYPES_PAGE),
            Known("f8E4M3FN", "F8E4M3FN", error_page("EVRF051")), Known("ui8", "UINT8", TYPES_PAGE), Known("i8", "INT8", QUANTIZATION),
            Known("i32", "INT32", TYPES_PAGE), Known("ui32", "UINT32", TYPES_PAGE), Known("i1", "PRED", NKIPY.replace("ops/_hlo_impls", "backend/hlo")),
        )
    }
)  # fmt: skip
"""f8E4M3FN: on Trn3; elsewhere with the compiler's `SETTING`. Float64 is on no list."""

ATEN: frozenset[str] = frozenset(
    {
        "_to_copy", "_unsafe_view", "abs", "add", "alias", "amax", "cat", "ceil", "clamp", "clamp_min", "clone", "div", "eq", "floor", "full_like", "ge",
        "index_select", "log", "mm", "mul", "new_empty", "new_full", "reciprocal", "rsub", "sign", "slice", "squeeze_", "sub", "t", "unbind", "unsqueeze",
        "view", "where", "zeros_like",
    }
)  # fmt: skip
"""torch's operators that kernels here come down to. The lane `make test-neuron` shows that torch-xla lowers every one of them."""
