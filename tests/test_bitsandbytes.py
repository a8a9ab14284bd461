"""bitsandbytes from codes that the test chooses: both codebooks, nested scales, block sizes that cross rows, LLM.int8."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, write
from qcore.convert import convert
from qcore.explanation import explain
from qcore.kernels.activations import quantize_input
from qcore.kernels.reference import ReferenceLinear
from qcore.scheme import Scheme, TensorScheme
from qcore.tensor import LayerTensors, QuantizedTensor

UP = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 96, 64


def four_bits(
    kind: str = "nf4", blocksize: int = 64, *, nested: bool = False, storage: torch.dtype = torch.uint8, seed: int = 0,
    state: dict[str, Any] | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """The tensors of up_proj, and its weight by the definition."""
    random = torch.Generator().manual_seed(seed)
    count = ROWS * COLUMNS
    codes = torch.randint(0, 16, (count,), generator=random)
    table = torch.linspace(-1, 1, 16) ** 3
    blocks = -(-count // blocksize)
    said: dict[str, Any] = {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
    parts = {"quant_map": table}
    if nested:
        levels = torch.randint(0, 256, (blocks,), generator=random)
        nested_table, coarse = torch.linspace(-1, 1, 256), torch.rand(-(-blocks // 256), generator=random)
        absmax = nested_table[levels] * coarse.repeat_interleave(256)[:blocks] + 0.25
        parts |= {"absmax": levels.to(torch.uint8), "nested_absmax": coarse, "nested_quant_map": nested_table}
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
    else:
        parts["absmax"] = absmax = torch.rand(blocks, generator=random)
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
    text = json.dumps({**said, **(state or {})}).encode()
    tensors = {f"{UP}.weight.{part}": tensor for part, tensor in parts.items()}
    tensors[f"{UP}.weight"] = packed.view(storage).reshape(-1, 1)
    tensors[f"{UP}.weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    weight = (table[codes] * absmax.repeat_interleave(blocksize)[:count]).reshape(ROWS, COLUMNS)
    return tensors, weight


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    whole = dense_llama()
    del whole[f"{UP}.weight"]
    whole |= tensors
    return write(
        folder, whole, {"quant_method": "bitsandbytes", "load_in_4bit": not config.get("load_in_8bit"), **config}
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_exact(tmp_path: Path, kind: str, blocksize: int, nested: bool) -> None:
    tensors, weight = four_bits(kind, blocksize, nested=nested)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, tensors))
    assert torch.equal(opened.dequantize(UP), weight)
    rows = f"g{blocksize}" if blocksize <= COLUMNS else f"flat{blocksize}"
    scales = f"flat{blocksize}:dynamic8+flat{256 * blocksize}" if nested else rows
    assert opened.plan[UP] == opened.weight(UP).scheme == Scheme.parse(f"W4A16-{kind}-{scales}")
    part = opened.weight(UP).rows(5, 17)  # a block of rows is what the reference dequantizes at a time
    assert torch.equal(part.dequantize(), weight[5:17])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bytes_may_be_stored_as_another_type(tmp_path: Path, storage: torch.dtype) -> None:
    tensors, weight = four_bits(storage=storage)
    assert torch.equal(qcore.open_checkpoint(checkpoint(tmp_path, tensors)).dequantize(UP), weight)


def int8() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(-127, 128, (ROWS, COLUMNS), generator=random, dtype=torch.int8)
    absmax = torch.rand(ROWS, generator=random).half().float()  # as bitsandbytes finds it
    parts = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    weight = codes * absmax[:, None] * 7.874015748031496e-3  # int8_vectorwise_dequant
    return {f"{UP}.{part}": tensor for part, tensor in parts.items()}, weight


def test_int8_is_exact_and_its_threshold_is_the_configs(tmp_path: Path) -> None:
    tensors, weight = int8()
    opened = qcore.open_checkpoint(
        checkpoint(tmp_path, tensors, load_in_4bit=False, load_in_8bit=True, llm_int8_threshold=4)
    )
    assert torch.equal(opened.dequantize(UP), weight)
    assert str(opened.plan[UP]) == "W8A8-int8-channel-sym/int8-token-sym-dyn-outliers4.0"
    whole = qcore.open_checkpoint(checkpoint(tmp_path / "0", tensors, load_in_8bit=True, llm_int8_threshold=0.0))
    assert whole.plan[UP] == Scheme.parse("W8A8-int8-channel-sym/int8-token-sym-dyn-outliersinf")
    assert str(Scheme.parse(str(whole.plan[UP]))) == str(whole.plan[UP])


def test_columns_with_outliers_stay_whole() -> None:
    scheme = TensorScheme.parse("int8-token-sym-dyn-outliers6.0")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    x[2, 7], x[4, 9] = 6.0, -31.5
    got = quantize_input(x, scheme)
    kept = torch.zeros(32, dtype=torch.bool)
    kept[[7, 9]] = True
    assert torch.equal(got[:, kept], x[:, kept])
    # all that is below the threshold has a part in a row's range, also where its column is kept
    narrow = x.half().float()
    step = narrow.masked_fill(narrow.abs() >= 6, 0).abs().amax(1, keepdim=True) / 127
    rest = narrow[:, ~kept]
    assert torch.allclose(got[:, ~kept], (rest / step).round() * step, rtol=2e-5) and bool(
        (got[:, ~kept] != rest).any()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_multiplied_as_integers(dtype: torch.dtype) -> None:
    scheme = Scheme.parse("W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0")
    codes = torch.randint(-127, 128, (24, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    largest = torch.rand(24, 1) + 0.5
    weight = QuantizedTensor(scheme, (24, 64), codes, (largest.double() / 127,))
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[1, 0, 5] = 20.0
    x[2, 1] = 0.0
    got = ReferenceLinear(LayerTensors(weight)).forward(x)
    given = quantize_input(x.float(), scheme.input, None, None)  # type: ignore[arg-type]
    expected = given.double() @ weight.dequantize().double().t()
    assert got.shape == (3, 2, 24) and got.dtype == dtype and not got[2, 1].any()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("made", [four_bits()[0], four_bits("fp4", 128, nested=True)[0], int8()[0]])
def test_a_model_runs(tmp_path: Path, made: dict[str, torch.Tensor]) -> None:
    model = qcore.load_model(checkpoint(tmp_path, made), dtype="float32")
    assert bool(model(torch.tensor([[1, 5, 9]])).logits.isfinite().all())


@pytest.mark.parametrize("computes", ["bfloat16", "float16", "float32", None])
@pytest.mark.parametrize("asked", [False, True])
def test_layers_multiply_in_the_stated_type_unless_another_is_asked_for(
    tmp_path: Path, computes: str | None, asked: bool
) -> None:
    """As Linear4bit.forward: input, weight and bias in bnb_4bit_compute_dtype, the answer in the input's type again."""
    tensors, weight = four_bits()
    path = checkpoint(tmp_path / "a", tensors, bnb_4bit_compute_dtype=computes)
    # The reference rounds weights to the type, as bitsandbytes does; other kernels may keep more of them.
    model = qcore.load_model(path, dtype="float32" if asked else None, kernel="reference_linear")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    layer = model.get_submodule(UP)
    assert model.dtype == torch.float32
    narrow = torch.float32 if asked or computes is None else getattr(torch, computes)
    expected = torch.nn.functional.linear(x.to(narrow), weight.to(narrow)).float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-5)
    plain = torch.nn.functional.linear(x, weight)
    assert (narrow == torch.float32) == torch.allclose(layer(x), plain, rtol=1e-6, atol=1e-5)
    again = json.loads((convert(path, "bitsandbytes", tmp_path / "b") / "config.json").read_text())
    assert again["quantization_config"]["bnb_4bit_compute_dtype"] == (computes or "float32")


