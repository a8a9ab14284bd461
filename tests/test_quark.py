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
    ],
)
def test_every_scheme_is_exact(tmp_path: Path, weight: dict[str, Any], inputs: Any, scheme: str) -> None:
    parts, expected = made(weight["dtype"], weight["qscheme"])
    if inputs and not inputs["is_dynamic"]:
        parts["input_scale"] = torch.tensor(0.03)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, weight, inputs))
    assert opened.method == "quark" and torch.equal(opened.dequantize(UP), expected)
    assert opened.plan[UP] == opened.weight(UP).scheme == Scheme.parse(scheme)
    if scheme != "W4A4-mxfp4":
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
        (spec("int4", "per_group", group_size=32), None, {}, "unknown-variant"),
        (spec("fp6_e3m2", "per_group", group_size=32), None, {}, "unknown-variant"),
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
