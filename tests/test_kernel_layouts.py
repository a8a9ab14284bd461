"""Weights stored for one kernel: GPTQModel's planes, Marlin, AWQ's gemv_fast and BitBLAS, packed here on plain integers."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, write
from qcore.layouts.marlin import fragment_order
from qcore.layouts.planar import pack_planes, unpack_planes
from qcore.scheme import Scheme

MODULE = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 128, 64
LLAMA = {"intermediate_size": 128}


def checkpoint(folder: Path, parts: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    tensors = dense_llama()
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] = torch.randn(ROWS, COLUMNS) * 0.1
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.randn(COLUMNS, ROWS) * 0.1
    del tensors[f"{MODULE}.weight"]
    tensors |= {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    return write(folder, tensors, quantization, **LLAMA)


def numbers(bits: int, group_size: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(bits)
    groups = COLUMNS // group_size if group_size > 0 else 1
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=random)
    zeros = torch.randint(0, 1 << bits, (ROWS, groups), generator=random)
    return codes, zeros, (torch.rand(ROWS, groups, generator=random) * 0.01 + 0.001).to(dtype)


def spread(part: torch.Tensor) -> torch.Tensor:
    return part.float().repeat_interleave(COLUMNS // part.shape[1], 1)


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def planar_words(codes: list[int], bits: int) -> list[int]:
    """A column of codes in planes, by GPTQModel's description: low plane first, fields in order."""
    widths = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}[bits]
    stored = []
    for run in range(0, len(codes), 32):
        offset = 0
        for width in widths:
            per_word = 32 // width
            for word in range(width):
                fields = [codes[run + word * per_word + i] >> offset & ((1 << width) - 1) for i in range(per_word)]
                stored.append(signed(sum(field << (width * i) for i, field in enumerate(fields))))
            offset += width
    return stored


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_planes(tmp_path: Path, bits: int, sym: bool) -> None:
    codes, zeros, scales = numbers(bits, 32)
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros
    parts = {
        "qweight": torch.tensor([planar_words(row, bits) for row in codes.tolist()], dtype=torch.int32).t(),
        "qzeros": torch.tensor([planar_words(row, bits) for row in zeros.t().tolist()], dtype=torch.int32),
        "scales": scales.t(),
        "g_idx": (torch.arange(COLUMNS) // 32).int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": sym, "checkpoint_format": "gptq_p"}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, config))
    assert torch.equal(opened.dequantize(MODULE), (codes - spread(zeros)) * spread(scales))
    assert opened.plan[MODULE] == Scheme.parse(f"W{bits}A16-g32-{'sym' if sym else 'asym'}")
    assert torch.equal(unpack_planes(pack_planes(codes.to(torch.uint8), bits), bits), codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_of_other_sizes(tmp_path: Path, dtype: torch.dtype, bits: int) -> None:
    codes, zeros, scales = numbers(bits, 32)

    def words(values: torch.Tensor) -> torch.Tensor:
        """[n, m] -> words along n."""
        per_word = torch.iinfo(dtype).bits // bits
        runs = values.unflatten(0, (-1, per_word)).tolist()
        packed = [
            [sum(run[i][c] << (bits * i) for i in range(per_word)) for c in range(values.shape[1])] for run in runs
        ]
        size = torch.iinfo(dtype).bits
        return torch.tensor([[w - (1 << size) if w >> (size - 1) else w for w in row] for row in packed], dtype=dtype)

    parts = {"qweight": words(codes.t()), "qzeros": words(zeros).t(), "scales": scales.t()}
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2",
              "pack_dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, config))
    assert torch.equal(opened.dequantize(MODULE), (codes - spread(zeros)) * spread(scales))


def marlin_words(codes: torch.Tensor) -> torch.Tensor:
    """[N, K] -> int32 [K / 16, 2 N], one fragment after another, by the kernel's description (Frantar et al. 2024)."""
    tiles = codes.t().reshape(COLUMNS // 16, 16, ROWS // 16, 16)
    stored = []
    for across in range(COLUMNS // 16):
        row = []
        for four in range(0, ROWS // 16, 4):
            for lane in range(32):
                for tile in range(four, four + 4):
                    fields = [tiles[across, 2 * (lane % 4) + r, tile, lane // 4 + 8 * half].item()
                              for half in (0, 1) for r in (0, 1, 8, 9)]  # fmt: skip
                    row.append(signed(sum(int(fields[i]) << (4 * n) for n, i in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))))
        stored.append(row)
    return torch.tensor(stored, dtype=torch.int32)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_marlin(tmp_path: Path, method: str, group_size: int) -> None:
    codes, _, scales = numbers(4, group_size)
    if group_size > 0:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + d for i in range(4) for d in (0, 1, 8, 9, 16, 17, 24, 25)]
    stored = scales.t().reshape(-1, len(order))[:, order].reshape(-1, ROWS)
    names = ("B", "s") if method == "gptq" else ("qweight", "scales")
    config = {"quant_method": method, "bits": 4, "group_size": group_size}
    config |= (
        {"checkpoint_format": "marlin", "sym": True} if method == "gptq" else {"version": "marlin", "zero_point": False}
    )
    path = checkpoint(tmp_path, dict(zip(names, (marlin_words(codes), stored), strict=True)), config)
    opened = qcore.open_checkpoint(path)
    assert torch.equal(opened.dequantize(MODULE), (codes - 8) * spread(scales))
    assert opened.plan[MODULE] == Scheme.parse(f"W4A16-{'g32' if group_size > 0 else 'channel'}-sym")
    assert sorted(fragment_order()) == list(range(1024))


def test_gemv_fast(tmp_path: Path) -> None:
    codes, zeros, scales = numbers(4, 32)
    stored = torch.zeros(ROWS // 4, COLUMNS, dtype=torch.int64)
    shuffled = torch.zeros_like(codes)
    for place in range(COLUMNS):  # where AutoAWQ's two transpositions put each column of a row
        run, inside = divmod(place, 32)
        outer, middle, inner = inside // 8, inside // 2 % 4, inside % 2
        eight = 8 * middle + 2 * outer + inner
        low, high = eight % 8 // 2, eight % 2
        shuffled[:, 32 * run + eight // 8 * 8 + 4 * high + low] = codes[:, place]
    for row in range(ROWS // 4):
        flat = [int(shuffled[4 * row + r, c]) for r in range(4) for c in range(COLUMNS)]
        stored[row] = torch.tensor([sum(flat[4 * w + i] << (4 * i) for i in range(4)) for w in range(COLUMNS)])
    minus = -(zeros.float() * scales.float()).half()
    padded = torch.nn.functional.pad(scales.t(), (0, 0, 0, 30)), torch.nn.functional.pad(minus.t(), (0, 0, 0, 30))
    parts = {"qweight": stored.to(torch.int16), "scales": padded[0], "qzeros": padded[1]}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv_fast", "zero_point": True}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, config))
    assert torch.equal(opened.dequantize(MODULE), codes * spread(scales) + spread(minus))
    assert opened.plan[MODULE] == Scheme.parse("W4A16-uint4-g32-zfloat")


def bitblas_bytes(codes: torch.Tensor, bits: int, *, interleaved: bool) -> torch.Tensor:
    """[A, n] -> int8 [A, n bits / 8]."""
    rows = []
    for row in codes.tolist():
        stream = []
        for start in range(0, len(row), 32 // bits):
            run = row[start : start + 32 // bits]
            if not interleaved:
                word = sum(code << (bits * i) for i, code in enumerate(run))
            else:
                word = sum(code << (i % 2 * 16 + i // 2 * bits) for i, code in enumerate(run))
                if bits == 2:
                    a, b, c, d = word.to_bytes(4, "little")
                    word = int.from_bytes(bytes((a, c, b, d)), "little")
            stream += word.to_bytes(4, "little")
        rows.append(stream)
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mode", ["sym", "quantized", "original", "rescale"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["bitblas", "gptq"])
def test_bitblas(tmp_path: Path, bits: int, mode: str, dtype: torch.dtype, method: str) -> None:
    codes, zeros, scales = numbers(bits, 32, dtype)
    interleaved = dtype is torch.float16 and bits < 8
    parts = {"qweight": bitblas_bytes(codes, bits, interleaved=interleaved), "scales": scales}
    rescaled = (zeros * scales.float()).to(dtype)
    forms: dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]] = {
        "sym": ({}, (codes - (1 << (bits - 1))) * spread(scales)),
        "quantized": (
            {"qzeros": bitblas_bytes(zeros.t(), bits, interleaved=False)},
            (codes - spread(zeros)) * spread(scales),
        ),
        "original": ({"zeros": zeros.to(dtype)}, (codes - spread(zeros)) * spread(scales)),
        "rescale": ({"zeros": rescaled}, codes * spread(scales) - spread(rescaled)),
    }
    if mode == "original" and bits == 8 and dtype is torch.bfloat16:
        zeros = zeros & 0xF8  # what bfloat16 holds
        forms["original"] = ({"zeros": zeros.to(dtype)}, (codes - spread(zeros)) * spread(scales))
    added, weight = forms[mode]
    config = {"quant_method": method, "bits": bits, "group_size": 32, "sym": mode == "sym"}
    config |= {"checkpoint_format": "bitblas", "zeros_mode": "quantized" if mode == "sym" else mode}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts | added, config))
    assert opened.method == method and torch.equal(opened.dequantize(MODULE), weight)
    assert opened.plan[MODULE] == opened.weight(MODULE).scheme
    if interleaved:
        plain = checkpoint(tmp_path / "plain", parts | added | {"qweight": bitblas_bytes(codes, bits, interleaved=False)},
                           {**config, "fast_decoding": False})  # fmt: skip
        assert torch.equal(qcore.open_checkpoint(plain).dequantize(MODULE), weight)


@pytest.mark.parametrize(
    ("change", "config", "code"),
    [
        ({"qweight": torch.zeros(ROWS, 1, 2, 16, dtype=torch.int8)}, {}, "bad-shape"),
        ({"qweight": torch.zeros(ROWS, 31, dtype=torch.int8)}, {}, "bad-shape"),
        ({"scales": torch.ones(2, ROWS).half()}, {}, "bad-shape"),
        ({"zeros": torch.full((ROWS, 2), 0.5).half()}, {}, "bad-content"),
        ({"zeros": torch.full((ROWS, 2), float("nan")).half()}, {"zeros_mode": "rescale"}, "bad-content"),
        ({}, {"bits": 3}, "bad-field"),
        ({}, {"zeros_mode": "sometimes"}, "bad-field"),
        ({}, {"group_size": 48}, "bad-shape"),
        ({}, {"zeros_mode": "quantized"}, "bad-shape"),
    ],
)
def test_what_is_no_bitblas_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor], config: dict[str, Any], code: str
) -> None:
    codes, zeros, scales = numbers(4, 32)
    parts = {"qweight": bitblas_bytes(codes, 4, interleaved=True), "scales": scales, "zeros": zeros.half(), **change}
    stated = {"quant_method": "bitblas", "bits": 4, "group_size": 32, "sym": False, "zeros_mode": "original", **config}
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(checkpoint(tmp_path, parts, stated)).weight(MODULE)
    assert caught.value.refusal.code == code
