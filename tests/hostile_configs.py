"""Configs, records and contents of every format that state what cannot be, with the code of the refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hostile_tensors import Change
from mutations import Held, Sample

ABSENT = object()
HUGE, NESTED = 1 << 70, json.loads("[" * 40 + "]" * 40)
BOMB, LONG = "(.*,){200}x", "re:" + "a" * 5000
NAN = float("nan")

Row = tuple[str, str, Any]
"""A code, the place and the value. Places begin at the quantization config; at config.json after `/`, at TorchAO's record
after `record:`, at bitsandbytes' state after `state:`."""


def each(code: str, place: str, *values: Any) -> list[Row]:
    return [(code, place, value) for value in values]


NUMBERS = ("x", None, ABSENT, [], {}, 0.5, NAN, HUGE, -HUGE)
"""What no count of bits may be."""
UNNAMED = [
    *each("unknown-method", "quant_method", "x", "", 3, [], {}, ABSENT, "é\u202e", "gguf", NESTED, "x" * 100_000),
    *each("bad-field", "/quantization_config", "x", 3, [], [{}], True),
]
"""Of no format at all."""
MANY = [f"re:model.*x{i}[a-z]" for i in range(5000)]
"""Patterns, of which each would be compiled."""
CONFIGS: dict[str, list[Row]] = {
    "dense": [
        *each("bad-field", "/dtype", "abacus", "int8", "float8_e4m3fn", "__class__", "x" * 100_000),
        *each("unknown-method", "/quantization_config", {}, {"bits": 4}, {"quant_method": "dense"}),
        *each("bad-field", "/compression_config", 3, "x"),
    ],
    "gptq-v1": [
        *each("bad-field", "bits", *NUMBERS, 0, -1, 1, 9, 16, True),
        *each("bad-shape", "bits", 8, 2),
        *each("bad-field", "group_size", "x", None, ABSENT, 0, -2, 0.5, []),
        *each("bad-shape", "group_size", 16, 64, 1 << 40, HUGE),
        *each("bad-field", "desc_act", "x", 2, [], None),
        *each("unknown-variant", "checkpoint_format", "abacus", "", "é", "x" * 100_000),
        *each("bad-field", "checkpoint_format", 3, None, []),
        *each("unknown-variant", "pack_dtype", "int4", "int128", ""),
        *each("bad-dtype", "pack_dtype", "int64", "int8"),
        *each("bad-field", "dynamic", 3, [], {"a": 3}, {"(": {"bits": 2}}, {"[z-a]": {}}, {".*": {"bits": "x"}},
              {".*": {"bits": 99}}, {".*": {"group_size": 0}}),
        *each("limit-exceeded", "dynamic", {BOMB: {}}, {LONG: {}}, {"((a*)*)*": {}}),
        *each("limit-exceeded", "dynamic", {key: {} for key in MANY}),
        *each("bad-field", "modules_in_block_to_quantize", "x", 3),
        *each("unknown-variant", "is_marlin_format", True),
    ],
    "gptq-marlin": [*each("unknown-variant", "bits", 8, 3), *each("unknown-variant", "sym", False),
                    *each("unknown-variant", "desc_act", True), *each("bad-shape", "group_size", 48, 128)],
    "gptq-bitblas": [*each("unknown-variant", "desc_act", True), *each("bad-field", "bits", 3, 16), *each("bad-field", "zeros_mode", "x", 3),
                     *each("bad-shape", "group_size", 48), *each("bad-field", "fast_decoding", "x", [])],
    "awq-gemm": [
        *each("bad-field", "bits", *NUMBERS, 1, 9),
        *each("bad-shape", "bits", 3, 8),
        *each("bad-field", "group_size", "x", None, ABSENT, 0, -2, 0.5, []),
        *each("bad-shape", "group_size", 5, 48, 1 << 40),
        *each("unknown-variant", "version", "abacus", "", "é", "x" * 100_000),
        *each("bad-field", "version", 3, None, []),
        *each("bad-field", "modules_to_not_convert", "x", 3, [3], {}, NESTED),
        *each("bad-field", "zero_point", "x", 2, []),
    ],
    "bitblas-rescale": [
        *each("bad-field", "bits", *NUMBERS, 3, 5, 16),
        *each("bad-field", "group_size", "x", -2, 0.5, []),
        *each("bad-shape", "group_size", 48, 7),
        *each("bad-field", "zeros_mode", "abacus", 3, None, "RESCALE"),
        *each("bad-shape", "zeros_mode", "quantized"),
        *each("bad-field", "desc_act", True, "x", []),
    ],
    "auto-round-": [
        *each("bad-field", "bits", *NUMBERS, 0, 1, 9, 16),
        *each("bad-field", "group_size", "x", None, ABSENT, 0, -2, [1], [0, 0]),
        *each("bad-shape", "group_size", 7, HUGE),
        *each("unknown-variant", "data_type", "abacus", "", "mx_int"),
        *each("bad-field", "data_type", 3, None, []),
        *each("unknown-variant", "packing_format", "abacus", "auto_gptq"),
        *each("unknown-variant", "act_bits", 8, 4, 0, -1),
        *each("unknown-variant", "fmt", "e3m4"),
        *each("bad-field", "extra_config", 3, [], {"a": 3}, {".*": {"bits": "x"}}, {".*": {"bits": []}}, {"(": {"bits": 4}},
              {".*gate.*": {"bits": {}}}),
        *each("limit-exceeded", "extra_config", {BOMB: {"bits": 4}}, {key: {"bits": 4} for key in MANY}),
    ],
    "auto-round-FP8_BLOCK": [*each("bad-field", "group_size", [0, 32], [-1, 32]), *each("bad-shape", "group_size", [32, 32]),
                             *each("unknown-variant", "bits", 4, 7), *each("unknown-variant", "act_data_type", "x")],
    "bitsandbytes-nf4": [
        *each("bad-field", "llm_int8_threshold", "x", -1, NAN, float("inf"), None, []),
        *each("bad-field", "load_in_4bit", "x", 2, []),
        *each("bad-field", "load_in_8bit", True, "x", None),
        *each("bad-field", "bnb_4bit_compute_dtype", "int8", "torch.float32", 3, [], ""),
        *each("bad-field", "llm_int8_skip_modules", "x", 3, [3]),
        *each("bad-field", "state:quant_type", "nf3", "", None, ABSENT, 3, "fp4"),
        *each("bad-field", "state:blocksize", 0, -1, 31, 4097, HUGE, "x", None, []),
        *each("bad-field", "state:shape", ABSENT, None, [], [96], [96, 64, 1], [0, 64], [-96, -64], ["x", 64], "96x64"),
        *each("bad-shape", "state:shape", [96, 65], [1 << 40, 1 << 40], [HUGE, 1]),
        *each("bad-field", "state:nested_blocksize", 0, -1, 65537, "x", []),
        *each("bad-field", "state:nested_offset", "x", [], {}),
        *each("bad-field", "state:nested_offset", NAN, float("inf")),
    ],
    "compressed-tensors-pack": [
        *each("unknown-variant", "format", "abacus", "", "marlin-24", "x" * 100_000),
        *each("bad-field", "format", 3, None, []),
        *each("bad-field", "config_groups", 3, [], {}, {"g": 3}, {"g": {}}, {"g": {"targets": "x"}}, {"g": {"targets": [3]}}),
        *each("unknown-variant", "config_groups", {"abacus": ["re:.*down_proj"]}),
        *each("bad-field", "config_groups", {"g": {"targets": ["re:.*"]}}),
        *each("bad-field", "config_groups.group_0.weights.num_bits", *NUMBERS[:1], 0, 9, HUGE, NAN),
        *each("bad-shape", "config_groups.group_0.weights.num_bits", 3),
        *each("bad-field", "config_groups.group_0.weights.type", "complex", 3, None),
        *each("bad-field", "config_groups.group_0.weights.strategy", "abacus", 3),
        *each("unknown-variant", "config_groups.group_0.weights.group_size", None, 0, -5),
        *each("bad-shape", "config_groups.group_0.weights.group_size", 1 << 40, 7),
        *each("bad-field", "config_groups.group_0.targets", ["re:("], ["re:[z-a]"], [], ["x"]),
        *each("limit-exceeded", "config_groups.group_0.targets", ["re:" + BOMB], [LONG], ["re:(a+)+$"]),
        *each("bad-field", "ignore", "x", 3, ["re:.*"], ["re:("], [3]),
        *each("limit-exceeded", "ignore", MANY),
        *each("limit-exceeded", "config_groups.group_0.targets", MANY),
        *each("unknown-variant", "sparsity_config", {"format": "sparse-24-bitmask"}),
        *each("bad-field", "sparsity_config", 3, "x"),
        *each("unknown-variant", "kv_cache_scheme", {"num_bits": 4}, {"strategy": "group"}, {"dynamic": True}),
        *each("bad-field", "kv_cache_scheme", 3, "x", {"num_bits": 99}, {"type": "x"}),
    ],
    "fp8-block": [
        *each("bad-field", "weight_block_size", [32], [32, 48, 1], "x", 3, ["x", 48], [0.5, 1]),
        *each("unknown-variant", "weight_block_size", [0, 48], [-1, 48], [32, 0]),
        *each("bad-shape", "weight_block_size", [16, 48], [1 << 40, 1 << 40], [HUGE, 1]),
        *each("bad-shape", "weight_block_size", None, ABSENT),
        *each("unknown-variant", "fmt", "e5m2", "", "abacus"),
        *each("unknown-variant", "scale_fmt", "abacus", ""),
        *each("bad-field", "dequantize", "x", 2, None, []),
        *each("bad-field", "activation_scheme", "abacus", 3, None, []),
        *each("missing-tensor", "activation_scheme", "static"),
        *each("bad-field", "ignored_layers", "x", 3, [3]),
        *each("bad-field", "activation_scale_ub", "x", 0, -1, NAN, float("inf")),
    ],
    "modelopt-FP8": [
        *each("unknown-variant", "quant_algo", "abacus", "", None, ABSENT, "é", "x" * 100_000, "MIXED_PRECISION"),
        *each("bad-field", "quant_algo", 3, [], {}),
        *each("bad-field", "exclude_modules", "x", 3, [3], {}),
        *each("limit-exceeded", "exclude_modules", ["[" * 5000], ["*" * 5000], [*MANY, *MANY] * 4),
        *each("bad-field", "quantized_layers", 3, [], {"a": 3}),
        *each("unknown-variant", "has_zero_point", True),
        *each("unknown-variant", "kv_cache_quant_algo", "NVFP4", "abacus"),
        *each("bad-field", "kv_cache_quant_algo", 3, []),
        *each("unknown-variant", "kv_cache_scheme", {"num_bits": 4}, "abacus", {"strategy": [1]}, {"type": {}}),
        *each("bad-dtype", "quant_algo", "NVFP4", "W8A16", "W4A16_AWQ"),
    ],
    "quark-uint4": [
        *each("bad-field", "global_quant_config", 3, [], ABSENT, None, "x", {"weight": 3}, {"weight": {"dtype": 3}}),
        *each("unknown-variant", "global_quant_config", {}, {"weight": []}, {"weight": None}),
        *each("unknown-variant", "global_quant_config.weight.dtype", "int3", "", "abacus", "x" * 100_000),
        *each("unknown-variant", "global_quant_config.weight.qscheme", "per_block", "abacus", ""),
        *each("bad-field", "global_quant_config.weight.group_size", 0, -1, "x", 0.5, []),
        *each("unknown-variant", "global_quant_config.weight.group_size", None, ABSENT),
        *each("bad-shape", "global_quant_config.weight.group_size", 7, 16, 1 << 40, HUGE),
        *each("bad-field", "layer_quant_config", 3, [], {"*": 3}, {"*": {"weight": "x"}}),
        *each("unknown-variant", "layer_quant_config", {"*": {}}, {"*up*": {"weight": []}}),
        *each("limit-exceeded", "layer_quant_config", {"[" * 5000: {}}),
        *each("bad-field", "exclude", "x", 3, ["re:("], ["re:*"], [3]),
        *each("limit-exceeded", "exclude", ["re:" + BOMB], [LONG], ["?" * 5000], MANY, [f"*{i}*" for i in range(40_000)]),
        *each("limit-exceeded", "layer_quant_config", {f"*{i}*": {} for i in range(40_000)}),
        *each("bad-field", "export", 3, [], {"pack_method": "abacus"}, {"pack_method": 3}, {"kv_cache_group": 3}),
        *each("bad-field", "algo_config", 3, "x", [3], {"name": 3}, {"name": "rotation", "r4": "x"}),
        *each("unknown-variant", "algo_config", {}, [{}], {"name": "svdquant"}, {"name": "quarot"}, {"name": "rotation", "r4": True}),
        *each("bad-field", "softmax_quant_spec", 3, "x", [], {"dtype": 3}),
    ],
    "torchao-Int8Tensor-dynamic": [
        *each("unknown-variant", "record:_type", "Mystery", "", "x" * 100_000),
        *each("bad-field", "record:_type", 3, None, ABSENT, []),
        *each("bad-field", "record:_data", 3, [], "x"),
        *each("bad-field", "record:_tensor_data_names", 3, [3], "x"),
        *each("unknown-variant", "record:_data.block_size", "row", [], [1], [1, 0], [1, -64], [1, 64, 1], [1, 6.5], ABSENT, None),
        *each("bad-shape", "record:_data.block_size", [2, 64], [1, 16]),
        *each("unknown-variant", "record:_data.act_quant_kwargs", 3, [], "x", {"_type": "x"}, {"_data": []}, NESTED),
        *each("unknown-variant", "record:_data.act_quant_kwargs._data.granularity", 3, {}, {"_type": "PerBlock"},
              {"_type": "PerBlock", "_data": {"block_size": []}}, {"_type": "PerBlock", "_data": {"block_size": ["x"]}}, {"_type": []}),
        *each("unknown-variant", "record:_data.act_quant_kwargs._data.mapping_type", [], 3, {"_data": []}),
    ],
    "torchao-IntxUnpackedToInt8Tensor-4a8": [
        *each("unknown-variant", "record:_data.target_dtype", "int9", "int0", "x", 3, [], {"_data": []}, None, "int²"),
        *each("unknown-variant", "record:_data.activation_quantization", "x", [], {}, 3),
    ],
    "torchao-Int4PlainInt32Tensor": [
        *each("unknown-variant", "record:_data.shape", [96], [96, 64, 1], [-96, 64], "x", None, [96, "x"]),
        *each("bad-shape", "record:_data.shape", [96, 128], [1 << 40, 1 << 40], [96, HUGE]),
    ],
    "torchao-MXTensor-inputs": [
        *each("unknown-variant", "record:_data.elem_dtype", "float6_e3m2", 3, [], {"_data": {}}, None),
        *each("unknown-variant", "record:_data.block_size", 16, 32.0, "32", [32], None),
        *each("bad-shape", "record:_data.is_swizzled_scales", True),
        *each("unknown-variant", "record:_data.act_quant_kwargs._data.scaling_mode", "CEIL", [], None, 3),
    ],
}  # fmt: skip

