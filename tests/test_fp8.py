"""Plain fp8 from numbers that the test chooses: per tensor, in blocks with ragged edges, by channel, and broken parts."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, write
from qcore.scheme import Scheme

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
        ("channel", "fbgemm_fp8", {}, "W8A8-fp8-dyn"),
        ("channel", "fbgemm_fp8", {"activation_scale_ub": 1200.0}, "W8A8-fp8-channel/fp8-token-dyn-bound1200.0"),
        ("block", "fp8", {"weight_block_size": [32, 48], "fmt": "e4m3"}, "W8A8-fp8-tile32x48/fp8-g48-dyn"),
        ("e8m0", "fp8", {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, "W8A8-fp8-block128:e8m0/fp8-g128-dyn"),
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
    assert float((logits - whole).norm() / whole.norm()) < 0.05  # inputs are rounded to fp8


@pytest.mark.parametrize(
    ("kind", "config", "change", "code"),
    [
        ("tensor", {"activation_scheme": "abacus"}, {}, "bad-field"),
        ("tensor", {"fmt": "e5m2"}, {}, "unknown-variant"),
        ("block", {"weight_block_size": [32, 48], "activation_scheme": "static"}, {}, "unknown-variant"),
        ("block", {"weight_block_size": [0, 48]}, {}, "unknown-variant"),
        ("block", {"weight_block_size": [32]}, {}, "bad-field"),
        ("block", {"weight_block_size": [16, 48]}, {}, "bad-shape"),
        ("block", {}, {}, "missing-tensor"),
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
