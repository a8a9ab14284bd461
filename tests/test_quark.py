"""Quark from numbers that the test chooses: every type and granularity, both packings, layers of their own, broken parts."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, words, write
from qcore.scheme import Scheme
from qcore.tensor import float_table
from test_awq import gemm_words

UP = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 96, 64


def spec(dtype: str, qscheme: str = "per_tensor", **rest: Any) -> dict[str, Any]:
    return {"dtype": dtype, "qscheme": qscheme, "symmetric": dtype != "uint4", "is_dynamic": False, **rest}


NV = [spec("fp4", "per_group", group_size=16), spec("fp8_e4m3", is_scale_quant=True)]


def made(dtype: str, qscheme: str, *, order: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of up_proj, and its weight by the definition."""
    random = torch.Generator().manual_seed(0)
    scale = torch.rand(ROWS if qscheme == "per_channel" else 1, generator=random) * 0.01 + 0.001
    stored = scale if qscheme == "per_channel" else scale[0]
    if dtype == "fp8_e4m3":
        codes = torch.randn(ROWS, COLUMNS, generator=random).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": stored}, codes.float() * scale[:, None]
    if dtype == "int8":
        codes = torch.randint(-127, 128, (ROWS, COLUMNS), generator=random, dtype=torch.int8)
        zero = torch.zeros_like(stored, dtype=torch.int8)
        return {"weight": codes, "weight_scale": stored, "weight_zero_point": zero}, codes.float() * scale[:, None]
    if dtype == "fp8_block":
        codes, scales = torch.randn(ROWS, COLUMNS, generator=random).to(torch.float8_e5m2), torch.rand(3, 2) * 0.01
        spread = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return {"weight": codes, "weight_scale": scales}, codes.float() * spread
    if dtype.startswith("fp6"):
        codes = torch.randint(0, 64, (ROWS, COLUMNS), generator=random)
        exponents = torch.randint(118, 123, (ROWS, COLUMNS // 32), generator=random, dtype=torch.uint8)
        weight = float_table(dtype[4:])[codes] * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
        return {"weight": words(codes, 6).view(torch.uint8), "weight_scale": exponents}, weight
    if dtype == "nvfp4":
        nibbles = torch.randint(0, 16, (ROWS, COLUMNS), generator=random, dtype=torch.uint8)
        fine = torch.rand(ROWS, COLUMNS // 16, generator=random).to(torch.float8_e4m3fn)
        weight = float_table("e2m1")[nibbles.int()] * (fine.float() * stored).repeat_interleave(16, 1)
        packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        parts = {"weight": packed, "weight_scale": fine, "weight_scale_2": stored, "input_scale_2": torch.tensor(0.1)}
        return parts, weight
    if dtype in ("int4", "w4a8"):
        codes = torch.randint(-8, 8, (ROWS, COLUMNS), generator=random)
        pack = (lambda t: words(t, 4)) if order else gemm_words
        if qscheme == "per_group":
            fine = torch.rand(ROWS, COLUMNS // 32, generator=random) * 0.01 + 0.001
            parts = {"weight": pack(codes.t() & 15), "weight_scale": fine.t()}
            return parts, codes.float() * fine.repeat_interleave(32, 1)
        parts = {"weight": pack(codes & 15), "weight_scale": stored}
        if dtype == "w4a8":
            fine = torch.rand(ROWS, generator=random)
            parts |= {"weight_scale_2": fine, "input_scale": torch.tensor(0.1)}
            return parts, codes.float() * (fine * stored)[:, None]
        return parts, codes.float() * scale[:, None]
    if dtype == "uint4" and qscheme == "per_channel":
        codes, zeros = (torch.randint(0, 16, (ROWS, n), generator=random) for n in (COLUMNS, 1))
        parts = {"weight": gemm_words(codes), "weight_scale": stored, "weight_zero_point": gemm_words(zeros.t())[0]}
        return parts, (codes - zeros).float() * scale[:, None]
    if dtype == "fp4":
        nibbles = torch.randint(0, 16, (ROWS, COLUMNS), generator=random, dtype=torch.uint8)
        exponents = torch.randint(118, 123, (ROWS, COLUMNS // 32), generator=random, dtype=torch.uint8)
        weight = float_table("e2m1")[nibbles.int()] * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
        return {"weight": nibbles[:, 0::2] | nibbles[:, 1::2] << 4, "weight_scale": exponents}, weight
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=random)
    zeros = torch.randint(0, 16, (ROWS, COLUMNS // 32), generator=random)
    fine = torch.rand(ROWS, COLUMNS // 32, generator=random) * 0.01 + 0.001
    pack = (lambda t: words(t, 4)) if order else gemm_words
    parts = {"weight": pack(codes.t()), "weight_scale": fine.t(), "weight_zero_point": pack(zeros.t())}
    return parts, (codes - zeros.repeat_interleave(32, 1)).float() * fine.repeat_interleave(32, 1)


def checkpoint(folder: Path, parts: dict[str, torch.Tensor], weight: Any, inputs: Any = None, **config: Any) -> Path:
    tensors = dense_llama()
    del tensors[f"{UP}.weight"]
    tensors |= {f"{UP}.{part}": tensor for part, tensor in parts.items()}
    settings = {
        "quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": inputs},
        "exclude": ["lm_head", r"re:model\.layers\.0\.self_attn.*"], "export": {"pack_method": "reorder"}, **config,
    }  # fmt: skip
    return write(folder, tensors, settings)


@pytest.mark.parametrize(
    ("weight", "inputs", "scheme"),
    [
        (spec("fp8_e4m3"), None, "W8A16-fp8-tensor"),
        (spec("fp8_e4m3"), spec("fp8_e4m3"), "W8A8-fp8-static"),
        (spec("fp8_e4m3", "per_channel"), spec("fp8_e4m3", "per_channel", is_dynamic=True), "W8A8-fp8-dyn"),
        (spec("int8"), spec("int8"), "W8A8-int8-tensor-sym/int8-tensor-sym"),
        (spec("int8", "per_channel"), spec("int8", "per_channel", is_dynamic=True), "W8A8-int8-dyn"),
        (spec("uint4", "per_group", group_size=32), None, "W4A16-g32-asym"),
        (spec("fp4", "per_group", group_size=32, scale_format="e8m0"), None, "W4A16-mxfp4"),
        (
            spec("fp4", "per_group", group_size=32, scale_format="e8m0"),
            spec("fp4", "per_group", group_size=32, scale_format="e8m0", is_dynamic=True),
            "W4A4-mxfp4",
        ),
        (MX6 := spec("fp6_e3m2", "per_group", group_size=32, scale_format="e8m0"), None, "W6A16-e3m2-g32:e8m0"),
        ({**MX6, "dtype": "fp6_e2m3"}, {**MX6, "is_dynamic": True}, "W6A6-e2m3-g32:e8m0/e3m2-g32:e8m0-dyn"),
        (spec("fp8_e5m2", "per_block", block_size=[32, 32]), None, "W8A16-e5m2-block32"),
        (spec("int4", "per_group", group_size=32), None, "W4A16-g32-sym"),
        (
            spec("int4", "per_channel"),
            spec("int8", "per_channel", is_dynamic=True),
            "W4A8-int4-channel-sym/int8-token-sym-dyn",
        ),
        (
            spec("int4", "per_group", group_size=32),
            spec("int4", "per_group", group_size=32, is_dynamic=True),
            "W4A4-int4-g32-sym/int4-g32-sym-dyn",
        ),
        (spec("uint4", "per_channel"), None, "W4A16-channel-asym"),
        (NV, [{**NV[0], "is_dynamic": True}, NV[1]], "W4A4-nvfp4"),
        (NV, None, "W4A16-nvfp4"),
        ([spec("fp8_e4m3"), spec("int4", "per_channel")], spec("fp8_e4m3"), "W4A8-int4-channel+tensor-sym/fp8-tensor"),
    ],
)
def test_every_scheme_is_exact(tmp_path: Path, weight: Any, inputs: Any, scheme: str) -> None:
    if isinstance(weight, list):
        parts, expected = made("nvfp4" if weight is NV else "w4a8", "per_tensor")
    elif weight["qscheme"] == "per_block":
        parts, expected = made("fp8_block", "per_block")
    else:
        parts, expected = made(weight["dtype"], weight["qscheme"])
    if isinstance(inputs, dict) and not inputs["is_dynamic"]:
        parts["input_scale"] = torch.tensor(0.03)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, weight, inputs))
    assert opened.method == "quark" and torch.equal(opened.dequantize(UP), expected)
    assert opened.plan[UP] == opened.weight(UP).scheme == Scheme.parse(scheme)
    model = qcore.load_model(opened, dtype="float32")
    assert bool(model(torch.tensor([[1, 5, 9]])).logits.isfinite().all())
    reasons = {module: entry.reason for module, entry in opened.layers.items()}
    assert "lm_head" in reasons["lm_head"] and "re:" in reasons["model.layers.0.self_attn.q_proj"]
    assert reasons["model.layers.0.mlp.gate_proj"] == "stored unquantized"


def test_nibbles_may_be_in_order(tmp_path: Path) -> None:
    parts, expected = made("uint4", "per_group", order=True)
    path = checkpoint(tmp_path, parts, spec("uint4", "per_group", group_size=32), export={"pack_method": "order"})
    assert torch.equal(qcore.open_checkpoint(path).dequantize(UP), expected)


def test_layers_may_have_a_scheme_of_their_own(tmp_path: Path) -> None:
    parts, expected = made("int8", "per_channel")
    own = {"*up_proj": {"weight": spec("int8", "per_channel"), "input_tensors": None}}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, spec("fp8_e4m3"), layer_quant_config=own))
    assert torch.equal(opened.dequantize(UP), expected) and "*up_proj" in opened.layers[UP].reason


def test_a_quantized_kv_cache_is_told(tmp_path: Path) -> None:
    parts, _ = made("fp8_e4m3", "per_tensor")
    path = checkpoint(tmp_path, parts, spec("fp8_e4m3"), export={"kv_cache_group": ["*k_proj", "*v_proj"]})
    assert str(qcore.open_checkpoint(path).kv_cache) == "fp8-tensor"


@pytest.mark.parametrize(
    ("weight", "inputs", "change", "code"),
    [
        (spec("int3", "per_group", group_size=32), None, {}, "unknown-variant"),
        (spec("fp6_e3m2", "per_group", group_size=32), None, {}, "unknown-variant"),
        (spec("int4", "per_block", block_size=[32, 32]), None, {}, "unknown-variant"),
        ([], None, {}, "unknown-variant"),
        (spec("fp8_e4m3"), spec("int4", "per_group", group_size=32), {}, "unknown-variant"),
        ([spec("fp4", "per_group", group_size=16), spec("fp8_e4m3")], None, {}, "unknown-variant"),
        (None, None, {}, "unknown-variant"),
        (spec("fp8_e4m3", "per_group", group_size=32), None, {}, "unknown-variant"),
        (spec("int8", symmetric=False), None, {}, "unknown-variant"),
        (spec("fp4", "per_group", group_size=32), None, {}, "unknown-variant"),
        (spec("fp8_e4m3"), spec("uint4", "per_tensor"), {}, "unknown-variant"),
        (spec("fp8_e4m3"), spec("fp8_e4m3"), {}, "missing-tensor"),
        (spec("fp8_e4m3"), None, {"weight_scale": torch.zeros(3)}, "bad-shape"),
        (spec("fp8_e4m3"), None, {"weight_scale": torch.tensor(float("inf"))}, "bad-content"),
        (spec("fp8_e4m3"), None, {"weight": torch.zeros(ROWS, COLUMNS)}, "bad-dtype"),
        (spec("fp8_e4m3"), spec("fp8_e4m3"), {"input_scale": torch.zeros(4)}, "bad-shape"),
        (spec("fp8_e4m3"), None, {"weight_zero_point": torch.tensor(3, dtype=torch.int8)}, "bad-content"),
        (spec("fp8_e4m3"), None, {"mystery": torch.zeros(3)}, "unexpected-tensor"),
        ({"dtype": 8, "qscheme": "per_tensor"}, None, {}, "bad-field"),
    ],
)
def test_what_is_broken_or_not_read_is_refused(
    tmp_path: Path, weight: Any, inputs: Any, change: dict[str, torch.Tensor], code: str
) -> None:
    parts = {**made("fp8_e4m3", "per_tensor")[0], **change}
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(checkpoint(tmp_path, parts, weight, inputs)).dequantize(UP)
    assert caught.value.refusal.code == code and caught.value.refusal.fix


@pytest.mark.parametrize("part", ["weight_scale", "weight_zero_point"])
def test_packed_parts_that_do_not_fit_are_refused(tmp_path: Path, part: str) -> None:
    parts, _ = made("uint4", "per_group")
    parts[part] = parts[part][:, :-1].contiguous()
    with pytest.raises(qcore.Refused, match="bad-shape"):
        qcore.open_checkpoint(checkpoint(tmp_path, parts, spec("uint4", "per_group", group_size=32)))


def test_a_config_without_quantized_tensors_is_refused(tmp_path: Path) -> None:
    settings = {"quant_method": "quark", "global_quant_config": {"weight": spec("fp8_e4m3")}}
    with pytest.raises(qcore.Refused, match="missing-tensor"):
        qcore.open_checkpoint(write(tmp_path, dense_llama(), settings))
