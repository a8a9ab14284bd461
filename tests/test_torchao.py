"""TorchAO from parts that the test chooses: every class, its layouts, its inputs, and broken records."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qcore
from makers import LLAMA, dense_llama, write
from qcore.convert import convert
from qcore.kernels.reference import ReferenceLinear
from qcore.scheme import Scheme
from qcore.tensor import float_table

UP = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 96, 64

Made = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor, str]


def dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def kwargs(kind: str, granularity: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
    return {"_type": kind, "_data": {**({"granularity": granularity} if granularity else {}), **rest}}


ROW = {"_type": "PerRow", "_data": {"dim": -1}}
MX_INPUT = kwargs("QuantizeTensorToMXKwargs", elem_dtype=dtype("float8_e4m3fn"), block_size=32,
                  scaling_mode={"_type": "ScaleCalculationMode", "_data": "RCEIL"})  # fmt: skip
RANDOM = torch.Generator()


def spread(part: torch.Tensor) -> torch.Tensor:
    return part.float().repeat_interleave(ROWS // part.shape[0], 0).repeat_interleave(COLUMNS // part.shape[1], 1)


def made(kind: str) -> Made:
    """up_proj as a class stores it: its attributes, its parts, its weight by the definition and its scheme."""
    RANDOM.manual_seed(0)
    ints = lambda low, high, *shape: torch.randint(low, high, shape, generator=RANDOM)  # noqa: E731
    scales = lambda *shape: torch.rand(*shape, generator=RANDOM) * 0.01 + 0.001  # noqa: E731
    name, _, form = kind.partition("-")
    if name == "Int8Tensor":
        codes, scale = ints(-128, 128, ROWS, COLUMNS).to(torch.int8), scales(ROWS, 1)
        data = {"block_size": [1, COLUMNS], "act_quant_kwargs": None}
        parts = {"qdata": codes, "scale": scale, "zero_point": torch.zeros(ROWS, 1, dtype=torch.int8)}
        if form == "dynamic":
            data["act_quant_kwargs"] = kwargs("QuantizeTensorToInt8Kwargs", ROW, mapping_type={"_data": "SYMMETRIC"})
        if form == "scaled":
            parts["act_pre_scale"] = scales(COLUMNS)
        return data, parts, codes * scale, "W8A8-int8-dyn" if form == "dynamic" else "W8A16-channel-sym"
    if name == "IntxUnpackedToInt8Tensor":
        bits = int(form[0])
        half = 1 << (bits - 1)
        codes, scale = ints(-half, half, ROWS, COLUMNS).to(torch.int8), scales(ROWS, 2).bfloat16()
        zeros = ints(-half, half, ROWS, 2).to(torch.int8)
        data = {"block_size": [1, 32], "target_dtype": dtype(f"int{bits}"),
                "activation_quantization": "int8_asym_per_token" if form.endswith("a8") else None}  # fmt: skip
        weight = (codes.float() - spread(zeros)) * spread(scale)
        scheme = f"W{bits}A8-uint{bits}-g32-asym/int8-token-asym-dyn" if form.endswith("a8") else f"W{bits}A16-g32-asym"
        return data, {"qdata": codes, "scale": scale, "zero_point": zeros}, weight, scheme
    if name == "Float8Tensor":
        eights, block = torch.randn(ROWS, COLUMNS, generator=RANDOM).to(torch.float8_e4m3fn), {
            "row": [1, COLUMNS], "tensor": [ROWS, COLUMNS], "block": [32, 32]}[form]  # fmt: skip
        scale = scales(ROWS // block[0], COLUMNS // block[1])
        data = {
            "block_size": block,
            "act_quant_kwargs": kwargs("QuantizeTensorToFloat8Kwargs", ROW) if form == "row" else None,
        }
        grid = {"row": "W8A8-fp8-dyn", "tensor": "W8A16-fp8-tensor", "block": "W8A16-fp8-block32"}[form]
        return data, {"qdata": eights, "scale": scale}, eights.float() * spread(scale), grid
    if name == "Int4Tensor":
        codes, scale, zeros = ints(-8, 8, ROWS, COLUMNS), scales(ROWS, 2), scales(ROWS, 2)
        packed = ((codes[:, 0::2] & 15) | (codes[:, 1::2] & 15) << 4).to(torch.uint8).view(torch.int8)
        data = {"block_size": [1, 32], "shape": [ROWS, COLUMNS],
                "activation_dtype": dtype("float8_e4m3fn" if form else "bfloat16")}  # fmt: skip
        scheme = "W4A8-int4-g32-zfloat/fp8-token-dyn" if form else "W4A16-int4-g32-zfloat"
        parts = {"qdata": packed, "scale": scale.t(), "zero_point": zeros.t()}
        return data, parts, codes * spread(scale) + spread(zeros), scheme
    if name == "Int4PlainInt32Tensor":
        codes, scale, zeros = ints(0, 16, ROWS, COLUMNS), scales(ROWS, 2), ints(0, 16, ROWS, 2)
        words = (codes.unflatten(1, (-1, 8)) << (4 * torch.arange(8))).sum(-1).to(torch.int32)
        data = {"block_size": [1, 32], "shape": [ROWS, COLUMNS]}
        parts = {"qdata": words, "scale": scale.t(), "zero_point": zeros.t().to(torch.int8)}
        return data, parts, (codes - spread(zeros)) * spread(scale), "W4A16-g32-asym"
    if name == "Int4TilePackedTo4dTensor":
        wide = 1024
        codes = ints(0, 16, ROWS, wide)
        tiles = torch.zeros(ROWS // 8, wide // 128, 32, 4, dtype=torch.int64)
        for lane in range(32):  # as the m16n8k16 fragment has them
            for word in range(4):
                for place, step in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
                    column = 32 * word + 2 * (lane % 4) + step
                    picked = codes.reshape(ROWS // 8, 8, wide // 128, 128)[:, lane // 4, :, column]
                    tiles[:, :, lane, word] |= picked << (4 * place)
        scale, zeros = scales(wide // 32, ROWS).bfloat16(), scales(wide // 32, ROWS).bfloat16()
        data = {"block_size": [1, 32], "shape": [ROWS, COLUMNS]}
        weight = (codes[:, :COLUMNS] - 8) * spread(scale[:2].t()) + spread(zeros[:2].t())
        parts = {"qdata": tiles.to(torch.int32), "scale_and_zero": torch.stack([scale, zeros], -1)}
        return data, parts, weight, "W4A16-int4-g32-zfloat"
    swizzled = form == "swizzled"
    if name == "MXTensor":
        eights = torch.randn(ROWS, COLUMNS, generator=RANDOM).to(torch.float8_e4m3fn)
        exponents = ints(118, 123, ROWS, COLUMNS // 32).to(torch.uint8)
        data = {"elem_dtype": dtype("float8_e4m3fn"), "block_size": 32, "is_swizzled_scales": swizzled,
                "act_quant_kwargs": MX_INPUT if form else None}  # fmt: skip
        stored = swizzle(exponents) if swizzled else exponents
        scheme = "W8A8-fp8-g32:e8m0/fp8-g32:e8m0ceil-dyn" if form else "W8A16-mxfp8"
        parts = {"qdata": eights, "scale": stored.view(torch.float8_e8m0fnu)}
        return data, parts, eights.float() * torch.exp2(spread(exponents) - 127), scheme
    nibbles = ints(0, 16, ROWS, COLUMNS).to(torch.uint8)
    fine = torch.rand(ROWS, COLUMNS // 16, generator=RANDOM).to(torch.float8_e4m3fn)
    data = {"block_size": 16, "is_swizzled_scales": swizzled,
            "act_quant_kwargs": kwargs("QuantizeTensorToNVFP4Kwargs", block_size=16, use_dynamic_per_tensor_scale=True)
            if swizzled else None}  # fmt: skip
    stored = swizzle(fine.view(torch.uint8)).view(torch.float8_e4m3fn) if swizzled else fine
    whole = torch.tensor(0.37)
    parts = {"qdata": nibbles[:, 0::2] | nibbles[:, 1::2] << 4, "scale": stored, "per_tensor_scale": whole}
    weight = float_table("e2m1")[nibbles.int()] * (spread(fine) * whole)
    return data, parts, weight, "W4A4-nvfp4" if swizzled else "W4A16-nvfp4"


def swizzle(plain: torch.Tensor) -> torch.Tensor:
    """cuBLAS' order of block scales, one number at a time: row r of 128 stands in line r % 32, at place r / 32."""
    rows, columns = plain.shape
    down, across = -(-rows // 128), -(-columns // 4)
    stored = torch.zeros(down * across * 512, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            block = (row // 128) * across + column // 4
            stored[512 * block + 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4] = plain[row, column]
    return stored.reshape(down * 128, across * 4)


KINDS = ("Int8Tensor", "Int8Tensor-dynamic", "Int8Tensor-scaled", *(f"IntxUnpackedToInt8Tensor-{b}" for b in range(1, 9)),
         "IntxUnpackedToInt8Tensor-4a8", "Float8Tensor-row", "Float8Tensor-tensor", "Float8Tensor-block", "Int4Tensor",
         "Int4Tensor-fp8", "Int4PlainInt32Tensor", "Int4TilePackedTo4dTensor", "MXTensor", "MXTensor-inputs",
         "MXTensor-swizzled", "NVFP4Tensor", "NVFP4Tensor-swizzled")  # fmt: skip
UNWRITTEN = ("Int8Tensor-scaled", "Float8Tensor-block", "Int4Tensor-fp8", "MXTensor")
"""Inputs' scales that are stored, and what no config of torchao makes."""


def checkpoint(
    folder: Path, kind: str, change: dict[str, Any] | None = None, record: dict[str, Any] | str | None = None
) -> tuple[Path, torch.Tensor, str]:
    data, parts, weight, scheme = made(kind)
    parts |= change or {}
    tensors = dense_llama()
    del tensors[f"{UP}.weight"]
    tensors |= {f"{UP}._weight_{part}": tensor for part, tensor in parts.items() if tensor is not None}
    stated: dict[str, Any] = {"_type": kind.partition("-")[0], "_data": data, "_tensor_data_names": list(parts)}
    if isinstance(record, dict):
        stated = {**stated, **{k: v for k, v in record.items() if k.startswith("_")}}
        stated["_data"] = {**data, **{k: v for k, v in record.items() if not k.startswith("_")}}
    mapping = {"_type": "MappingType", "_data": "ASYMMETRIC" if "Intx" in kind else "SYMMETRIC"}
    config = {**LLAMA, "quantization_config": {"quant_method": "torchao", "quant_type": {"default": {
        "_type": "IntxWeightOnlyConfig", "_data": {"mapping_type": mapping}}}}}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {"format": "pt", "tensor_names": json.dumps([f"{UP}.weight"]), "lm_head.weight": '{"_type": "Tensor"}'}
    if record != "none":
        metadata[f"{UP}.weight"] = record if isinstance(record, str) else json.dumps(stated)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    return folder, weight, scheme


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_is_exact_and_runs(tmp_path: Path, kind: str) -> None:
    path, weight, scheme = checkpoint(tmp_path, kind)
    opened = qcore.open_checkpoint(path)
    assert opened.method == "torchao"
    assert opened.plan[UP] == opened.weight(UP).scheme == Scheme.parse(scheme)
    assert torch.equal(opened.dequantize(UP), weight)
    model = qcore.load_model(opened, dtype="float32")
    assert bool(model(torch.tensor([[1, 5, 9]])).logits.isfinite().all())
    if kind == "Int8Tensor-scaled":
        assert model.get_submodule(UP).input_multiplier is not None


@pytest.mark.parametrize(
    ("kind", "change", "record", "code"),
    [
        ("Int8Tensor", {}, "none", "missing-tensor"),
        ("Int8Tensor", {}, "{broken", "bad-json"),
        ("Int8Tensor", {}, '{"_data": {}}', "bad-field"),
        ("Int8Tensor", {}, {"_type": "Mystery"}, "unknown-variant"),
        ("Int8Tensor", {}, {"block_size": "row"}, "unknown-variant"),
        ("Int8Tensor", {}, {"block_size": [1, 0]}, "unknown-variant"),
        ("Int8Tensor", {}, {"act_quant_kwargs": {"_type": "x"}}, "unknown-variant"),
        ("Int8Tensor", {"scale": None}, {}, "missing-tensor"),
        ("Int8Tensor", {"scale": torch.ones(ROWS, 2)}, {}, "bad-shape"),
        ("Int8Tensor", {"scale": torch.full((ROWS, 1), float("nan"))}, {}, "bad-content"),
        ("Int8Tensor", {"qdata": torch.zeros(ROWS, COLUMNS)}, {}, "bad-dtype"),
        ("Int8Tensor", {"qdata": torch.zeros(2, ROWS, COLUMNS, dtype=torch.int8)}, {}, "bad-shape"),
        ("Int8Tensor", {"mystery": torch.zeros(3)}, {}, "unexpected-tensor"),
        ("IntxUnpackedToInt8Tensor-4", {"qdata": torch.full((ROWS, COLUMNS), 8, dtype=torch.int8)}, {}, "bad-content"),
        ("IntxUnpackedToInt8Tensor-4", {"zero_point": torch.full((ROWS, 2), 0.5)}, {}, "bad-content"),
        ("IntxUnpackedToInt8Tensor-4", {}, {"target_dtype": dtype("int12")}, "unknown-variant"),
        ("Float8Tensor-row", {}, {"block_size": [1, 48]}, "bad-shape"),
        ("Int4Tensor", {}, {"shape": [ROWS, COLUMNS, 1]}, "unknown-variant"),
        ("Int4Tensor", {}, {"shape": [ROWS, 2 * COLUMNS]}, "bad-shape"),
        ("Int4PlainInt32Tensor", {"zero_point": torch.full((2, ROWS), 16, dtype=torch.int8)}, {}, "bad-content"),
        ("Int4TilePackedTo4dTensor", {"qdata": torch.zeros(2, 8, 32, 4, dtype=torch.int32)}, {}, "bad-shape"),
        ("MXTensor", {}, {"elem_dtype": dtype("float6_e3m2")}, "unknown-variant"),
        ("MXTensor", {"scale": torch.full((ROWS, 2), 255, dtype=torch.uint8)}, {}, "bad-content"),
        ("MXTensor-inputs", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToMXKwargs", elem_dtype=dtype("float8_e4m3fn"), scaling_mode="CEIL")},
         "unknown-variant"),
        ("NVFP4Tensor-swizzled", {"scale": torch.zeros(ROWS, 4).to(torch.float8_e4m3fn)}, {}, "bad-shape"),
        ("NVFP4Tensor", {"per_tensor_scale": torch.zeros(3)}, {}, "bad-shape"),
        ("Float8Tensor-row", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToFloat8Kwargs", ROW, hp_value_lb=1e-3)}, "unknown-variant"),
        ("Float8Tensor-row", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToFloat8Kwargs", ROW, hp_value_ub="9")}, "unknown-variant"),
        ("Int8Tensor-dynamic", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToInt8Kwargs", {"_type": "PerRow", "_data": {"dim": 0}})},
         "unknown-variant"),
        ("Float8Tensor-row", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToFloat8Kwargs", ROW, float8_dtype=dtype("float8_e8m0fnu"))}, "unknown-variant"),
        ("Int8Tensor-dynamic", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToInt8Kwargs", ROW, mapping_type={"_data": "SYMMETRIC_NO_CLIPPING_ERR"})}, "unknown-variant"),
        ("Float8Tensor-row", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToFloat8Kwargs", {"_type": "PerBlock", "_data": {"block_size": [4, 64]}})}, "unknown-variant"),
        ("Int8Tensor", {}, {"_tensor_data_names": ["qdata", "scale", "act_pre_scale"]}, "missing-tensor"),
        ("Int8Tensor-dynamic", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToInt8Kwargs", ROW, reduce_range=True)},
         "unknown-variant"),
        ("Int8Tensor-dynamic", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToInt8Kwargs", ROW, clip=0.9)}, "unknown-variant"),
        ("Int8Tensor-dynamic", {}, {"act_quant_kwargs": kwargs("Abacus", ROW)}, "unknown-variant"),
        ("Int8Tensor", {}, {"rotation": "hadamard"}, "unknown-variant"),
        ("NVFP4Tensor", {}, {"act_quant_kwargs": kwargs("QuantizeTensorToNVFP4Kwargs", block_size=32)}, "unknown-variant"),
        ("Int4Tensor", {}, {"activation_dtype": dtype("int8")}, "unknown-variant"),
        ("IntxUnpackedToInt8Tensor-4", {}, {"apply_int8_act_asym_per_token_quant": "yes"}, "unknown-variant"),
    ],
)  # fmt: skip
def test_what_is_broken_or_not_read_is_refused(
    tmp_path: Path, kind: str, change: dict[str, Any], record: Any, code: str
) -> None:
    with pytest.raises(qcore.Refused) as caught:
        qcore.load_model(checkpoint(tmp_path, kind, change, record)[0])
    assert caught.value.refusal.code == code and caught.value.refusal.fix


def test_pickled_checkpoints_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    path, _, _ = checkpoint(tmp_path, "Int8Tensor")
    (path / "model.safetensors").unlink()
    torch.save({"a": 1}, path / "pytorch_model.bin")
    with pytest.raises(qcore.Refused, match="unsafe-container") as caught:
        qcore.open_checkpoint(path)
    assert "save_pretrained" in caught.value.refusal.fix and "torchao 0.15" in caught.value.refusal.fix


@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
@pytest.mark.parametrize("static", [False, True])
def test_codes_are_multiplied_as_integers_before_they_are_scaled(tmp_path: Path, mapping: str, static: bool) -> None:
    """The last bit of a float32 product is TorchAO's, which decides how the next layer rounds its input."""
    grain = {"_type": "PerTensor", "_data": {}} if static else ROW
    record: dict[str, Any] = {
        "act_quant_kwargs": kwargs("QuantizeTensorToInt8Kwargs", grain, mapping_type={"_data": mapping})
    }
    own, x = ({"_tensor_data_names": ["qdata", "scale", "zero_point"]}, torch.randn(7, COLUMNS, generator=RANDOM))
    change, shift = {}, torch.zeros(1, dtype=torch.int8)
    scale = x.abs().amax(1, keepdim=True) / 127.5
    if static:
        scale, shift = torch.tensor([[0.013]]), torch.tensor([[-9 if mapping == "ASYMMETRIC" else 0]], dtype=torch.int8)
        change = {"act_quant_scale": scale, "act_quant_zero_point": shift}
        own["_tensor_data_names"] += list(change)
    elif mapping == "ASYMMETRIC":
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        scale = (high - low) / 255
        shift = (-128 - (low / scale).round()).clamp(-128, 127).to(torch.int8)
    layer = qcore.open_checkpoint(checkpoint(tmp_path, "Int8Tensor", change, record | own)[0]).layer(UP)
    codes = ((x * (1.0 / scale)).round() + shift).clamp(-128, 127).to(torch.int64)
    weight = layer.weight.codes.to(torch.int64)
    expected = (codes @ weight.t()).float() * scale
    if mapping == "ASYMMETRIC":
        expected -= shift.float() * scale * weight.sum(1).float()
    expected *= layer.weight.scales[0].flatten()
    assert torch.equal(ReferenceLinear.from_layer(layer, torch.float32)(x), expected)
    close = torch.nn.functional.linear((codes - shift.long()) * scale, layer.weight.dequantize(torch.float32))
    torch.testing.assert_close(expected, close, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "change", "scheme"),
    [
        ("Float8Tensor-row", {"act_quant_kwargs": kwargs("QuantizeTensorToFloat8Kwargs", ROW, hp_value_ub=1200.0)}, "W8A8-fp8-channel/fp8-token-dyn-bound1200.0"),
        ("Float8Tensor-row", {"act_quant_kwargs": kwargs("QuantizeTensorToFloat8Kwargs", ROW, float8_dtype=dtype("float8_e5m2"))}, "W8A8-fp8-channel/e5m2-token-dyn"),
        ("IntxUnpackedToInt8Tensor-4", {"apply_int8_act_asym_per_token_quant": True, "activation_quantization": None},
         "W4A8-uint4-g32-asym/int8-token-asym-dyn"),
        ("IntxUnpackedToInt8Tensor-4", {"apply_int8_act_asym_per_token_quant": False}, "W4A16-g32-asym"),
        ("Int8Tensor", {"reduce_range": True, "dtype": dtype("bfloat16"), "later": None}, "W8A16-channel-sym"),
        ("NVFP4Tensor", {"act_quant_kwargs": kwargs("QuantizeTensorToNVFP4Kwargs", use_dynamic_per_tensor_scale=False)},
         "W4A4-e2m1-g16:e4m3fn+tensor/e2m1-g16:e4m3fn-dyn"),
    ],
)  # fmt: skip
def test_inputs_are_bounded_and_scaled_as_they_say(
    tmp_path: Path, kind: str, change: dict[str, Any], scheme: str
) -> None:
    opened = qcore.open_checkpoint(checkpoint(tmp_path, kind, None, change)[0])
    assert opened.plan[UP] == opened.weight(UP).scheme == Scheme.parse(scheme)


def test_calibrated_inputs_of_nvfp4_have_their_scale(tmp_path: Path) -> None:
    given = kwargs("QuantizeTensorToNVFP4Kwargs", use_dynamic_per_tensor_scale=False)
    parts = ["qdata", "scale", "per_tensor_scale", "act_per_tensor_scale"]
    opened = qcore.open_checkpoint(
        checkpoint(tmp_path, "NVFP4Tensor", {"act_per_tensor_scale": torch.tensor(0.02)},
                   {"act_quant_kwargs": given, "_tensor_data_names": parts})[0]
    )  # fmt: skip
    assert opened.plan[UP] == Scheme.parse("W4A4-nvfp4")
    assert opened.layer(UP).input_scale == torch.tensor([0.02])


ASYMMETRIC = {
    "_type": "IntxWeightOnlyConfig",
    "_data": {"mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"}},
}
SYMMETRIC = {"_type": "IntxWeightOnlyConfig", "_data": {"mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}}}


@pytest.mark.parametrize("key", ["fqn_to_config", "module_fqn_to_config"])
@pytest.mark.parametrize(
    ("names", "symmetric"),
    [
        ({UP: ASYMMETRIC, "_default": SYMMETRIC}, False),
        ({f"{UP}.weight": ASYMMETRIC, UP: SYMMETRIC}, False),
        ({"re:.*up_proj": ASYMMETRIC, "_default": SYMMETRIC}, False),
        ({"re:.*up": ASYMMETRIC, "_default": SYMMETRIC}, True),  # the whole name has to match
        ({"re:.*up_proj": SYMMETRIC, UP: ASYMMETRIC}, False),
        ({"_default": ASYMMETRIC}, False),
        ({"re:.*down_proj": ASYMMETRIC}, True),
    ],
)
def test_plans_know_which_layers_have_zero_points(
    tmp_path: Path, key: str, names: dict[str, Any], symmetric: bool
) -> None:
    path, weight, _ = checkpoint(tmp_path, "IntxUnpackedToInt8Tensor-4")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["quant_type"]["default"] = {"_type": "FqnToConfig", "_data": {key: names}}
    (path / "config.json").write_text(json.dumps(config))
    opened = qcore.open_checkpoint(path)
    assert str(opened.plan[UP]) == f"W4A16-g32-{'sym' if symmetric else 'asym'}"
    assert torch.equal(opened.dequantize(UP), weight)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNWRITTEN])
def test_what_is_read_is_written(tmp_path: Path, kind: str) -> None:
    path, weight, _ = checkpoint(tmp_path / "a", kind)
    first = qcore.open_checkpoint(path)
    opened = qcore.open_checkpoint(convert(path, "torchao", tmp_path / "b"))
    assert torch.equal(opened.dequantize(UP), weight)
    assert opened.plan == first.plan and opened.weight(UP).scheme == first.weight(UP).scheme
    written = opened.files.source.metadata
    record = json.loads(written[f"{UP}.weight"])
    parts = {
        name.rpartition("_weight_")[2] for name in opened.files.source.tensors if name.startswith(f"{UP}._weight_")
    }
    assert parts == set(record["_tensor_data_names"])
    names = json.loads(written["tensor_names"])
    assert f"{UP}.weight" in names and all(json.loads(written[name])["_type"] for name in names)


@pytest.mark.parametrize("kind", UNWRITTEN)
def test_what_transformers_would_not_load_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(qcore.Refused, match="not-representable"):
        convert(checkpoint(tmp_path / "a", kind)[0], "torchao", tmp_path / "b")


@pytest.mark.parametrize(
    ("how", "variant"),
    [("W4A16-g32-sym", "Int4Tensor"), ("W4A16-g32-asym", "Int4PlainInt32Tensor"), ("W4A16-g32-sym", "Int4PlainInt32Tensor"),
     ("W8A16-g32-sym", "IntxUnpackedToInt8Tensor"), ("FP8_DYNAMIC", "Float8Tensor"), ("W8A8-fp8-tensor/fp8-tensor-dyn", "")],
)  # fmt: skip
def test_the_class_may_be_chosen(tmp_path: Path, how: str, variant: str) -> None:
    source = qcore.open_checkpoint(write(tmp_path / "a", dense_llama())).quantized(how)
    opened = qcore.open_checkpoint(convert(source, f"torchao:{variant}" if variant else "torchao", tmp_path / "b"))
    assert opened.layers[UP].reason == (variant or "Float8Tensor")
    for module in source.plan:
        assert torch.equal(opened.dequantize(module), source.dequantize(module))


def test_layers_that_differ_have_configs_of_their_own(tmp_path: Path) -> None:
    path, weight, _ = checkpoint(tmp_path / "a", "NVFP4Tensor")
    source = qcore.open_checkpoint(path).quantized("W3A16-g32-asym", ignore=("gate_proj",))
    opened = qcore.open_checkpoint(convert(source, "torchao", tmp_path / "b"))
    assert opened.plan == source.plan and torch.equal(opened.dequantize(UP), weight)
    assert len({str(scheme) for scheme in opened.plan.values()}) == 3
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    default = config["quant_type"]["default"]
    assert (
        default["_type"] == "FqnToConfig" and default["_data"]["fqn_to_config"][UP]["_type"] == "NVFP4WeightOnlyConfig"
    )
    assert config["modules_to_not_convert"] == ["model.layers.0.mlp.gate_proj"]
    assert config["include_input_output_embeddings"]  # lm_head is quantized


@pytest.mark.parametrize(
    ("how", "format"),
    [("W4A16-g32-sym", "torchao:Int8Tensor"), ("bitsandbytes:nf4", "torchao"), ("W4A8", "torchao"),
     ("W4A16-g32-asym", "torchao:Int4Tensor"), ("bitsandbytes:int8", "torchao")],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused(tmp_path: Path, how: str, format: str) -> None:
    tensors = dense_llama()
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.randn(64, 128)
    tensors |= {f"model.layers.0.mlp.{part}_proj.weight": torch.randn(128, 64) for part in ("up", "gate")}
    path = write(tmp_path / "a", tensors, intermediate_size=128)
    how = how.replace("W4A8", "W4A8-int4-g64-sym/int8-token-sym-dyn")
    with pytest.raises(qcore.Refused, match="not-representable"):
        convert(qcore.open_checkpoint(path).quantized(how), format, tmp_path / "b")