def test_a_request_for_4_bits_states_what_it_computes_in(tmp_path: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    path = write(tmp_path, dense_llama(), config)
    assert qcore.open_checkpoint(path).layers[UP].computes == "bfloat16"
    rows = explain(path, dtype="checkpoint").layers
    kernel = next(row.selection.kernel for row in rows if row.module == UP and row.selection)
    assert kernel is not None and "bfloat16" in kernel.dtypes


@pytest.mark.parametrize("first", ["load_in_4bit", "load_in_8bit"])
def test_4_and_8_bits_at_once_are_refused(tmp_path: Path, first: str) -> None:
    both = {first: True, "load_in_4bit": True, "load_in_8bit": True}
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(write(tmp_path, dense_llama(), {"quant_method": "bitsandbytes", **both}))
    refusal = caught.value.refusal
    assert (refusal.code, refusal.field) == ("bad-field", "quantization_config.load_in_8bit")


def changed(name: str, tensor: torch.Tensor | None, **how: Any) -> dict[str, torch.Tensor]:
    tensors = four_bits(**how)[0]
    if tensor is None:
        del tensors[f"{UP}.weight{name}"]
        return tensors
    return {**tensors, f"{UP}.weight{name}": tensor}


def state(**values: Any) -> dict[str, torch.Tensor]:
    return four_bits(state=values)[0]


STATE = ".quant_state.bitsandbytes__nf4"
NAN = torch.full((96,), float("nan"))


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        (changed("", torch.zeros(100, 1, dtype=torch.uint8)), "bad-shape"),
        (changed("", torch.zeros(3072, 1, dtype=torch.int64)), "bad-dtype"),
        (changed(".absmax", None), "missing-tensor"),
        (changed(".absmax", torch.zeros(95)), "bad-shape"),
        (changed(".absmax", torch.zeros(96, dtype=torch.uint8)), "bad-dtype"),
        (changed(".absmax", NAN), "bad-content"),
        (changed(".quant_map", torch.zeros(15)), "bad-shape"),
        (changed(".quant_map", NAN[:16]), "bad-content"),
        (changed(".nested_absmax", None, nested=True), "missing-tensor"),
        (changed(".nested_quant_map", torch.zeros(16), nested=True), "bad-shape"),
        (changed(STATE, torch.zeros(5000, dtype=torch.uint8)), "limit-exceeded"),
        (changed(STATE, torch.zeros(50, dtype=torch.uint8)), "bad-json"),
        (changed(STATE, torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)), "bad-json"),
        ({**four_bits()[0], f"{UP}.weight.mystery": torch.zeros(3)}, "unexpected-tensor"),
        (state(quant_type="fp4"), "bad-field"),
        (state(quant_type="nf3"), "bad-field"),
        (state(nested_blocksize=256), "bad-field"),
        (state(blocksize=0), "bad-field"),
        (state(blocksize="many"), "bad-field"),
        (state(shape=[96]), "bad-field"),
        (state(shape=[0, 64]), "bad-field"),
        (state(shape=[-96, -64]), "bad-field"),
        (state(shape=[96, 65]), "bad-shape"),
        (state(shape=[1 << 40, 1 << 40]), "bad-shape"),
        ({**int8()[0], f"{UP}.SCB": NAN}, "bad-content"),
        ({**int8()[0], f"{UP}.SCB": torch.zeros(64)}, "bad-shape"),
        ({**int8()[0], f"{UP}.weight_format": torch.tensor(2, dtype=torch.uint8)}, "unknown-variant"),
    ],
)
def test_what_is_broken_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], code: str) -> None:
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(checkpoint(tmp_path, tensors)).dequantize(UP)
    assert caught.value.refusal.code == code and caught.value.refusal.fix


