"""GPTQ from codes that the test chooses: every width, grouping and version of the zero points, and broken contents."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, gptq_tensors, write
from qcore.scheme import Scheme

MODULE = "model.layers.0.mlp.down_proj"
ROWS, COLUMNS = 64, 96


def checkpoint(
    folder: Path, bits: int = 4, group_size: int = 32, *, v1: bool = True, sym: bool = False, desc_act: bool = False,
    keep_index: bool = True, scale_dtype: torch.dtype = torch.float16, seed: int = 0, zeros: torch.Tensor | None = None,
    config: dict[str, Any] | None = None, change: dict[str, torch.Tensor | None] | None = None,
) -> tuple[Path, torch.Tensor]:  # fmt: skip
    """A llama with one GPTQ layer, and that layer's weight by the definition."""
    generator = torch.Generator().manual_seed(seed)
    size = group_size if group_size > 0 else COLUMNS
    groups = -(-COLUMNS // size)
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=generator)
    if zeros is None:
        zeros = torch.randint(0, 1 << bits, (ROWS, groups), generator=generator)
        if sym:
            zeros = torch.full_like(zeros, 1 << (bits - 1))
    scales = (torch.rand(ROWS, groups, generator=generator) * 0.01 + 0.001).to(scale_dtype)
    index = torch.arange(COLUMNS) // size
    if desc_act:
        index = index[torch.randperm(COLUMNS, generator=generator)]
    parts: dict[str, torch.Tensor | None] = dict(
        gptq_tensors(codes, zeros, scales, bits, index if keep_index else None, v1=v1)
    )
    parts |= change or {}
    tensors = dense_llama()
    del tensors[f"{MODULE}.weight"]
    tensors |= {f"{MODULE}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    quantization["checkpoint_format"] = "gptq" if v1 else "gptq_v2"
    weight = (codes.float() - zeros.float()[:, index]) * scales.float()[:, index]
    return write(folder, tensors, {**quantization, **(config or {})}), weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 96, 64, -1])
@pytest.mark.parametrize(
    ("v1", "sym", "desc_act"), [(True, True, False), (True, False, True), (False, False, False), (False, True, True)]
)
def test_every_variant_is_exact(
    tmp_path: Path, bits: int, group_size: int, v1: bool, sym: bool, desc_act: bool
) -> None:
    path, weight = checkpoint(tmp_path, bits, group_size, v1=v1, sym=sym, desc_act=desc_act)
    opened = qcore.open_checkpoint(path)
    assert torch.equal(opened.dequantize(MODULE), weight)
    group = f"g{group_size}" if group_size > 0 else "channel"
    order = "-actorder" if desc_act and group_size > 0 else ""
    expected = f"W{bits}A16-{group}-{'sym' if sym else 'asym'}{order}"
    assert str(opened.plan[MODULE]) == str(opened.weight(MODULE).scheme) == expected


def test_a_zero_point_of_zero_wraps_field_by_field_in_v1(tmp_path: Path) -> None:
    zeros = torch.zeros(ROWS, 3, dtype=torch.int64)
    zeros[::2] = 15
    path, weight = checkpoint(tmp_path, zeros=zeros)
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_takes_one_from_a_whole_word_of_zero_points(tmp_path: Path, bits: int) -> None:
    """Where a zero point is 0 it borrows from the next one; of 3 bits, which cross words, each is taken by itself."""
    zeros = torch.randint(0, 1 << bits, (ROWS, 3))
    zeros[::3] = 0
    parts = gptq_tensors(
        torch.zeros(ROWS, COLUMNS, dtype=torch.int64), zeros, torch.ones(ROWS, 3), bits, None, v1=bits == 3
    )
    stored = parts["qzeros"] if bits == 3 else parts["qzeros"] - sum(1 << field for field in range(0, 32, bits))
    path, _ = checkpoint(
        tmp_path, bits, zeros=zeros, change={"qzeros": stored}, config={"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    )
    weight = checkpoint(tmp_path / "plain", bits, zeros=zeros)[1]
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    path, weight = checkpoint(tmp_path, scale_dtype=dtype)
    assert qcore.open_checkpoint(path).weight(MODULE).scales[0].dtype == dtype
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), weight)


