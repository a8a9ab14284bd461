"""GPTQ, AWQ, AutoRound and BitBLAS written from schemes made in flight: the same numbers read back, or a refusal by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
import test_gptq
from makers import dense_llama, gptq_tensors, write
from qcore.convert import convert
from qcore.layouts import awq, awq_fast, bitblas

DOWN, UP, Q = (f"model.layers.0.{name}" for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"))
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def wide(folder: Path) -> Path:
    """A llama whose layers are large enough for every layout."""
    random = torch.Generator().manual_seed(3)
    tensors = {name: tensor for name, tensor in dense_llama().items() if "layers" not in name}
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.randn(128, 256, generator=random) * 0.1
    tensors["model.norm.weight"] = torch.ones(256)
    shapes = {f"self_attn.{part}_proj": (256, 256) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512)}
    for name, shape in shapes.items():
        tensors[f"model.layers.0.{name}.weight"] = torch.randn(*shape, generator=random) * 0.1
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"] = torch.ones(256)
    return write(folder, tensors, **WIDE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize(
    ("scheme", "format", "version"),
    [
        ("W4A16-g128-sym", "gptq:gptq", "gptq"),
        ("W8A16-channel-asym", "gptq:gptq_v2", "gptq_v2"),
        ("W3A16-g32-asym", "gptq:gptq_p", "gptq_p"),
        ("W7A16-g64-sym", "gptq", "gptq_p"),
        ("W4A16-g64-asym", "gptq", "gptq_v2"),
        ("W4A16-g128-sym", "gptq:marlin", "marlin"),
        ("W4A16-channel-sym", "gptq:marlin", "marlin"),
        ("W2A16-g64-asym", "gptq:bitblas", "bitblas"),
        ("W8A16-channel-sym", "gptq:bitblas", "bitblas"),
        ("W4A16-g64-asym", "awq", "gemm"),
        ("W5A16-g32-asym", "awq:gemm", "gemm"),
        ("W8A16-channel-sym", "awq:gemm", "gemm"),
        ("W4A16-g32-asym", "awq:gemv", "gemv"),
        ("W4A16-g64-sym", "awq:gemv_fast", "gemv_fast"),
        ("W4A16-g128-sym", "awq:marlin", "marlin"),
        ("W4A16-g64-sym", "auto-round", "auto_round:auto_gptq"),
        ("W6A16-g64-sym", "auto-round", "auto_round"),
        ("W2A16-g32-asym", "auto-round", "auto_round"),
        ("W8A16-channel-asym", "auto-round:auto_round:auto_gptq", "auto_round:auto_gptq"),
        ("W5A16-g64-asym", "auto-round:auto_round:auto_awq", "auto_round:auto_awq"),
        ("FP8_DYNAMIC", "auto-round:fp", "auto_round:fp8"),
        ("W4A16-g64-asym", "bitblas", ""),
        ("W2A16-channel-sym", "bitblas:quantized", ""),
        ("W8A16-g32-asym", "bitblas:original", ""),
        ("W4A16-g32-sym", "bitblas:rescale", ""),
    ],
)
def test_every_layout_goes_round(plain: Path, tmp_path: Path, scheme: str, format: str, version: str) -> None:
    source = qcore.open_checkpoint(plain).quantized(scheme)
    opened = qcore.open_checkpoint(convert(source, format, tmp_path / "out"))  # which reads back and compares
    assert opened.method == format.partition(":")[0] and opened.format_version == version
    assert opened.plan.keys() == source.plan.keys() and opened.plan["lm_head"] is None


@pytest.mark.parametrize(
    ("scheme", "format", "expected"),
    [
        ("W5A16-g32-sym", "gptq:gptq", "2, 3, 4, 8 bits"),
        ("W4A16-g64-sym", "gptq:marlin", "groups of 128"),
        ("W4A16-g128-asym", "gptq:marlin", "symmetric"),
        ("W3A16-g64-sym", "gptq:bitblas", "2, 4, 8 bits"),
        ("FP8_DYNAMIC", "gptq", "integers"),
        ("W8A16-g64-sym", "awq:gemv", "4 bits"),
        ("W4A16-g16-sym", "awq:gemv", "groups of 32, 64"),
        ("W4A16-g64-asym", "awq:gemv_fast", "zero points times scales that float16 holds"),
        ("W4A16-channel-sym", "awq:marlin", "groups of 128"),
        ("W3A16-g64-sym", "auto-round:auto_round:auto_awq", "4, 5, 6, 7 bits"),
        ("W4A16-g64-sym", "auto-round:mx_fp", "weights of mx_fp"),
        ("FP8_DYNAMIC", "auto-round:auto_round", "weights of auto_round"),
        ("W4A16-g64-asym", "bitblas:rescale", "float16 holds"),
        ("W5A16-g64-asym", "bitblas", "2, 4, 8 bits"),
    ],
)
def test_what_a_layout_does_not_hold_is_refused(
    plain: Path, tmp_path: Path, scheme: str, format: str, expected: str
) -> None:
    with pytest.raises(qcore.Refused) as caught:
        convert(qcore.open_checkpoint(plain).quantized(scheme), format, tmp_path / "out")
    assert caught.value.refusal.code == "not-representable" and expected in caught.value.refusal.fact
    assert not (tmp_path / "out").exists()


def mixed(folder: Path) -> Path:
    """A layer of 4 bits, one of 8 bits in other groups with a bias, and the rest plain."""
    tensors = dense_llama()
    for module, bits, size in ((DOWN, 4, 32), (UP, 8, 16)):
        rows, columns = tensors.pop(f"{module}.weight").shape
        codes = torch.randint(0, 1 << bits, (rows, columns))
        zeros = torch.randint(0, 1 << bits, (rows, columns // size))
        scales = (torch.rand(rows, columns // size) * 0.01 + 0.001).half()
        parts = gptq_tensors(codes, zeros, scales, bits, None, v1=True)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{module}.bias"] = torch.randn(rows).half()
    config: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False,
                              "dynamic": {r"+:.*up_proj": {"bits": 8, "group_size": 16}}}  # fmt: skip
    return write(folder, tensors, config, mlp_bias=True)


@pytest.mark.parametrize("format", ["gptq:gptq_v2", "awq", "auto-round"])
def test_layers_keep_numbers_of_their_own(tmp_path: Path, format: str) -> None:
    source = qcore.open_checkpoint(mixed(tmp_path / "a"))
    opened = qcore.open_checkpoint(convert(source, format, tmp_path / "b"))
    assert opened.plan == source.plan
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) in ((4, 32), (8, 16))
    if format == "awq":
        assert "self_attn.q_proj" in config["modules_to_not_convert"] and "lm_head" in config["modules_to_not_convert"]
    if format == "auto-round":
        assert config["block_name_to_quantize"] == "model.layers" and config["extra_config"][Q]["bits"] == 16
    for refused in ("awq:gemv", "gptq:bitblas", "bitblas"):
        with pytest.raises(qcore.Refused, match="not-representable"):
            convert(source, refused, tmp_path / "c")


def test_a_quantized_lm_head_is_named(plain: Path, tmp_path: Path) -> None:
    source = qcore.open_checkpoint(plain).quantized("W4A16-g64-sym", ignore=())
    for format in ("gptq", "awq", "auto-round", "bitblas"):
        opened = qcore.open_checkpoint(convert(source, format, tmp_path / format))
        assert opened.plan["lm_head"] is not None
        config = json.loads((tmp_path / format / "config.json").read_text())["quantization_config"]
        assert config.get("lm_head") or "lm_head" in config["extra_config"]


def test_act_order_is_kept_where_the_layout_has_it(tmp_path: Path) -> None:
    path, weight = test_gptq.checkpoint(tmp_path / "a", desc_act=True)
    for layout in ("gptq", "gptq_v2", "gptq_p"):
        opened = qcore.open_checkpoint(convert(path, f"gptq:{layout}", tmp_path / layout))
        assert torch.equal(opened.dequantize(test_gptq.MODULE), weight)
        assert opened.weight(test_gptq.MODULE).scheme.weight.ordered
    for format in ("gptq:bitblas", "awq", "auto-round", "bitblas"):
        with pytest.raises(qcore.Refused, match="not-representable"):
            convert(path, format, tmp_path / "no")


def test_words_are_packed_as_they_are_read() -> None:
    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
    assert torch.equal(awq_fast.unshuffle(awq_fast.shuffle(codes)), codes)
    for bits in (2, 4):
        stream = torch.randint(0, 256, (16, 64), dtype=torch.uint8)
        assert torch.equal(bitblas.deinterleave(bitblas.interleave(stream, bits), bits), stream)
    for bits in awq.BITS:
        small = torch.randint(0, 1 << bits, (16, 32), dtype=torch.uint8)
        for reorder in (True, False):
            packed = awq.pack_words(small, bits, reorder=reorder)
            assert torch.equal(awq.unpack_words(packed, bits, 32, reorder=reorder), small)
