"""Quantizing while loading: bitsandbytes' own numbers, which layers are taken, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import qcore
from commands import command
from makers import dense_llama, write
from mixtures import Mixture
from qcore.algorithms.codebook import codebook, dynamic8, llm_int8
from qcore.bits import unpack
from qcore.model.linear import QuantizedLinear
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
TOKENS = torch.tensor([[1, 5, 9, 100, 3]])


def weight(rows: int, columns: int) -> torch.Tensor:
    """bf16 [rows, columns] from integers, so that it is the same everywhere; blocks of 64 differ in size."""
    place = torch.arange(rows * columns, dtype=torch.int64)
    spread = (place * 7919 % 10007 - 5003).to(torch.float32) / 4096 * (1 + place // 64 % 7)
    return spread.to(torch.bfloat16).view(rows, columns)


def digest(*tensors: torch.Tensor) -> str:
    data = b"".join(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) for tensor in tensors)
    return hashlib.sha256(data).hexdigest()[:16]


def as_stored(made: QuantizedTensor) -> torch.Tensor:
    """The codes as bitsandbytes packs them: flattened, the first one high."""
    codes = unpack(made.codes, 4, made.shape[1]).flatten()
    return codes[::2] << 4 | codes[1::2]


@pytest.mark.parametrize(
    ("kind", "shape", "nested", "codes", "scales"),
    [
        ("nf4", (33, 100), False, "fe9a321f0e34d2d6", "b3a1a669216a0cf7"),
        ("nf4", (33, 100), True, "fe9a321f0e34d2d6", "1a50aa4c17fc7981"),
        ("fp4", (33, 100), False, "0e22bb82315c97d0", "b3a1a669216a0cf7"),
        ("fp4", (33, 100), True, "0e22bb82315c97d0", "1a50aa4c17fc7981"),
        ("nf4", (96, 512), True, "d83e144080c18772", "fbcf839f0785e1bd"),
    ],
)
def test_four_bits_are_bitsandbytes_own(
    kind: str, shape: tuple[int, int], nested: bool, codes: str, scales: str
) -> None:
    """Recorded from quantize_4bit of bitsandbytes 0.50.2 on a CPU; a last block is not whole."""
    levels = "flat64:dynamic8+flat16384" if nested else "flat64"
    made = codebook(weight(*shape), Scheme.parse(f"W4A16-{kind}-{levels}"))
    assert digest(as_stored(made)) == codes
    extra = [made.offset.reshape(1)] if made.offset is not None else []
    assert digest(*made.scales, *extra) == scales
    if nested and shape == (33, 100):
        assert made.scales[0].flatten()[:8].tolist() == [7, 29, 51, 172, 208, 230, 255, 7]
        assert made.offset is not None and float(made.offset) == 4.687349796295166


def test_int8_is_bitsandbytes_own() -> None:
    """Recorded from Int8Params of bitsandbytes 0.50.2 on a CPU."""
    made = llm_int8(weight(33, 100), Scheme.parse("W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0"))
    assert digest(made.codes) == "cee87cb338cf4550"
    assert digest((made.scales[0] / torch.tensor(1 / 127).double()).float()) == "64f1ddf4ced54421"


def test_the_dynamic_type_has_256_sorted_values() -> None:
    table = dynamic8()
    assert table.numel() == 256 and bool((table.diff() > 0).all())
    assert table[255] == 1.0 and table[127] == 0.0 and -0.994 < float(table[0]) < -0.992


@pytest.mark.parametrize("nested", [False, True])
def test_zeros_stay_zeros(nested: bool) -> None:
    levels = "flat64:dynamic8+flat16384" if nested else "g64"
    zeros = codebook(torch.zeros(4, 64), Scheme.parse(f"W4A16-nf4-{levels}"))
    assert not bool(zeros.dequantize().any())
    assert not bool(llm_int8(torch.zeros(2, 8), Scheme.parse("W8A8-int8-dyn")).dequantize().any())


@pytest.mark.parametrize(
    ("how", "scheme", "error"),
    [
        ("bitsandbytes:nf4", "W4A16-nf4-g64", 0.1),
        ("bitsandbytes:fp4", "W4A16-fp4-g64", 0.13),
        ("bitsandbytes:nf4-double", "W4A16-nf4-flat64:dynamic8+flat16384", 0.1),
        ("bitsandbytes:int8", "W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0", 0.01),
        ("bitsandbytes:W4A16-nf4-flat32", "W4A16-nf4-g32", 0.1),
        ("W4A16-g32-sym", "W4A16-g32-sym", 0.1),
        ("rtn:FP8_DYNAMIC", "W8A8-fp8-dyn", 0.05),
        ("deepspeedfp:W6A16-e3m2-flat512", "W6A16-e3m2-flat512", 0.06),
    ],
)
def test_linear_layers_are_quantized_and_run(tmp_path: Path, how: str, scheme: str, error: float) -> None:
    opened = qcore.open_checkpoint(write(tmp_path, dense_llama()))
    asked = opened.quantized(how)
    assert opened.plan[UP] is None and asked.plan[UP] == Scheme.parse(scheme)
    kept = {module for module, found in asked.plan.items() if found is None}
    assert kept == {"lm_head", "model.embed_tokens"} and "lm_head" in asked.layers["lm_head"].reason
    assert not any(name.startswith(UP) for name in asked.parameters)
    plain = dense_llama()[f"{UP}.weight"]
    assert 0 < float((asked.dequantize(UP) - plain).norm() / plain.norm()) < error
    assert asked.loaded_bytes < opened.loaded_bytes == opened.size_bytes
    model = qcore.load_model(asked, dtype="float32")
    assert isinstance(model.get_submodule(UP), QuantizedLinear)
    want = qcore.load_model(opened, dtype="float32")(TOKENS).logits
    assert float((model(TOKENS).logits - want).norm() / want.norm()) < 2 * error
    again = qcore.load_model(tmp_path, dtype="float32", quantize=how)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_block_that_crosses_rows_is_counted_over_the_whole(tmp_path: Path) -> None:
    asked = qcore.open_checkpoint(write(tmp_path, dense_llama())).quantized("bitsandbytes:nf4")
    assert asked.plan[DOWN] == Scheme.parse("W4A16-nf4-flat64")  # 96 columns


def test_ignored_layers_biases_and_stored_codes_stay(tmp_path: Path) -> None:
    tensors = dense_llama()
    for name in ("q", "k", "v", "o"):
        rows = tensors[f"model.layers.0.self_attn.{name}_proj.weight"].shape[0]
        tensors[f"model.layers.0.self_attn.{name}_proj.bias"] = torch.randn(rows)
    opened = qcore.open_checkpoint(write(tmp_path, tensors, attention_bias=True))
    asked = opened.quantized("bitsandbytes:nf4", ignore=["mlp"])
    assert asked.plan[UP] is None and asked.plan["lm_head"] is not None
    query = "model.layers.0.self_attn.q_proj"
    assert torch.equal(asked.layer(query).bias, tensors[f"{query}.bias"])  # type: ignore[arg-type]
    qcore.load_model(asked)(TOKENS)
    twice = asked.quantized("bitsandbytes:int8")
    assert str(twice.plan[UP]).startswith("W8A8-int8")


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("bitsandbytes:nf5", "bad-scheme"),
        ("bitsandbytes", "bad-scheme"),
        ("abacus:W4A16-g128-sym", "bad-scheme"),
        ("bitsandbytes:W4A16-g128-sym", "scheme-unsupported"),
        ("rtn:W4A16-nf4-g64", "scheme-unsupported"),
        ("W8A8-fp8-static", "scheme-unsupported"),
        ("W4A16-gguf:q4_k", "scheme-unsupported"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, how: str, code: str) -> None:
    opened = qcore.open_checkpoint(write(tmp_path, dense_llama()))
    with pytest.raises(qcore.Refused) as caught:
        opened.quantized(how)
    assert caught.value.refusal.code == code and caught.value.refusal.fix and caught.value.refusal.subject == how


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = dense_llama()
    tensors[f"{UP}.weight"][3, 5] = float("nan")
    asked = qcore.open_checkpoint(write(tmp_path, tensors)).quantized("bitsandbytes:nf4")
    with pytest.raises(qcore.Refused, match="bad-content"):
        asked.weight(UP)


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"load_in_4bit": True}, "W4A16-fp4-g64"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "W4A16-nf4-g64"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "W4A16-fp4-flat64:dynamic8+flat16384"),
        ({"load_in_8bit": True}, "W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0"),
        ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, "W8A8-int8-channel-sym/int8-token-sym-dyn-outliersinf"),
    ],
)
def test_a_bitsandbytes_config_over_plain_weights_is_a_request(
    tmp_path: Path, config: dict[str, object], scheme: str
) -> None:
    opened = qcore.open_checkpoint(write(tmp_path, dense_llama(), {"quant_method": "bitsandbytes", **config}))
    assert opened.plan[UP] == Scheme.parse(scheme) and opened.plan["lm_head"] is None
    qcore.load_model(opened)(TOKENS)
    skips = {"llm_int8_skip_modules": ["up_proj"]}
    path = write(tmp_path / "skips", dense_llama(), {"quant_method": "bitsandbytes", **config, **skips})
    skipped = qcore.open_checkpoint(path)
    assert skipped.plan[UP] is None and skipped.plan["lm_head"] is not None


def test_a_bitsandbytes_config_that_asks_for_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(qcore.Refused, match="unknown-variant"):
        qcore.open_checkpoint(write(tmp_path, dense_llama(), {"quant_method": "bitsandbytes"}))


def test_the_command_line_takes_the_request(tmp_path: Path) -> None:
    path = write(tmp_path, dense_llama())
    done = command("run", path, "-p", "x", "--quantize", "bitsandbytes:nf5", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["refusal"]["code"] == "bad-scheme", done.stderr


def test_routers_are_never_quantized(tmp_path: Path) -> None:
    mixture = Mixture("qwen2_moe")
    checkpoint = qcore.open_checkpoint(mixture.write(tmp_path / "base", mixture.tensors())).quantized(
        "W4A16-g32-sym", ()
    )
    kept = {module for module, scheme in checkpoint.plan.items() if scheme is None}
    routers = {f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("gate", "shared_expert_gate")}
    assert kept == {*routers, "model.embed_tokens"}
    assert all("a mixture's router" in checkpoint.layers[module].reason for module in routers)
