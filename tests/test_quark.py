"""Quark from numbers that the test chooses: every type and granularity, both packings, layers of their own, broken parts."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, words, write
from qcore.convert import convert
from qcore.kernels.activations import quantize_input
from qcore.kernels.reference import ReferenceLinear
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
    again = qcore.open_checkpoint(convert(opened.path, "quark", tmp_path / "again"))
    assert again.plan == opened.plan and torch.equal(again.dequantize(UP), expected)
    for part, tensor in parts.items():
        if inputs is None and part.startswith("input"):
            continue  # of no use where inputs stay whole
        kept = again.files.source.read(f"{UP}.{part}")
        assert kept.dtype == tensor.dtype and torch.equal(kept.float(), tensor.float()), part
    reasons = {module: entry.reason for module, entry in opened.layers.items()}
    assert "lm_head" in reasons["lm_head"] and "re:" in reasons["model.layers.0.self_attn.q_proj"]
    assert reasons["model.layers.0.mlp.gate_proj"] == "stored unquantized"


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4"])
@pytest.mark.parametrize("qscheme", ["per_group", "per_channel", "per_tensor"])
def test_asymmetric_integers_are_exact(tmp_path: Path, dtype: str, qscheme: str) -> None:
    """Codes and zero points of int4 and int8 are two's complement; groups are transposed."""
    bits, signed = int(dtype[-1]), dtype[0] == "i"
    low = -(1 << (bits - 1)) if signed else 0
    codes, zeros = (torch.randint(low, low + (1 << bits), shape) for shape in ((ROWS, COLUMNS), (ROWS, 2)))
    scale = torch.rand(ROWS, 2) * 0.01 + 0.001
    if qscheme != "per_group":
        zeros, scale = zeros[:, :1], scale[:, :1]
    if qscheme == "per_tensor":
        zeros, scale = zeros[:1], scale[:1]
    turned = (lambda t: t.t().contiguous()) if qscheme == "per_group" else (lambda t: t)

    def stored(part: torch.Tensor) -> torch.Tensor:
        if bits == 8:
            return part.to(torch.int8 if signed else torch.uint8)
        return gemm_words(part & 15) if part.shape[1] % 8 == 0 else (part & 15).int()

    kept = stored(turned(zeros) if qscheme == "per_group" else zeros.t())
    shapes = {"per_group": kept.shape, "per_channel": (-1,), "per_tensor": ()}
    parts = {"weight": stored(turned(codes)), "weight_zero_point": kept.reshape(shapes[qscheme]),
             "weight_scale": turned(scale) if qscheme == "per_group" else scale.reshape(shapes[qscheme])}  # fmt: skip
    size = {"group_size": COLUMNS // 2} if qscheme == "per_group" else {}
    path = checkpoint(tmp_path / "a", parts, spec(dtype, qscheme, **size) | {"symmetric": False})
    spread = COLUMNS // zeros.shape[1]
    expected = (codes - zeros.repeat_interleave(spread, 1)).float() * scale.repeat_interleave(spread, 1)
    first, opened = (qcore.open_checkpoint(p) for p in (path, convert(path, "quark", tmp_path / "b")))
    grid = {"per_group": f"g{COLUMNS // 2}", "per_channel": "channel", "per_tensor": "tensor"}[qscheme]
    assert str(first.plan[UP]) == f"W{bits}A16-{grid}-asym" == str(opened.plan[UP])
    assert torch.equal(first.dequantize(UP), expected) and torch.equal(opened.dequantize(UP), expected)


@pytest.mark.parametrize(("dtype", "stored"), [("uint8", 200), ("int8", 72)])
def test_asymmetric_inputs_are_signed(tmp_path: Path, dtype: str, stored: int) -> None:
    parts, _ = made("int8", "per_channel")
    zero = torch.tensor(stored, dtype=torch.uint8 if dtype == "uint8" else torch.int8)
    parts |= {"input_scale": torch.tensor(0.03), "input_zero_point": zero}
    given = spec(dtype) | {"symmetric": False}
    path = checkpoint(tmp_path / "a", parts, spec("int8", "per_channel"), given)
    for opened in map(qcore.open_checkpoint, (path, convert(path, "quark", tmp_path / "b"))):
        assert str(opened.plan[UP]) == "W8A8-int8-channel-sym/int8-tensor-asym"
        assert opened.layer(UP).input_zero == torch.tensor([72], dtype=torch.int8)


@pytest.mark.parametrize("zero", [0, 72])
def test_inputs_by_tensor_are_rounded_as_torch_rounds_them(tmp_path: Path, zero: int) -> None:
    """torch's fake quantization multiplies by 1 / scale, and so decides some ties and near ties another way than a division."""
    parts, _ = made("int8", "per_channel")
    parts |= {"input_scale": torch.tensor(0.03), "input_zero_point": torch.tensor(zero, dtype=torch.int8)}
    path = checkpoint(tmp_path, parts, spec("int8", "per_channel"), spec("int8") | {"symmetric": not zero})
    layer = qcore.open_checkpoint(path).layer(UP)
    x = (torch.arange(-200 * COLUMNS, 200 * COLUMNS).reshape(-1, COLUMNS) * 0.5 * torch.tensor(0.03)).nextafter(
        torch.tensor(0.0)
    )
    rounded = torch.fake_quantize_per_tensor_affine(x, 0.03, zero, -128, 127)
    divided = quantize_input(x, layer.weight.scheme.input, layer.input_scale, layer.input_zero)
    assert not torch.equal(rounded, divided)
    expected = torch.nn.functional.linear(rounded, layer.weight.dequantize(torch.float32))
    assert torch.equal(ReferenceLinear.from_layer(layer, torch.float32)(x), expected)


@pytest.mark.parametrize(("mode", "word"), [("even", "e8m0"), ("floor", "e8m0floor"), ("ceil", "e8m0ceil")])
def test_how_the_exponents_of_inputs_are_found_follows_the_config(tmp_path: Path, mode: str, word: str) -> None:
    parts, _ = made("fp4", "per_group")
    mx = spec("fp4", "per_group", group_size=32, scale_format="e8m0", scale_calculation_mode=mode)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, mx, mx | {"is_dynamic": True}))
    assert opened.plan[UP] == Scheme.parse(f"W4A4-e2m1-g32:e8m0/e2m1-g32:{word}-dyn")


