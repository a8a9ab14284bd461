"""Plain fp8 from numbers that the test chooses: per tensor, in blocks with ragged edges, by channel, and broken parts."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, write
from mixtures import EXPERTS, HIDDEN, INNER, Mixture, logits
from qcore.convert import convert
from qcore.scheme import Scheme
from qcore.tensor import float_table

UP = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 96, 64


def made(kind: str, block: tuple[int, int] = (32, 48)) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of up_proj, and its weight by the definition."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(ROWS, COLUMNS, generator=random).to(torch.float8_e4m3fn)
    if kind == "block":
        scale = torch.rand(-(-ROWS // block[0]), -(-COLUMNS // block[1]), generator=random) + 0.1
        spread = scale.repeat_interleave(block[0], 0)[:ROWS].repeat_interleave(block[1], 1)[:, :COLUMNS]
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread
    if kind == "e8m0":
        exponents = torch.randint(118, 123, (1, 1), generator=random, dtype=torch.uint8)
        weight = codes.float() * torch.exp2(exponents.float() - 127)
        return {"weight": codes, "weight_scale_inv": exponents.view(torch.float8_e8m0fnu)}, weight
    scale = torch.rand(ROWS if kind == "channel" else 1, 1, generator=random) + 0.1
    stored = scale if kind == "channel" else scale[0, 0]
    return {"weight": codes, "weight_scale": stored, "input_scale": torch.tensor(0.1)}, codes.float() * scale


def checkpoint(folder: Path, parts: dict[str, torch.Tensor], method: str = "fp8", **config: Any) -> Path:
    tensors = dense_llama()
    del tensors[f"{UP}.weight"]
    tensors |= {f"{UP}.{part}": tensor for part, tensor in parts.items()}
    return write(folder, tensors, {"quant_method": method, **config})


@pytest.mark.parametrize(
    ("kind", "method", "config", "scheme"),
    [
        ("tensor", "fp8", {"activation_scheme": "static"}, "W8A8-fp8-static"),
        ("tensor", "fp8", {"activation_scheme": "dynamic"}, "W8A8-fp8-tensor/fp8-tensor-dyn"),
        ("channel", "fbgemm_fp8", {}, "W8A8-fp8-channel/fp8-token-dyn-bound1200.0"),
        ("channel", "fbgemm_fp8", {"activation_scale_ub": 1200.0}, "W8A8-fp8-channel/fp8-token-dyn-bound1200.0"),
        ("block", "fp8", {"weight_block_size": [32, 48], "fmt": "e4m3"}, "W8A8-fp8-tile32x48/fp8-g48-dyn"),
        (
            "e8m0",
            "fp8",
            {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
            "W8A8-fp8-block128:e8m0/fp8-g128:e8m0ceil-dyn",
        ),
        (
            "block128",
            "fp8",
            {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
            "W8A8-fp8-block128/fp8-g128:e8m0ceil-dyn",
        ),
        ("block", "fp8", {"weight_block_size": [32, 48], "dequantize": True}, "W8A16-fp8-tile32x48"),
        ("tensor", "fp8", {"activation_scheme": "static", "dequantize": True}, "W8A16-fp8-tensor"),
        ("block128", "fp8", {"weight_block_size": [128, 128]}, "W8A8-fp8-block128"),
    ],
)
def test_every_form_is_exact_and_runs(
    tmp_path: Path, kind: str, method: str, config: dict[str, Any], scheme: str
) -> None:
    parts, weight = made("block", (128, 128)) if kind == "block128" else made(kind)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, method, modules_to_not_convert=["lm_head"], **config))
    assert (opened.method, opened.format_version) == ("fp8", method)
    assert opened.plan[UP] == opened.weight(UP).scheme == Scheme.parse(scheme)
    assert torch.equal(opened.dequantize(UP), weight)
    assert "lm_head" in opened.layers["lm_head"].reason
    logits = qcore.load_model(opened, dtype="float32")(torch.tensor([[1, 5, 9]])).logits
    plain = dense_llama()
    plain[f"{UP}.weight"] = weight
    whole = qcore.load_model(write(tmp_path / "plain", plain))(torch.tensor([[1, 5, 9]])).logits
    close = 1e-5 if config.get("dequantize") else 0.05  # inputs are rounded to fp8
    assert float((logits - whole).norm() / whole.norm()) < close


@pytest.mark.parametrize(
    ("kind", "config", "change", "code"),
    [
        ("tensor", {"activation_scheme": "abacus"}, {}, "bad-field"),
        ("tensor", {"fmt": "e5m2"}, {}, "unknown-variant"),
        ("block", {"weight_block_size": [32, 48], "activation_scheme": "static"}, {}, "missing-tensor"),
        ("block", {"weight_block_size": [0, 48]}, {}, "unknown-variant"),
        ("block", {"weight_block_size": [32]}, {}, "bad-field"),
        ("block", {"weight_block_size": [16, 48]}, {}, "bad-shape"),
        ("block", {}, {}, "bad-shape"),
        ("tensor", {}, {"weight_scale": None}, "missing-tensor"),
        ("tensor", {}, {"weight_scale_inv": torch.ones(())}, "duplicate"),
        ("tensor", {}, {"weight": torch.zeros(ROWS, COLUMNS, 1, dtype=torch.int8)}, "bad-shape"),
        (
            "block",
            {"weight_block_size": [32, 48]},
            {"weight_scale_inv": torch.full((3, 2), float("nan"))},
            "bad-content",
        ),
        ("tensor", {"activation_scheme": "static"}, {"input_scale": None}, "missing-tensor"),
        ("tensor", {"activation_scheme": "static"}, {"input_scale": torch.zeros(3)}, "bad-shape"),
        ("tensor", {}, {"weight_scale": torch.zeros(3)}, "bad-shape"),
        ("tensor", {}, {"mystery": torch.zeros(3)}, "unexpected-tensor"),
        ("tensor", {}, {"weight": torch.zeros(ROWS, COLUMNS)}, "missing-tensor"),
    ],
)
def test_what_is_broken_or_not_read_is_refused(
    tmp_path: Path, kind: str, config: dict[str, Any], change: dict[str, torch.Tensor | None], code: str
) -> None:
    parts = {part: tensor for part, tensor in {**made(kind)[0], **change}.items() if tensor is not None}
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(checkpoint(tmp_path, parts, **config)).dequantize(UP)
    assert caught.value.refusal.code == code and caught.value.refusal.fix


def test_scales_of_inputs_are_bounded_as_fbgemm_bounds_them() -> None:
    from qcore.kernels.activations import quantize_input

    x = torch.tensor([[1.0, 2000.0], [1.0, 448.0]])
    scheme = Scheme.parse("W8A8-fp8-channel/fp8-token-dyn-bound896.0").input
    assert scheme is not None
    assert quantize_input(x, scheme).tolist() == [[1.0, 896.0], [1.0, 448.0]]


def test_scales_of_inputs_are_rounded_up_as_deepseek_rounds_them() -> None:
    """Its act_quant under scale_fmt: 2 ** ceil(log2(absmax / 448)) for each group; values are divided by it."""
    from qcore.kernels.activations import quantize_input

    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 16)[:, None]
    x[0, 0], x[0, 1:128] = 448.0, 0.0  # exactly the largest: 1, not 2
    groups = x.unflatten(-1, (-1, 128))
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 448)))
    expected = ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    scheme = Scheme.parse("W8A8-fp8-block128:e8m0/fp8-g128:e8m0ceil-dyn").input
    assert scheme is not None and torch.equal(quantize_input(x, scheme), expected)


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
@pytest.mark.parametrize("given", ["input_scale", "activation_scale", "qscale_act"])
def test_scales_have_the_names_of_several_tools(tmp_path: Path, scale: str, given: str) -> None:
    parts, weight = made("tensor")
    renamed = {"weight": parts["weight"], scale: parts["weight_scale"], given: parts["input_scale"]}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, renamed, activation_scheme="static"))
    assert opened.plan[UP] == Scheme.parse("W8A8-fp8-static")
    assert torch.equal(opened.dequantize(UP), weight)
    assert opened.layer(UP).input_scale == parts["input_scale"]


@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
def test_gptqmodels_scales_divide(tmp_path: Path, kind: str) -> None:
    """weight_scale_inv as its name says; inputs stay whole."""
    codes = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    shape: tuple[int, ...] = {"tensor": (), "row": (ROWS,), "block": (3, 2)}[kind]
    inverse = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 900 + 100
    wide = inverse.repeat_interleave(32, 0).repeat_interleave(32, 1) if kind == "block" else inverse.reshape(-1, 1)
    config: dict[str, Any] = {
        "method": "fp8", "bits": 8, "format": "float8_e4m3fn", "weight_scale_method": kind, "group_size": -1,
        "weight_block_size": [32, 32] if kind == "block" else None, "weight_scale_semantics": "inverse",
        "dynamic": {"-:.*mlp.gate_proj": {}}, "activation": None, "rotation": None, "lm_head": False,
    }  # fmt: skip
    parts = {"weight": codes, "weight_scale_inv": inverse}
    opened = qcore.open_checkpoint(checkpoint(tmp_path / "a", parts, **config))
    grid = {"tensor": "tensor", "row": "channel", "block": "block32"}[kind]
    assert opened.plan[UP] == opened.weight(UP).scheme == Scheme.parse(f"W8A16-fp8-{grid}")
    assert torch.equal(opened.dequantize(UP), codes.float() / wide)
    assert bool(qcore.load_model(opened, dtype="float32")(torch.tensor([[1, 5]])).logits.isfinite().all())
    for change, code in (
        ({"weight_scale_semantics": "direct"}, "bad-field"),
        ({"format": "float8_e5m2"}, "unknown-variant"),
        ({"dynamic": {"+:.*up_proj": {"weight_scale_method": "tensor"}}}, "unknown-variant"),
        ({"rotation": "hadamard"}, "unknown-variant"),
    ):
        with pytest.raises(qcore.Refused) as caught:
            qcore.open_checkpoint(checkpoint(tmp_path / "b", parts, **{**config, **change}))
        assert caught.value.refusal.code == code and next(iter(change)) in str(caught.value)
    with pytest.raises(qcore.Refused, match="this scale divides"):
        qcore.open_checkpoint(
            checkpoint(tmp_path / "c", {**parts, "weight_scale_inv": inverse * 0}, **config)
        ).dequantize(UP)


def test_blocks_of_one_row_are_groups(tmp_path: Path) -> None:
    parts, weight = made("block", (1, 32))
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, weight_block_size=[1, 32]))
    assert opened.plan[UP] == Scheme.parse("W8A8-fp8-g32/fp8-g32-dyn") and torch.equal(opened.dequantize(UP), weight)


def test_fp4_weights_stand_beside_fp8_ones(tmp_path: Path) -> None:
    """DeepSeek-V4's experts."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=random, dtype=torch.uint8)
    exponents = torch.randint(118, 123, (ROWS, COLUMNS // 32), generator=random, dtype=torch.uint8)
    parts = {"weight": (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8), "scale": exponents}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, weight_block_size=[128, 128], scale_fmt="ue8m0"))
    weight = float_table("e2m1")[codes.int()] * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert str(opened.plan[UP]) == "W4A8-e2m1-g32:e8m0/fp8-g128:e8m0ceil-dyn" and torch.equal(
        opened.dequantize(UP), weight
    )