CONTENTS: dict[str, list[tuple[str, str, int, bytes]]] = {
    "gptq-v1": [("bad-content", "g_idx", 0, b"\3\0\0\0"), ("bad-content", "g_idx", 380, b"\0\0\0\x80")],
    "compressed-tensors-order": [("bad-content", "weight_g_idx", 8, b"\3\0\0\0")],
    "compressed-tensors-pack": [("bad-shape", "weight_shape", 0, bytes([65])), ("bad-shape", "weight_shape", 15, b"\x7f")],
    "compressed-tensors-NVFP4": [("bad-content", "weight_global_scale", 0, bytes(4)), ("bad-content", "input_global_scale", 3, b"\xc0")],
    "compressed-tensors-MXFP4": [("bad-content", "weight_scale", 17, b"\xff")],
    "compressed-tensors-kv": [
        ("bad-content", "0.self_attn.k_scale", 0, bytes(4)), ("bad-content", "1.self_attn.v_scale", 3, b"\xbc"),
        ("bad-content", "0.self_attn.v_scale", 0, b"\0\0\xc0\x7f"), ("bad-content", "1.self_attn.k_scale", 0, b"\0\0\x80\x7f"),
    ],
    "fp8-tensor": [("bad-content", "input_scale", 0, bytes(4)), ("bad-content", "input_scale", 3, b"\xbc"), ("bad-content", "weight_scale", 3, b"\xbc"),
                   ("bad-content", "up_proj.weight", 5, b"\x7f"), ("bad-content", "up_proj.weight", 900, b"\xff")],
    "fp8-block": [("bad-content", "weight_scale_inv", 7, b"\xbc")],
    "auto-round-FP8_STATIC": [("bad-content", "weight_scale", 3, b"\xbc")],
    "torchao-Float8Tensor-row": [("bad-content", "_weight_scale", 7, b"\xbc"), ("bad-content", "_weight_qdata", 7, b"\xff")],
    "bitsandbytes-fp4": [("bad-content", "weight.absmax", 3, b"\xbc")],
    "bitsandbytes-int8": [("bad-content", "SCB", 3, b"\xc0")],
    "inc-saved": [("bad-content", "scale_weight", 1, b"\xbc"), ("bad-content", "scale_input", 1, b"\xbc")],
    "modelopt-FP8": [("bad-content", "input_scale", 0, bytes(4)), ("bad-content", "weight_scale", 0, b"\0\0\x80\x7f")],
    "modelopt-NVFP4": [("bad-content", "input_scale", 0, bytes(4)), ("bad-content", "weight_scale", 5, b"\x7f"), ("bad-content", "weight_scale", 9, b"\xb8"),
                       ("bad-content", "weight_scale_2", 3, b"\xbc")],
    "quark-fp8": [("bad-content", "input_scale", 0, bytes(4)), ("bad-content", "weight_scale", 3, b"\xbc")],
    "quark-int8": [("bad-content", "weight_zero_point", 7, b"\1")],
    "torchao-IntxUnpackedToInt8Tensor-4a8": [("bad-content", "_weight_qdata", 3, b"\x08"), ("bad-content", "_weight_zero_point", 1, b"\x09")],
    "torchao-Int4PlainInt32Tensor": [("bad-content", "_weight_zero_point", 0, b"\x10"), ("bad-content", "_weight_zero_point", 9, b"\xff")],
    "torchao-MXTensor-inputs": [("bad-content", "_weight_scale", 11, b"\xff")],
    "bitblas-original": [("bad-content", "zeros", 0, b"\0\x38"), ("bad-content", "zeros", 1, b"\xc4")],
    "bitsandbytes-nf4": [
        ("bad-content", "weight.quant_map", 0, b"\0\0\xc0\x7f"), ("bad-content", "weight.nested_quant_map", 8, b"\0\0\x80\x7f"),
        ("bad-content", "weight.nested_absmax", 0, b"\0\0\xc0\xff"), ("bad-content", "weight.nested_absmax", 3, b"\xbc"), ("bad-json", "weight.quant_state.bitsandbytes__nf4", 0, b"["),
        ("bad-json", "weight.quant_state.bitsandbytes__nf4", 3, b"\0"),
    ],
}  # fmt: skip
"""Bytes written into a tensor at a place."""