def test_linear_layers_may_have_a_scheme_by_their_type(tmp_path: Path) -> None:
    parts, expected = made("int8", "per_channel")
    own = {"weight": spec("int8", "per_channel")}
    path = checkpoint(tmp_path / "a", parts, spec("fp8_e4m3"), layer_type_quant_config={"Linear": own})
    assert torch.equal(qcore.open_checkpoint(path).dequantize(UP), expected)
    with pytest.raises(qcore.Refused, match="layer_type_quant_config"):
        qcore.open_checkpoint(
            checkpoint(tmp_path / "b", parts, spec("fp8_e4m3"), layer_type_quant_config={"Conv2d": own})
        )


def test_weights_that_only_look_quantized_are_refused_by_name(tmp_path: Path) -> None:
    parts = {"weight": torch.zeros(ROWS, COLUMNS), "weight_scale": torch.tensor(1.0)}
    path = checkpoint(tmp_path, parts, spec("fp8_e4m3"), export={"weight_format": "fake_quantized"})
    with pytest.raises(qcore.Refused, match="fake_quantized"):
        qcore.open_checkpoint(path)


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


@pytest.mark.parametrize("where", ["kv_cache_quant_config", "layer_quant_config"])
@pytest.mark.parametrize("post_rope", [True, False])
def test_a_kv_cache_needs_no_group(tmp_path: Path, where: str, post_rope: bool) -> None:
    """Groups serve the export; what Quark loads is told by the specs of outputs."""
    parts, _ = made("fp8_e4m3", "per_tensor")
    own = {"weight": spec("fp8_e4m3"), "output_tensors": spec("fp8_e4m3")}
    path = checkpoint(
        tmp_path,
        parts,
        spec("fp8_e4m3"),
        **{where: {"*k_proj": own}},
        kv_cache_post_rope=post_rope,
        softmax_quant_spec=None,
    )
    assert str(qcore.open_checkpoint(path).kv_cache) == "fp8-tensor"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"softmax_quant_spec": spec("fp8_e4m3")}, "attention probabilities in fp8_e4m3 per_tensor"),
        (
            {"layer_quant_config": {"*q_proj": {"weight": spec("fp8_e4m3"), "output_tensors": spec("fp8_e4m3")}}},
            "queries",
        ),
    ],
)
def test_attention_in_fp8_is_refused_but_by_who_wants_it_whole(tmp_path: Path, change: Any, named: str) -> None:
    parts, _ = made("fp8_e4m3", "per_tensor")
    path = checkpoint(tmp_path, parts, spec("fp8_e4m3"), **change)
    with pytest.raises(qcore.Refused, match=named) as caught:
        qcore.load_model(path, dtype="float32")
    assert str(caught.value.refusal.field).endswith(next(iter(change)))
    qcore.load_model(path, dtype="float32", kv_cache="none")