def test_without_g_idx_groups_follow_each_other(tmp_path: Path) -> None:
    path, weight = checkpoint(tmp_path, keep_index=False)
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), weight)


def test_stored_zero_points_beat_a_config_that_says_symmetric(tmp_path: Path) -> None:
    path, weight = checkpoint(tmp_path, config={"sym": True})
    opened = qcore.open_checkpoint(path)
    assert torch.equal(opened.dequantize(MODULE), weight)
    assert opened.weight(MODULE).scheme == Scheme.parse("W4A16-g32-asym")


def test_an_index_beats_a_config_without_desc_act(tmp_path: Path) -> None:
    path, weight = checkpoint(tmp_path, desc_act=True, config={"desc_act": False})
    opened = qcore.open_checkpoint(path)
    assert torch.equal(opened.dequantize(MODULE), weight)
    assert opened.weight(MODULE).scheme.weight.ordered


def test_side_file_and_other_spellings(tmp_path: Path) -> None:
    import json

    path, weight = checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    side = config.pop("quantization_config")
    side["format"] = side.pop("checkpoint_format")
    del side["quant_method"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize_config.json").write_text(json.dumps(side))
    opened = qcore.open_checkpoint(path)
    assert opened.method == "gptq" and torch.equal(opened.dequantize(MODULE), weight)
    config["text_config"] = {"quantization_config": {**side, "method": "gptq"}}
    (path / "quantize_config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))
    assert qcore.open_checkpoint(path).method == "gptq"


def test_dynamic_patterns_first_match_wins(tmp_path: Path) -> None:
    patterns = {r"+:.*down_proj": {"bits": 8, "group_size": 96}, r".*down_proj": {"bits": 2}, r"-:.*up_proj": {}}
    path, weight = checkpoint(tmp_path, 8, 96, config={"bits": 4, "group_size": 32, "dynamic": patterns})
    opened = qcore.open_checkpoint(path)
    assert torch.equal(opened.dequantize(MODULE), weight)
    assert "down_proj" in opened.layers[MODULE].reason
    assert "-:" in opened.layers["model.layers.0.mlp.up_proj"].reason
    assert opened.layers["lm_head"].reason == "lm_head is false"


@pytest.mark.parametrize(("group_size", "sym", "bits"), [(32, True, 4), (32, False, 8), (-1, True, 8), (-1, False, 3)])
def test_an_embedding_is_stored_with_the_vocabulary_for_inputs(
    tmp_path: Path, group_size: int, sym: bool, bits: int
) -> None:
    table, vocabulary, hidden = "model.embed_tokens", 128, 64
    size = group_size if group_size > 0 else vocabulary
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (hidden, vocabulary), generator=random)
    zeros = torch.randint(0, 1 << bits, (hidden, vocabulary // size), generator=random)
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros
    scales = (torch.rand(hidden, vocabulary // size, generator=random) * 0.01 + 0.001).half()
    index = torch.arange(vocabulary) // size
    tensors = dense_llama()
    del tensors[f"{table}.weight"]
    parts = gptq_tensors(codes, zeros, scales, bits, index, v1=True)
    tensors |= {f"{table}.{part}": tensor for part, tensor in parts.items()}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True,
              "dynamic": {table: {"bits": bits, "group_size": group_size, "sym": sym}}}  # fmt: skip
    opened = qcore.open_checkpoint(write(tmp_path / "a", tensors, config))
    weight = ((codes - zeros[:, index]).float() * scales.float()[:, index]).t()
    assert torch.equal(opened.dequantize(table), weight)
    assert opened.plan[table] == opened.weight(table).scheme == Scheme.parse(
        f"W{bits}A16-tile{size}x1-{'sym' if sym else 'asym'}"
    )  # fmt: skip
    ids = torch.tensor([[1, 5, 9]])
    plain = write(tmp_path / "plain", {**dense_llama(), f"{table}.weight": weight.contiguous()})
    got = qcore.load_model(opened, dtype=torch.float32)(ids).logits
    assert torch.allclose(got, qcore.load_model(plain, dtype=torch.float32)(ids).logits, atol=1e-5)
    if group_size > 0:
        tensors[f"{table}.g_idx"] = index.flip(0).int()
        with pytest.raises(qcore.Refused, match="unknown-variant"):
            qcore.open_checkpoint(write(tmp_path / "b", tensors, config)).weight(table)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("missing-tensor", {"change": {"qzeros": None}}),
        ("missing-tensor", {"change": {"scales": None}}),
        ("bad-shape", {"change": {"scales": torch.ones(2, ROWS, dtype=torch.float16)}}),
        ("bad-shape", {"change": {"qzeros": torch.zeros(3, 7, dtype=torch.int32)}}),
        ("bad-shape", {"change": {"qweight": torch.zeros(11, ROWS, dtype=torch.int32)}}),
        ("bad-shape", {"change": {"qweight": torch.zeros(12 * ROWS, dtype=torch.int32)}}),
        ("bad-dtype", {"change": {"qweight": torch.zeros(12, ROWS, dtype=torch.int64)}}),
        ("bad-dtype", {"change": {"scales": torch.ones(3, ROWS, dtype=torch.int32)}}),
        ("bad-content", {"change": {"g_idx": torch.full((COLUMNS,), 3, dtype=torch.int32)}}),
        ("bad-content", {"change": {"g_idx": torch.full((COLUMNS,), -1, dtype=torch.int32)}}),
        ("bad-content", {"change": {"scales": torch.full((3, ROWS), float("nan"), dtype=torch.float16)}}),
        ("bad-content", {"change": {"scales": torch.full((3, ROWS), float("inf"), dtype=torch.float16)}}),
        ("unexpected-tensor", {"change": {"mystery": torch.ones(4)}}),
        ("bad-field", {"config": {"bits": 9}}),
        ("bad-field", {"config": {"bits": "four"}}),
        ("bad-field", {"config": {"bits": None}}),
        ("bad-field", {"config": {"group_size": 0}}),
        ("bad-field", {"config": {"group_size": -2}}),
        ("bad-field", {"config": {"dynamic": {"+:(": {"bits": 4}}}}),
        ("bad-field", {"config": {"dynamic": {"+:.*": {"bits": "x"}}}}),
        ("bad-shape", {"config": {"bits": 8}}),
        ("bad-shape", {"config": {"group_size": 48}}),
        ("bad-field", {"bits": 5}),
        ("unknown-variant", {"config": {"checkpoint_format": "marlin"}}),
        ("unknown-variant", {"config": {"checkpoint_format": "marlin_24", "sym": True}}),
        ("missing-tensor", {"config": {"checkpoint_format": "marlin", "sym": True}}),
        ("bad-dtype", {"config": {"checkpoint_format": "bitblas"}}),
        ("unknown-variant", {"config": {"checkpoint_format": "gptq_v9"}}),
        ("bad-field", {"config": {"checkpoint_format": "gptq", "format": "gptq_v2"}}),
        ("unknown-variant", {"config": {"is_marlin_format": True}}),
        ("bad-dtype", {"config": {"is_bitblas_format": True}}),
        ("bad-dtype", {"config": {"pack_dtype": "int64"}}),
        ("unknown-variant", {"config": {"pack_dtype": "int4"}}),
        ("unknown-variant", {"config": {"activation": {"mode": "w4afp8"}}}),
        ("unknown-variant", {"config": {"rotation": "hadamard"}}),
        ("unknown-variant", {"config": {"rotation_config": {"algorithm": "hadamard"}}}),
        ("unknown-variant", {"config": {"adapter": {"name": "lora", "path": "adapter", "rank": 8}}}),
        ("unknown-variant", {"config": {"checkpoint_format": "gptq_p", "pack_dtype": "int16"}}),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, code: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(qcore.Refused) as caught:
        path, _ = checkpoint(tmp_path, **arguments)
        qcore.open_checkpoint(path).weight(MODULE)
    assert caught.value.refusal.code == code
    assert str(tmp_path) in caught.value.refusal.subject and caught.value.refusal.fix
