"""ModelOpt from numbers that the test chooses: every algorithm, both places of the config, mixed layers, broken parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, write
from qcore.convert import convert
from qcore.scheme import Scheme
from qcore.tensor import float_table

UP = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 96, 64
GOLDEN = Path(__file__).parent / "golden"

Made = tuple[dict[str, torch.Tensor], torch.Tensor, str]


def made(algorithm: str, seed: int = 0) -> Made:
    """The tensors of up_proj, its weight by the definition, and its scheme."""
    random = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=random) * 0.01 + 0.001  # noqa: E731
    eights = torch.randn(ROWS, COLUMNS, generator=random).to(torch.float8_e4m3fn)
    if algorithm == "FP8":
        parts = {"weight": eights, "weight_scale": uniform(1)[0], "input_scale": uniform(1)[0]}
        return parts, eights.float() * parts["weight_scale"], "W8A8-fp8-static"
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        parts = {"weight": eights, "weight_scale": uniform(ROWS)}
        return parts, eights.float() * parts["weight_scale"][:, None], "W8A8-fp8-dyn"
    if algorithm == "FP8_PB_WO":
        scale = uniform(3, 1, 2, 1)
        spread = scale.reshape(3, 2).repeat_interleave(32, 0).repeat_interleave(32, 1)
        return {"weight": eights, "weight_scale": scale}, eights.float() * spread, "W8A16-fp8-block32"
    if algorithm == "MXFP8":
        exponents = torch.randint(118, 123, (ROWS, COLUMNS // 32), generator=random, dtype=torch.uint8)
        scale = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
        return (
            {"weight": eights, "weight_scale": exponents},
            eights.float() * scale,
            "W8A8-fp8-g32:e8m0/fp8-g32:e8m0ceil-dyn",
        )
    if "MXFP4" in algorithm:
        codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=random, dtype=torch.uint8)
        exponents = torch.randint(118, 123, (ROWS, COLUMNS // 32), generator=random, dtype=torch.uint8)
        scale = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
        parts = {"weight": codes[:, 0::2] | codes[:, 1::2] << 4, "weight_scale": exponents}
        weight = float_table("e2m1")[codes.int()] * scale
        if algorithm == "MXFP4":
            return parts, weight, "W4A4-e2m1-g32:e8m0/e2m1-g32:e8m0ceil-dyn"
        return {**parts, "input_scale": uniform(1)[0]}, weight, "W4A8-e2m1-g32:e8m0/fp8-tensor"
    if "NVFP4" in algorithm:
        codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=random, dtype=torch.uint8)
        fine = (uniform(ROWS, COLUMNS // 16) * 100).to(torch.float8_e4m3fn)
        coarse = uniform(1)[0]
        weight = float_table("e2m1")[codes.int()] * (fine.float() * coarse).repeat_interleave(16, 1)
        parts = {"weight": codes[:, 0::2] | codes[:, 1::2] << 4, "weight_scale": fine, "weight_scale_2": coarse}
        if not algorithm.startswith("W4A16"):
            parts["input_scale"] = uniform(1)[0]
        if algorithm == "NVFP4_AWQ":
            parts["pre_quant_scale"] = uniform(COLUMNS) * 100
        schemes = {"W4A16_NVFP4": "W4A16-nvfp4", "W4A8_NVFP4_FP8": "W4A8-e2m1-g16:e4m3fn+tensor/fp8-tensor"}
        return parts, weight, schemes.get(algorithm, "W4A4-nvfp4")
    if algorithm.endswith("A16_AWQ") or algorithm == "W4A8_AWQ":
        codes = torch.randint(-8, 8, (ROWS, COLUMNS), generator=random)
        scale = uniform(ROWS, COLUMNS // 32)
        packed = ((codes[0::2] & 15) | (codes[1::2] & 15) << 4).to(torch.uint8)
        parts = {"weight": packed, "weight_scale": scale, "pre_quant_scale": uniform(COLUMNS) * 100}
        weight = codes.float() * scale.repeat_interleave(32, 1)
        if algorithm == "W4A16_AWQ":
            return parts, weight, "W4A16-g32-sym"
        parts |= {"input_scale": uniform(1)[0], "weight_scale_2": uniform(1)[0]}
        return parts, weight, "W4A8-int4-g32-sym/fp8-tensor"
    codes = torch.randint(-127, 128, (ROWS, COLUMNS), generator=random, dtype=torch.int8)
    scale = uniform(ROWS)
    if algorithm == "W8A16":
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None], "W8A16-channel-sym"
    parts = {
        "weight": codes,
        "weight_scale": scale,
        "input_scale": uniform(1)[0],
        "pre_quant_scale": uniform(COLUMNS) * 100,
    }
    return parts, codes.float() * scale[:, None], "W8A8-int8-static"


ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "W4A16_AWQ",
              "W8A8_SQ_PER_CHANNEL", "NVFP4_AWQ", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8", "W4A8_AWQ",
              "W8A16")  # fmt: skip


def checkpoint(
    folder: Path, parts: dict[str, torch.Tensor], algorithm: str, *, side_file: bool = False, **config: Any
) -> Path:
    tensors = dense_llama()
    del tensors[f"{UP}.weight"]
    tensors |= {f"{UP}.{part}": tensor for part, tensor in parts.items()}
    settings = {"quant_algo": algorithm, "exclude_modules": ["lm_head"], **config}
    if not side_file:
        return write(folder, tensors, {"quant_method": "modelopt", **settings})
    path = write(folder, tensors)
    (path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": settings}))
    return path


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("side_file", [False, True])
def test_every_algorithm_is_exact(tmp_path: Path, algorithm: str, side_file: bool) -> None:
    parts, weight, scheme = made(algorithm)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, algorithm, side_file=side_file))
    assert (opened.method, opened.format_version) == ("modelopt", algorithm)
    assert opened.plan[UP] == opened.weight(UP).scheme == Scheme.parse(scheme)
    fp8_inputs = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "W4A8_AWQ")
    assert opened.layer(UP).order == ("inverses" if algorithm in fp8_inputs else "dequantized")
    assert torch.equal(opened.dequantize(UP), weight)
    assert "lm_head" in opened.layers["lm_head"].reason


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_runs_with_its_input_multiplier(tmp_path: Path, algorithm: str) -> None:
    parts, weight, scheme = made(algorithm)
    model = qcore.load_model(checkpoint(tmp_path, parts, algorithm), dtype="float32", kernel="reference_linear")
    layer = model.get_submodule(UP)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    given = x * parts.get("pre_quant_scale", torch.ones(COLUMNS))
    if Scheme.parse(scheme).input is None:
        assert torch.allclose(layer(x), given @ weight.t(), atol=1e-5)
    assert bool(layer(x).isfinite().all())


def test_without_an_input_scale_activations_stay_whole(tmp_path: Path) -> None:
    parts, _, _ = made("FP8")
    del parts["input_scale"]
    assert str(qcore.open_checkpoint(checkpoint(tmp_path, parts, "FP8")).plan[UP]) == "W8A16-fp8-tensor"


def test_mixed_layers(tmp_path: Path) -> None:
    parts, weight, scheme = made("W4A16_AWQ")
    layers = {UP: {"quant_algo": "W4A16_AWQ", "group_size": 32}}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, "MIXED_PRECISION", quantized_layers=layers))
    assert str(opened.plan[UP]) == scheme and torch.equal(opened.dequantize(UP), weight)
    with pytest.raises(qcore.Refused, match="unknown-variant"):
        qcore.open_checkpoint(checkpoint(tmp_path / "2", parts, "MIXED_PRECISION", quantized_layers={}))


def test_nvfp4_groups_are_those_of_its_scales(tmp_path: Path) -> None:
    parts, _, _ = made("W4A16_NVFP4")
    parts["weight_scale"] = parts["weight_scale"][:, ::2]
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, "W4A16_NVFP4"))
    assert str(opened.plan[UP]) == "W4A16-e2m1-g32:e4m3fn+tensor"
    assert opened.weight(UP).scheme == opened.plan[UP] and opened.dequantize(UP).isfinite().all()


@pytest.mark.parametrize(("side", "grid"), [(128, (1, 1, 1, 1)), (64, (2, 1)), (16, (6, 4))])
def test_blocks_are_those_of_their_scales(tmp_path: Path, side: int, grid: tuple[int, ...]) -> None:
    parts, _, _ = made("FP8_PB_WO")
    parts["weight_scale"] = torch.rand(grid, generator=torch.Generator().manual_seed(0)) + 0.1
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, "fp8_pb_wo" if len(grid) == 4 else "fp8_pb_real"))
    assert str(opened.plan[UP]) == f"W8A16-fp8-block{side}"
    scale = parts["weight_scale"].reshape(grid[0], -1).repeat_interleave(side, 0).repeat_interleave(side, 1)
    assert torch.equal(opened.dequantize(UP), parts["weight"].float() * scale[:ROWS, :COLUMNS])


def test_mx_groups_are_of_32_whatever_the_scales(tmp_path: Path) -> None:
    """ModelOpt writes scales of its packed bytes where a compressed model is exported; these are no weights."""
    parts, _, _ = made("MXFP4")
    parts["weight_scale"] = parts["weight_scale"][:, :1]
    with pytest.raises(qcore.Refused, match="bad-shape"):
        qcore.open_checkpoint(checkpoint(tmp_path, parts, "mxfp4"))


def test_channels_with_a_calibrated_input_have_a_static_one(tmp_path: Path) -> None:
    parts, _, _ = made("FP8_PER_CHANNEL_PER_TOKEN")
    parts["input_scale"] = torch.tensor(0.5)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, "FP8_PER_CHANNEL_PER_TOKEN"))
    assert str(opened.plan[UP]) == "W8A8-fp8-channel/fp8-tensor"
    assert opened.layer(UP).input_scale == torch.tensor([0.5])


def test_mxfp4_with_fp8_inputs_finds_their_range_at_run_time(tmp_path: Path) -> None:
    parts, _, _ = made("W4A8_MXFP4_FP8")
    del parts["input_scale"]
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, "W4A8_MXFP4_FP8"))
    assert str(opened.plan[UP]) == "W4A8-e2m1-g32:e8m0/fp8-tensor-dyn"


def test_algorithms_in_lower_case_are_the_same(tmp_path: Path) -> None:
    """ModelOpt writes its own word where it has no name for one: `mxfp4`, `fp8_pb_wo`."""
    parts, weight, scheme = made("MXFP4")
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, "mxfp4"))
    assert opened.plan[UP] == Scheme.parse(scheme) and torch.equal(opened.dequantize(UP), weight)


def test_a_quantized_kv_cache_is_told(tmp_path: Path) -> None:
    parts, _, _ = made("FP8")
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, "FP8", kv_cache_quant_algo="FP8"))
    assert str(opened.kv_cache) == "fp8-tensor"


def test_the_tools_own_int4_model_is_as_near_to_the_base_as_the_tool_says() -> None:
    """ModelOpt folds scales while it exports, so that weights cannot be compared one by one; logits can."""
    from safetensors.torch import load_file

    path = GOLDEN / "modelopt-int4-awq"
    expected = load_file(path / "expected.safetensors")
    assert qcore.open_checkpoint(path).layer("model.layers.0.mlp.down_proj").input_multiplier is not None
    with torch.inference_mode():
        ours, base = (
            qcore.load_model(p, dtype="float32")(expected["input_ids"]).logits for p in (path, GOLDEN / "base")
        )

    def divergence(of: torch.Tensor) -> float:
        return float((base.log_softmax(-1).exp() * (base.log_softmax(-1) - of.float().log_softmax(-1))).sum(-1).mean())

    assert 0 < divergence(ours) < 1.1 * divergence(expected["logits"])


@pytest.mark.parametrize(
    ("algorithm", "change", "code"),
    [
        ("FP8", {"weight_scale": torch.zeros(2)}, "bad-shape"),
        ("FP8", {"weight_scale": torch.tensor(float("nan"))}, "bad-content"),
        ("FP8", {"input_scale": torch.zeros(3)}, "bad-shape"),
        ("FP8", {"weight": torch.zeros(ROWS, COLUMNS, dtype=torch.int8)}, "bad-dtype"),
        ("FP8", {"mystery": torch.zeros(3)}, "unexpected-tensor"),
        ("FP8_PER_CHANNEL_PER_TOKEN", {"weight_scale": torch.zeros(COLUMNS)}, "bad-shape"),
        ("FP8_PB_WO", {"weight_scale": torch.zeros(5, 1, 1, 1)}, "bad-shape"),
        ("W4A16_NVFP4", {"weight_scale_2": None}, "missing-tensor"),
        ("W4A16_NVFP4", {"weight_scale": torch.zeros(ROWS, 4)}, "bad-dtype"),
        ("W4A16_AWQ", {"weight_scale": torch.zeros(ROWS, 3)}, "bad-shape"),
        ("W4A16_AWQ", {"pre_quant_scale": torch.zeros(3)}, "bad-shape"),
        ("W4A16_AWQ", {"weight": torch.zeros(ROWS, dtype=torch.uint8)}, "bad-shape"),
        ("NVFP4_SVD", {}, "unknown-variant"),
        ("ABACUS", {}, "unknown-variant"),
    ],
)
def test_what_is_broken_or_not_read_is_refused(
    tmp_path: Path, algorithm: str, change: dict[str, torch.Tensor | None], code: str
) -> None:
    parts, _, _ = made(algorithm if algorithm in ALGORITHMS else "FP8")
    whole = {part: tensor for part, tensor in {**parts, **change}.items() if tensor is not None}
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(checkpoint(tmp_path, whole, algorithm)).dequantize(UP)
    assert caught.value.refusal.code == code and caught.value.refusal.fix


def test_a_config_without_quantized_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(qcore.Refused, match="missing-tensor"):
        qcore.open_checkpoint(write(tmp_path, dense_llama(), {"quant_method": "modelopt", "quant_algo": "FP8"}))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_written(tmp_path: Path, algorithm: str) -> None:
    """As it was: tensors, both configs, and what is read from them."""
    parts, weight, _ = made(algorithm)
    path = checkpoint(tmp_path / "a", parts | {"bias": torch.ones(ROWS)}, algorithm)
    written = convert(path, f"modelopt:{algorithm}", tmp_path / "b")
    first, opened = qcore.open_checkpoint(path), qcore.open_checkpoint(written)
    assert opened.plan == first.plan and torch.equal(opened.dequantize(UP), weight)
    for part, tensor in parts.items():
        again = opened.files.source.read(f"{UP}.{part}")
        assert again.dtype == tensor.dtype and (
            part == "weight_scale_2" or torch.equal(again.float(), tensor.float())
        ), part
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    side = json.loads((written / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"].upper() == side["quant_algo"].upper() == algorithm
    assert side["exclude_modules"] == config["ignore"] and "lm_head" in config["ignore"]
    (written / "config.json").write_text(json.dumps({**opened.config}))
    assert qcore.open_checkpoint(written).plan == first.plan  # the side file alone says as much


def test_mixed_layers_are_written(tmp_path: Path) -> None:
    """Two algorithms, and one with two group sizes."""
    down = "model.layers.0.mlp.down_proj"
    tensors = dense_llama()
    del tensors[f"{UP}.weight"], tensors[f"{down}.weight"]
    tensors |= {f"{UP}.{part}": tensor for part, tensor in made("W4A16_AWQ")[0].items()}
    nibbles = torch.randint(0, 256, (32, 96), dtype=torch.uint8)
    tensors |= {f"{down}.weight": nibbles, f"{down}.weight_scale": torch.rand(64, 2)}
    layers = {UP: {"quant_algo": "W4A16_AWQ"}, down: {"quant_algo": "W4A16_AWQ"}}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    first = qcore.open_checkpoint(write(tmp_path / "a", tensors, config))
    opened = qcore.open_checkpoint(convert(first.path, "modelopt", tmp_path / "b"))
    assert opened.plan == first.plan and torch.equal(opened.dequantize(down), first.dequantize(down))
    stated = json.loads((opened.path / "config.json").read_text())["quantization_config"]
    assert {name: layer["group_size"] for name, layer in stated["quantized_layers"].items()} == {UP: 32, down: 48}
    assert [group["targets"] for group in stated["config_groups"].values()] in ([[UP], [down]], [[down], [UP]])


def test_a_tied_head_and_a_kv_cache_are_written(tmp_path: Path) -> None:
    tensors = dense_llama(tie_word_embeddings=True)
    del tensors[f"{UP}.weight"]
    tensors |= {f"{UP}.{part}": tensor for part, tensor in made("FP8")[0].items()}
    attention = "model.layers.0.self_attn"
    tensors |= {f"{attention}.{p}_proj.{p}_scale": torch.tensor(0.25) for p in "kv"}
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    path = write(tmp_path / "a", tensors, config, tie_word_embeddings=True)
    opened = qcore.open_checkpoint(convert(path, "modelopt", tmp_path / "b"))
    assert str(opened.kv_cache) == "fp8-tensor" and opened.kv_scales[attention].k.scale.tolist() == [0.25]
    cache = qcore.load_model(opened, dtype="float32")(torch.tensor([[1, 5, 9]]), use_cache=True).past_key_values
    assert all(torch.equal(side.inverse, torch.tensor([4.0])) for side in cache.layers[0].rounding)  # ModelOpt's order
    side = json.loads((opened.path / "hf_quant_config.json").read_text())["quantization"]
    assert side["kv_cache_quant_algo"] == "FP8" and "lm_head" in side["exclude_modules"]


@pytest.mark.parametrize(
    ("algorithm", "format", "told"),
    [
        ("NVFP4_AWQ", "modelopt", "NVFP4_AWQ"),  # under NVFP4, which the scheme means, nobody would multiply
        ("FP8", "modelopt:NVFP4", "what NVFP4 stands for"),
        ("FP8", "modelopt:ABACUS", "no such variant"),
    ],
)
def test_what_modelopt_cannot_hold_is_refused(tmp_path: Path, algorithm: str, format: str, told: str) -> None:
    parts, _, _ = made(algorithm)
    with pytest.raises(qcore.Refused, match=told):
        convert(checkpoint(tmp_path / "a", parts, algorithm), format, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("how", ["W4A16-g32-asym", "W8A16-g32-sym", "INT8"])
def test_schemes_that_modelopt_has_no_algorithm_for_are_refused(tmp_path: Path, how: str) -> None:
    source = qcore.open_checkpoint(write(tmp_path / "a", dense_llama())).quantized(how)
    with pytest.raises(qcore.Refused, match="not-representable"):
        convert(source, "modelopt", tmp_path / "b")