@pytest.mark.parametrize(
    ("algorithm", "named"),
    [
        ({"name": "rotation", "r1": True, "r4": True}, "rotation r4"),
        ({"name": "rotation", "r3": True}, "rotation r3"),
        ({"name": "rotation", "r1": True, "online_r1_rotation": True}, "online_r1_rotation"),
        ({"name": "quarot"}, "quarot r3, quarot r4"),
        ({"name": "svdquant", "svd_rank": 32}, "svdquant"),
        ({"name": "mine"}, "mine"),
        ({"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": False, "online_r1_rotation": False}, ""),
        ({"name": "smooth", "alpha": 1}, ""),
    ],
)
@pytest.mark.parametrize("old", [True, False])
def test_what_algorithms_leave_to_run_time_is_refused(tmp_path: Path, algorithm: Any, named: str, old: bool) -> None:
    parts, weight = made("fp8_e4m3", "per_tensor")
    path = checkpoint(tmp_path, parts, spec("fp8_e4m3"), algo_config=algorithm if old else [{"name": "awq"}, algorithm])
    if not named:
        assert torch.equal(qcore.open_checkpoint(path).dequantize(UP), weight)
        return
    with pytest.raises(qcore.Refused, match=named):
        qcore.open_checkpoint(path)


def test_a_quantized_bias_is_refused_where_there_is_one(tmp_path: Path) -> None:
    parts, weight = made("fp8_e4m3", "per_tensor")
    own = {"global_quant_config": {"weight": spec("fp8_e4m3"), "bias": spec("fp8_e4m3")}}
    path = checkpoint(tmp_path / "a", parts, None, **own)
    assert torch.equal(qcore.open_checkpoint(path).dequantize(UP), weight)
    with pytest.raises(qcore.Refused, match="a quantized bias"):
        qcore.open_checkpoint(checkpoint(tmp_path / "b", {**parts, "bias": torch.ones(ROWS)}, None, **own))


@pytest.mark.parametrize("where", ["kv_cache_quant_config", "layer_quant_config"])
@pytest.mark.parametrize("output", [spec("int8"), spec("fp8_e4m3", is_dynamic=True), [spec("fp8_e4m3", "per_channel")]])
def test_a_kv_cache_of_another_type_is_refused(tmp_path: Path, where: str, output: Any) -> None:
    parts, _ = made("fp8_e4m3", "per_tensor")
    opened = qcore.open_checkpoint(
        checkpoint(tmp_path, parts, spec("fp8_e4m3"), **{where: {"*k_proj": {"output_tensors": output}}})
    )
    with pytest.raises(qcore.Refused, match="unknown-variant"):
        _ = opened.kv_cache


