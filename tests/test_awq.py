"""AWQ from codes that the test chooses: both layouts, group sizes, zero points, spellings, and broken contents."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, words, write
from qcore.scheme import Scheme

MODULE = "model.layers.0.mlp.down_proj"
ROWS, COLUMNS = 64, 96
GEMM = [0, 2, 4, 6, 1, 3, 5, 7]


def gemm_words(codes: torch.Tensor) -> torch.Tensor:
    """int [A, N] -> int32 [A, N / 8]: nibble i of a word holds the column GEMM[i] of its eight."""
    return words(codes.unflatten(1, (-1, 8))[..., GEMM].flatten(1), 4)


def checkpoint(
    folder: Path, group_size: int = 32, layout: str = "gemm", *, zero_point: bool = True, padding: int = 1, seed: int = 0,
    config: dict[str, Any] | None = None, change: dict[str, torch.Tensor | None] | None = None, side_file: str = "",
) -> tuple[Path, torch.Tensor]:  # fmt: skip
    """A llama with one AWQ layer, and that layer's weight by the definition."""
    random = torch.Generator().manual_seed(seed)
    size = group_size if group_size > 0 else COLUMNS
    groups = COLUMNS // size
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=random)
    zeros = torch.randint(0, 16, (ROWS, groups), generator=random) if zero_point else torch.full((ROWS, groups), 8)
    scales = (torch.rand(ROWS, groups, generator=random) * 0.01 + 0.001).to(torch.float16)
    parts: dict[str, torch.Tensor | None]
    if layout == "gemm":
        parts = {"qweight": gemm_words(codes.t()), "qzeros": gemm_words(zeros.t()), "scales": scales.t()}
    else:
        width = math.ceil(groups / (8 * padding)) * padding  # words
        wide_zeros, wide_scales = torch.zeros(ROWS, width * 8, dtype=torch.int64), torch.zeros(ROWS, width * 8).half()
        wide_zeros[:, :groups], wide_scales[:, :groups] = zeros, scales
        parts = {"qweight": words(codes, 4), "qzeros": words(wide_zeros, 4), "scales": wide_scales}
    if not zero_point:
        del parts["qzeros"]
    parts |= change or {}
    tensors = dense_llama()
    del tensors[f"{MODULE}.weight"]
    tensors |= {f"{MODULE}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": zero_point, "version": layout}
    weight = (codes.float() - zeros.float().repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)
    if side_file:
        import json

        path = write(folder, tensors)
        (path / side_file).write_text(json.dumps(config))
        return path, weight
    return write(folder, tensors, {**settings, **(config or {})}), weight


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
@pytest.mark.parametrize(("group_size", "padding"), [(32, 4), (48, 1), (96, 1), (-1, 1)])
@pytest.mark.parametrize("zero_point", [True, False])
def test_every_variant_is_exact(tmp_path: Path, layout: str, group_size: int, padding: int, zero_point: bool) -> None:
    path, weight = checkpoint(tmp_path, group_size, layout, zero_point=zero_point, padding=padding)
    opened = qcore.open_checkpoint(path)
    assert opened.method == "awq" and opened.format_version == layout
    assert torch.equal(opened.dequantize(MODULE), weight)
    group = f"g{group_size}" if group_size > 0 else "channel"
    assert opened.plan[MODULE] == Scheme.parse(f"W4A16-{group}-{'asym' if zero_point else 'sym'}")
    assert opened.weight(MODULE).scheme == opened.plan[MODULE]


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("zero_point", [True, False])
def test_gptqmodels_other_widths_are_a_plain_stream(tmp_path: Path, bits: int, zero_point: bool) -> None:
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=random)
    zeros = torch.randint(0, 1 << bits, (ROWS, 3), generator=random)
    zeros = zeros if zero_point else torch.full_like(zeros, 1 << (bits - 1))
    scales = (torch.rand(ROWS, 3, generator=random) * 0.01 + 0.001).half()
    change: dict[str, torch.Tensor | None] = {"qweight": words(codes.t(), bits), "scales": scales.t()}
    change["qzeros"] = words(zeros.t(), bits) if zero_point else None
    path, _ = checkpoint(tmp_path, config={"bits": bits, "zero_point": zero_point}, change=change)
    weight = (codes - zeros.repeat_interleave(32, 1)).float() * scales.float().repeat_interleave(32, 1)
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), weight)


def test_dynamic_has_the_numbers_of_single_layers(tmp_path: Path) -> None:
    patterns = {"+:.*down_proj": {"group_size": 32}, "-:.*up_proj": {}}
    path, weight = checkpoint(tmp_path, 32, config={"group_size": 64, "dynamic": patterns})
    opened = qcore.open_checkpoint(path)
    assert torch.equal(opened.dequantize(MODULE), weight)
    assert "dynamic" in opened.layers[MODULE].reason and "-:" in opened.layers["model.layers.0.mlp.up_proj"].reason


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
def test_gptqmodels_rounding_says_gptq_of_these_layouts(tmp_path: Path, layout: str) -> None:
    config = {"quant_method": "gptq", "method": "gptq", "format": layout, "checkpoint_format": layout}
    path, weight = checkpoint(tmp_path, layout=layout, padding=4, config=config)
    opened = qcore.open_checkpoint(path)
    assert (opened.method, opened.format_version) == ("awq", layout)
    assert torch.equal(opened.dequantize(MODULE), weight)