def put(root: Any, place: str, value: Any) -> None:
    *way, last = place.split(".")
    for step in way:
        root = root[step]
    if value is ABSENT:
        del root[last]
    else:
        root[last] = value


def _stated(place: str, value: Any) -> Change:
    def change(sample: Sample) -> None:
        where, _, inner = place.rpartition(":")
        if where == "record":
            name = next(name for name, text in sample.metadata.items() if "_tensor_data_names" in text)
            record = json.loads(sample.metadata[name])
            put(record, inner, value)
            sample.metadata[name] = json.dumps(record)
        elif where == "state":
            held = next(held for name, held in sample.tensors.items() if "quant_state" in name)
            state = json.loads(held.data)
            put(state, inner, value)
            held.data = json.dumps(state).encode()
            held.shape = [len(held.data)]
        elif place.startswith("/"):
            put(sample.config, place[1:], value)
        else:
            put(sample.config["quantization_config"], place, value)

    return change


def _written(part: str, at: int, data: bytes) -> Change:
    def change(sample: Sample) -> None:
        held: Held = next(held for name, held in sample.tensors.items() if name.endswith(f".{part}"))
        held.data = held.data[:at] + data + held.data[at + len(data) :]

    return change


def config_cases() -> Iterator[tuple[str, str, str, Change]]:
    """Variant, what is done, the code, and the change."""
    for variant, rows in (*CONFIGS.items(), ("gptq-v2", UNNAMED)):
        for code, place, value in rows:
            shown = "absent" if value is ABSENT else f"{value!r:.60}"
            yield variant, f"{place} {shown}", code, _stated(place, value)
    for variant, contents in CONTENTS.items():
        for code, part, at, data in contents:
            yield variant, f"{part} {data.hex()} at {at}", code, _written(part, at, data)