@pytest.mark.parametrize(
    ("name", "layer"),
    [("*up_proj", {"weight": spec("fp8_e4m3"), "output_tensors": spec("fp8_e4m3")}), ("*down_proj", {"input_tensors": spec("fp8_e4m3")})],
)  # fmt: skip
def test_what_layers_round_beside_their_weights_is_refused(tmp_path: Path, name: str, layer: Any) -> None:
    parts, _ = made("fp8_e4m3", "per_tensor")
    with pytest.raises(qcore.Refused, match="unknown-variant"):
        qcore.open_checkpoint(checkpoint(tmp_path, parts, spec("fp8_e4m3"), layer_quant_config={name: layer}))


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
        (spec("int8", symmetric=False), None, {}, "bad-dtype"),
        (spec("fp8_e4m3", "per_channel", ch_axis=1), None, {}, "unknown-variant"),
        (spec("fp4", "per_group", group_size=16, scale_format="e5m3"), None, {}, "unknown-variant"),
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
        *(
            (spec("fp8_e4m3"), spec("int8", "per_channel", is_dynamic=True, **found), {}, "unknown-variant")
            for found in (
                {"ch_axis": -1},
                {"observer_cls": "PerChannelPowOf2MinMaxObserver"},
                {"observer_cls": "PerTensorPercentileObserver"},
                {"scale_type": "bfloat16"},
                {"round_method": "floor"},
            )
        ),
        (
            spec("fp8_e4m3"),
            {**spec("int8", is_dynamic=True, zero_point_type="float32"), "symmetric": False},
            {},
            "unknown-variant",
        ),
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


def test_mixed_layers_a_tied_head_and_a_kv_cache_are_written(tmp_path: Path) -> None:
    down, attention = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn"
    tensors = dense_llama(tie_word_embeddings=True)
    del tensors[f"{UP}.weight"], tensors[f"{down}.weight"]
    tensors |= {f"{UP}.{part}": tensor for part, tensor in made("uint4", "per_group")[0].items()}
    tensors |= {f"{down}.weight": torch.ones(64, 96).to(torch.float8_e4m3fn), f"{down}.weight_scale": torch.tensor(0.5)}
    tensors |= {f"{attention}.{p}_proj.output_scale": torch.tensor(0.25) for p in "kv"}
    config = {"quant_method": "quark", "global_quant_config": {"weight": spec("uint4", "per_group", group_size=32)},
              "layer_quant_config": {"*down_proj": {"weight": spec("fp8_e4m3")}},
              "export": {"kv_cache_group": ["*k_proj", "*v_proj"]}}  # fmt: skip
    first = qcore.open_checkpoint(write(tmp_path / "a", tensors, config, tie_word_embeddings=True))
    opened = qcore.open_checkpoint(convert(first.path, "quark", tmp_path / "b"))
    assert opened.plan == first.plan and all(torch.equal(opened.dequantize(m), first.dequantize(m)) for m in (UP, down))
    assert str(opened.kv_cache) == "fp8-tensor" and opened.kv_scales[attention].v.scale.tolist() == [0.25]
    stated = opened.files.quantization
    assert stated and "lm_head" in stated["exclude"] and len(stated["layer_quant_config"]) == 1


@pytest.mark.parametrize("how", ["W3A16-g32-sym", "bitsandbytes:nf4"])
def test_what_quark_cannot_hold_is_refused(tmp_path: Path, how: str) -> None:
    source = qcore.open_checkpoint(write(tmp_path / "a", dense_llama()))
    with pytest.raises(qcore.Refused, match="not-representable"):
        convert(source.quantized(how), "quark", tmp_path / "b")