@pytest.mark.parametrize("how", ["dynamic", "static", "dequantize"])
def test_stacked_experts_are_exact_run_and_are_written(tmp_path: Path, how: str) -> None:
    mixture, prefix = Mixture("qwen3_moe"), "model.layers.1.mlp.experts"
    gate, up, down = (
        torch.stack([mixture.parts.pop(f"{prefix}.{expert}.{part}") for expert in range(EXPERTS)])
        for part in mixture.spelled
    )
    tensors = dict(mixture.rest)
    for name, values in ((f"{prefix}.gate_up_proj", torch.cat([gate, up], 1)), (f"{prefix}.down_proj", down)):
        _, rows, columns = values.shape
        codes, scale = (
            (values * 50).to(torch.float8_e4m3fn),
            torch.rand(EXPERTS, rows // 16, columns // 16) * 0.02 + 0.01,
        )
        tensors |= {name: codes, f"{name}_scale_inv": scale}
        if how == "static":
            tensors[f"{name}_activation_scale"] = torch.rand(EXPERTS) * 0.01 + 0.01
        mixture.rest[name] = codes.float() * scale.repeat_interleave(16, 1).repeat_interleave(16, 2)
    config = {
        "quant_method": "fp8",
        "weight_block_size": [16, 16],
        "activation_scheme": "static" if how == "static" else "dynamic",
        "dequantize": how == "dequantize",
    }
    path = mixture.write(tmp_path / "a", tensors, config)
    first = qcore.open_checkpoint(path)
    if how == "dequantize":  # vLLM, which does not know the field, would round the inputs
        with pytest.raises(qcore.Refused, match="not-representable"):
            convert(path, "fp8", tmp_path / "b")
    again = [] if how == "dequantize" else [qcore.open_checkpoint(convert(path, "fp8", tmp_path / "b"))]
    for opened in (first, *again):
        stacks = [module for module, scheme in opened.plan.items() if scheme]
        assert {opened.layers[module].shape for module in stacks} == {
            (EXPERTS, 2 * INNER, HIDDEN),
            (EXPERTS, HIDDEN, INNER),
        }
        for module in stacks:
            assert torch.equal(opened.dequantize(module), mixture.rest[module])
    if how != "static":
        ours, expected = logits(qcore.load_model(path)), mixture.logits()
        assert float((ours - expected).norm() / expected.norm()) < (0.05 if how == "dynamic" else 1e-5)


@pytest.mark.parametrize(
    ("kind", "method", "config", "variant"),
    [
        ("tensor", "fp8", {"activation_scheme": "static"}, "tensor"),
        ("tensor", "fp8", {"activation_scheme": "dynamic"}, "tensor"),
        ("block", "fp8", {"weight_block_size": [32, 48]}, "block"),
        ("e8m0", "fp8", {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, "block"),
        (
            "e8m0",
            "fp8",
            {"weight_block_size": [128, 128], "scale_fmt": "ue8m0", "activation_scheme": "static"},
            "block",
        ),
        ("block", "fp8", {"weight_block_size": [32, 48], "scale_fmt": "ue8m0"}, "block"),
        ("channel", "fbgemm_fp8", {}, "channel"),
        ("channel", "fbgemm_fp8", {"activation_scale_ub": 1200.0}, "channel"),
    ],
)
def test_what_is_read_is_written(tmp_path: Path, kind: str, method: str, config: dict[str, Any], variant: str) -> None:
    parts, weight = made(kind)
    parts = {**parts, "bias": torch.ones(ROWS)}
    if config.get("activation_scheme") == "static":
        parts["input_scale"] = torch.tensor(0.1)
    else:
        parts.pop("input_scale", None)
    first = qcore.open_checkpoint(checkpoint(tmp_path / "a", parts, method, **config))
    opened = qcore.open_checkpoint(convert(first.path, f"fp8:{variant}", tmp_path / "b"))
    assert opened.plan == first.plan and opened.format_version == method
    assert torch.equal(opened.dequantize(UP), weight)


@pytest.mark.parametrize(
    ("how", "format"),
    [("W4A16-g32-sym", "fp8"), ("W8A16-fp8-channel", "fp8"), ("FP8_DYNAMIC", "fp8:block"), ("W8A8", "fp8"),
     ("W8A8-fp8-channel/fp8-tensor-dyn", "fp8")],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused(tmp_path: Path, how: str, format: str) -> None:
    source = qcore.open_checkpoint(write(tmp_path / "a", dense_llama())).quantized(how)
    with pytest.raises(qcore.Refused, match="not-representable"):
        convert(source, format, tmp_path / "b")


def test_layers_of_two_schemes_are_refused(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "a", made("block", (1, 32))[0], weight_block_size=[1, 32])
    opened = qcore.open_checkpoint(tensors).quantized("FP8_DYNAMIC")
    with pytest.raises(qcore.Refused, match="one scheme for all layers"):
        convert(opened, "fp8", tmp_path / "b")