def test_gemv_of_groups_of_64_is_padded_to_two_words(tmp_path: Path) -> None:
    path, weight = checkpoint(tmp_path, 48, "gemv", padding=1)
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), weight)
    from qcore.layouts.awq import padded_words

    assert [padded_words(g, s) for g, s in ((9, 128), (1, 64), (17, 64), (1, 32), (33, 32))] == [2, 2, 4, 4, 8]


@pytest.mark.parametrize("spelling", [{"version": "GEMM"}, {"version": None, "checkpoint_format": "gemm"}])
def test_spellings_of_the_layout(tmp_path: Path, spelling: dict[str, Any]) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, **spelling}
    path, weight = checkpoint(tmp_path, config={k: v for k, v in config.items() if v is not None})
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), weight)


def test_quarks_plain_order(tmp_path: Path) -> None:
    _, weight = checkpoint(tmp_path / "woven")
    random = torch.Generator().manual_seed(0)  # as `checkpoint` draws them
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=random)
    zeros = torch.randint(0, 16, (ROWS, COLUMNS // 32), generator=random)
    plain = {"qweight": words(codes.t(), 4), "qzeros": words(zeros.t(), 4)}
    path, _ = checkpoint(tmp_path / "plain", config={"pack_method": "order"}, change=plain)
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), weight)


def test_the_older_side_file(tmp_path: Path) -> None:
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    path, weight = checkpoint(tmp_path, config=config, side_file="quant_config.json")
    opened = qcore.open_checkpoint(path)
    assert opened.method == "awq" and torch.equal(opened.dequantize(MODULE), weight)


def test_zero_points_that_are_there_are_believed(tmp_path: Path) -> None:
    path, weight = checkpoint(tmp_path, config={"zero_point": False})
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), weight)


def test_a_model_runs(tmp_path: Path) -> None:
    path, weight = checkpoint(tmp_path)
    plain = dense_llama()
    plain[f"{MODULE}.weight"] = weight
    ids = torch.tensor([[1, 5, 9]])
    got = qcore.load_model(path, dtype="float32")(ids).logits
    assert torch.allclose(got, qcore.load_model(write(tmp_path / "plain", plain))(ids).logits, atol=1e-5)


def test_skipped_modules_say_why(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, config={"modules_to_not_convert": ["mlp.up", "lm_head"]})
    layers = qcore.open_checkpoint(path).layers
    assert "mlp.up" in layers["model.layers.0.mlp.up_proj"].reason and "lm_head" in layers["lm_head"].reason
    assert layers["model.layers.0.mlp.gate_proj"].reason == "stored unquantized"


def nan_scales() -> torch.Tensor:
    scales = torch.full((3, ROWS), 0.01, dtype=torch.float16)
    scales[1, 5] = float("nan")
    return scales


@pytest.mark.parametrize(
    ("config", "change", "code"),
    [
        ({"version": "gemv_fast"}, {}, "bad-dtype"),
        ({"version": "marlin"}, {}, "bad-shape"),
        ({"version": "abacus"}, {}, "unknown-variant"),
        ({"format": "gemv"}, {}, "bad-field"),
        ({"bits": 9}, {}, "bad-field"),
        ({"bits": 3}, {}, "bad-shape"),
        ({"bits": 8, "version": "gemv"}, {}, "bad-field"),
        ({"dynamic": {"+:.*down_proj": {"bits": 8}}}, {}, "bad-shape"),
        ({"rotation": "hadamard"}, {}, "unknown-variant"),
        ({"spinquant_config": {"r4": True}}, {}, "unknown-variant"),
        ({"bits": "four"}, {}, "bad-field"),
        ({"group_size": 0}, {}, "bad-field"),
        ({"group_size": 64}, {}, "bad-shape"),
        ({"group_size": 48}, {}, "bad-shape"),
        ({"version": "gemv"}, {}, "bad-shape"),
        ({}, {"qzeros": None}, "missing-tensor"),
        ({}, {"scales": None}, "missing-tensor"),
        ({}, {"qweight": torch.zeros(96, 8, dtype=torch.int64)}, "bad-dtype"),
        ({}, {"qweight": torch.zeros(96, dtype=torch.int32)}, "bad-shape"),
        ({}, {"scales": torch.zeros(3, 32, dtype=torch.float16)}, "bad-shape"),
        ({}, {"qzeros": torch.zeros(3, 4, dtype=torch.int32)}, "bad-shape"),
        ({}, {"scales": nan_scales()}, "bad-content"),
        ({}, {"g_idx": torch.zeros(96, dtype=torch.int32)}, "unexpected-tensor"),
    ],
)
def test_what_is_broken_is_refused(
    tmp_path: Path, config: dict[str, Any], change: dict[str, torch.Tensor | None], code: str
) -> None:
    path, _ = checkpoint(tmp_path, config=config, change=change)
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(path).dequantize(MODULE)
    assert caught.value.refusal.code == code and caught.value.refusal.kind in ("bad-file", "notimpl")


def test_a_config_without_quantized_tensors_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, dense_llama(), {"quant_method": "awq", "bits": 4, "group_size": 32})
    with pytest.raises(qcore.Refused, match="missing-tensor"):
        qcore.open_checkpoint(path)