@pytest.mark.parametrize("columns", [6, 7])
def test_rows_that_end_within_a_byte_are_packed_anew(columns: int) -> None:
    from qcore.bits import unpack
    from qcore.layouts.bitsandbytes import flat_nibbles, rows_of_nibbles

    codes = torch.randint(0, 16, (4, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    flat = codes.flatten()
    stored = flat[0::2] << 4 | flat[1::2]
    packed = rows_of_nibbles(stored, 4, columns)
    assert torch.equal(unpack(packed, 4, columns), codes)
    assert torch.equal(flat_nibbles(packed, columns).flatten(), stored)


@pytest.mark.parametrize(
    ("tensors", "variant", "config"),
    [
        (four_bits()[0], "nf4", {}),
        (four_bits("fp4", 128)[0], "fp4", {}),
        (four_bits("fp4", 512, nested=True)[0], "fp4", {}),
        (four_bits("nf4", 32, nested=True, storage=torch.float32)[0], "nf4", {}),
        (int8()[0], "int8", {"load_in_8bit": True, "llm_int8_threshold": 4.5}),
        (int8()[0], "int8", {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
    ],
)
def test_what_is_read_is_written(
    tmp_path: Path, tensors: dict[str, torch.Tensor], variant: str, config: dict[str, Any]
) -> None:
    first = qcore.open_checkpoint(checkpoint(tmp_path / "a", tensors, **config))
    opened = qcore.open_checkpoint(convert(first.path, f"bitsandbytes:{variant}", tmp_path / "b"))
    assert opened.plan == first.plan and torch.equal(opened.dequantize(UP), first.dequantize(UP))
    for name, tensor in tensors.items():
        again = opened.files.source.read(name)
        if "quant_state" not in name:
            assert torch.equal(
                again, tensor.view(torch.uint8).reshape(again.shape) if again.dtype == torch.uint8 else tensor
            ), name
    written = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in written["llm_int8_skip_modules"] and UP not in written["llm_int8_skip_modules"]
    assert written["load_in_8bit"] == (variant == "int8") != written["load_in_4bit"]


@pytest.mark.parametrize("how", ["nf4", "fp4", "nf4-double", "fp4-double", "int8"])
def test_what_is_made_while_loading_is_written(tmp_path: Path, how: str) -> None:
    path = write(tmp_path / "a", {**dense_llama(), "model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    source = qcore.open_checkpoint(path).quantized(f"bitsandbytes:{how}")
    opened = qcore.open_checkpoint(convert(source, "bitsandbytes", tmp_path / "b"))
    assert opened.plan == source.plan
    for module in source.plan:
        assert torch.equal(opened.dequantize(module), source.dequantize(module)), module


@pytest.mark.parametrize(
    ("how", "format"),
    [("W4A16-g32-sym", "bitsandbytes"), ("W8A8", "bitsandbytes"), ("W8A16", "bitsandbytes"),
     ("bitsandbytes:nf4", "bitsandbytes:fp4"), ("bitsandbytes:int8", "bitsandbytes:nf4"), ("FP8_DYNAMIC", "bitsandbytes")],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused(tmp_path: Path, how: str, format: str) -> None:
    source = qcore.open_checkpoint(write(tmp_path / "a", dense_llama())).quantized(how)
    with pytest.raises(qcore.Refused, match="not-representable") as caught:
        convert(source, format, tmp_path / "b")
    assert "proj" in caught.value.refusal.subject and not (tmp_path / "b").exists()


def test_four_and_eight_bits_are_not_mixed(tmp_path: Path) -> None:
    gate = {name.replace("up_proj", "gate_proj"): tensor for name, tensor in int8()[0].items()}
    tensors = {**four_bits()[0], **gate}
    path = checkpoint(tmp_path / "a", tensors)
    with pytest.raises(qcore.Refused, match="4 or 8 bits in all layers"):
        convert(path, "bitsandbytes", tmp_path / "b")


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (["layers.0.mlp"], False),  # neither the beginning of a name nor its end
        (["up"], False),
        (["up_proj"], True),
        (["model.layers.0"], True),
        (["model.layers.*.mlp"], True),
        (["model.layers.0.mlp.up"], False),
        ([], False),
    ],
)
def test_layers_are_skipped_as_transformers_skips_them(tmp_path: Path, skip: list[str], kept: bool) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": skip}
    opened = qcore.open_checkpoint(write(tmp_path, dense_llama(), config))
    assert (opened.plan[UP] is None) == kept
    assert opened.plan["lm_head"] is not None and opened.plan["model.embed_tokens"] is None
