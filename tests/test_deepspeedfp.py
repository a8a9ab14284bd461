"""DeepSpeedFP: the rounding against its definition in plain Python, which layers are quantized, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, write
from qcore.algorithms.minifloat import RANGES, minifloat
from qcore.bits import unpack
from qcore.convert import convert
from qcore.scheme import Scheme

UP = "model.layers.0.mlp.up_proj"
FORMATS = {4: "e2m1", 6: "e3m2", 8: "e4m3", 12: "e4m7"}


def nearest(value: float, exponent: int, mantissa: int) -> float:
    """The float nearest to `value`, ties away from zero, no smaller than the smallest normal one; zero is zero."""
    if value == 0:
        return 0.0
    bias = (1 << (exponent - 1)) - 1
    power = max(math.frexp(abs(value))[1] - 1, 1 - bias)
    step = 2.0 ** (power - mantissa)
    size = max(math.floor(abs(value) / step + 0.5) * step, 2.0 ** (1 - bias))
    return math.copysign(size, value)


def checkpoint(folder: Path) -> Path:
    tensors = dense_llama()
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.bfloat16)
    return write(folder, tensors, {"quant_method": "deepspeedfp", "bits": 6, "group_size": 96})


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize(("rows", "columns", "size"), [(4, 64, 64), (3, 50, 64), (5, 7, 512)])
def test_rounding_is_the_definition(bits: int, rows: int, columns: int, size: int) -> None:
    name = FORMATS[bits]
    exponent, mantissa, top = int(name[1]), int(name[3]), torch.tensor(RANGES[name])
    random = torch.Generator().manual_seed(bits)
    weight = torch.randn(rows, columns, generator=random) * torch.exp2(
        torch.randint(-12, 1, (rows, columns), generator=random).float()
    )
    weight[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    weight = weight.to(torch.bfloat16)
    grid = f"g{size}" if columns % size == 0 else f"flat{size}"
    made = minifloat(weight, Scheme.parse(f"W{bits}A16-{name}-{grid}"))
    flat, got = weight.flatten().float(), made.dequantize().flatten()
    for start in range(0, flat.numel(), size):
        group = flat[start : start + size]
        largest = group.abs().max()
        for value, out in zip(group, got[start : start + size], strict=True):
            assert out == nearest(float(value * (top / largest)), exponent, mantissa) * (largest / top)


@pytest.mark.parametrize(
    ("bits", "values", "codes"),
    [
        (8, [480.0, -480.0, 1.0, 1.0625, 1.1875, 0.0, 0.001, -0.001], [0x7F, 0xFF, 0x38, 0x39, 0x3A, 0, 8, 0x88]),
        (6, [28.0, -28.0, 1.0, 1.125, 1.375, 0.0, 0.01, -0.01], [0x1F, 0x3F, 0x0C, 0x0D, 0x0E, 0, 4, 0x24]),
        (12, [510.0, -510.0, 1.0, 1.0, 1.5, 0.0, 0.001, -1e-9], [0x7FF, 0xFFF, 0x380, 0x380, 0x3C0, 0, 0x80, 0x880]),
    ],
)
def test_codes_are_deepspeeds(bits: int, values: list[float], codes: list[int]) -> None:
    """Its integer arithmetic, compiled for a CPU, gives the same codes, but for zero."""
    made = minifloat(torch.tensor([values]), Scheme.parse(f"W{bits}A16-{FORMATS[bits]}-g8"))
    assert unpack(made.codes, bits, 8).tolist() == [codes]


def test_a_group_of_zeros_is_zeros() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 3] = 2.0
    assert torch.equal(minifloat(weight, Scheme.parse("W8A16-e4m3-g64")).dequantize(), weight)


def test_rows_can_be_cut() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    for bits, name in FORMATS.items():
        made = minifloat(weight, Scheme.parse(f"W{bits}A16-{name}-flat32"))
        assert torch.equal(made.rows(2, 5).dequantize(), made.dequantize()[2:5])


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("place", ["config.json", "quant_config.json", "quantize_config.json"])
def test_every_width_runs_wherever_the_config_lies(tmp_path: Path, bits: int, place: str) -> None:
    config = {"quant_method": "deepspeedfp", "bits": bits, "group_size": 128}
    path = write(tmp_path, dense_llama(), config if place == "config.json" else None)
    if place != "config.json":
        (path / place).write_text(json.dumps(config))
    opened = qcore.open_checkpoint(path)
    assert (opened.method, opened.format_version) == ("deepspeedfp", f"fp{bits}")
    assert opened.plan[UP] == Scheme.parse(f"W{bits}A16-{FORMATS[bits]}-flat128") == opened.weight(UP).scheme
    assert {module for module, scheme in opened.plan.items() if scheme is None} == {"lm_head", "model.embed_tokens"}
    model = qcore.load_model(opened, dtype="float32")
    plain = dense_llama() | {f"{m}.weight": opened.dequantize(m) for m, s in opened.plan.items() if s}
    whole = qcore.load_model(write(tmp_path / "plain", plain), dtype="float32")
    tokens = torch.tensor([[1, 5, 9]])
    assert torch.allclose(model(tokens).logits, whole(tokens).logits, atol=1e-4)


def test_groups_that_end_with_rows_are_counted_along_them(tmp_path: Path) -> None:
    opened = qcore.open_checkpoint(write(tmp_path, dense_llama(), {"quant_method": "deepspeedfp", "group_size": 32}))
    assert opened.plan[UP] == Scheme.parse("W8A16-e4m3-g32")


@pytest.mark.parametrize(
    ("config", "change", "code"),
    [
        ({"bits": 5}, {}, "unknown-variant"),
        ({"bits": "many"}, {}, "bad-field"),
        ({"group_size": 0}, {}, "bad-field"),
        ({"group_size": 1 << 40}, {}, "bad-field"),
        ({}, {f"{UP}.weight": torch.zeros(96, 64, dtype=torch.uint8)}, "bad-dtype"),
        ({}, {f"{UP}.weight": torch.full((96, 64), float("inf"))}, "bad-content"),
        ({}, {f"{UP}.weight": torch.zeros(0, 64)}, "bad-shape"),
    ],
)
def test_what_is_broken_is_refused(
    tmp_path: Path, config: dict[str, Any], change: dict[str, torch.Tensor], code: str
) -> None:
    path = write(tmp_path, dense_llama() | change, {"quant_method": "deepspeedfp", **config})
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(path).weight(UP)
    assert caught.value.refusal.code == code and caught.value.refusal.fix


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(qcore.Refused, match="format-not-written") as caught:
        convert(checkpoint(tmp_path / "a"), "deepspeedfp", tmp_path / "b")
    assert "whenever a checkpoint is loaded" in caught.value.refusal.reason and not (tmp_path / "b").exists()
