"""INC's fp8: saved models, models with measurements or scales beside them, every scale method, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qcore
import test_auto_round
from makers import LINEARS, dense_llama, write
from qcore.convert import convert
from qcore.model.kv_cache import kv_cache_of
from qcore.scheme import Scheme

UP, QUERY = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
ALL = [*(f"model.layers.0.{name}" for name in LINEARS), "lm_head"]
CONFIG = {
    "method": "HOOKS", "mode": "QUANTIZE", "observer": "maxabs", "scale_method": "maxabs_hw", "fp8_config": "E4M3",
    "allowlist": {"types": [], "names": []}, "blocklist": {"types": [], "names": ["lm_head"]},
    "dump_stats_path": "./output/measure",
}  # fmt: skip
SAVED = {**CONFIG, "mode": "LOAD", "world_size": 0, "scale_format": "scalar", "hp_dtype": "bf16"}


def nodes(largest: float = 3.0, layers: list[str] = ALL) -> dict[str, Any]:
    return {layer: {"inputs": [[[largest]]], "params": {"weight": [[0.5]]}} for layer in layers}


def measured(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, found: dict[str, Any] | None = None,
    name: str = "measure_hooks_maxabs.json", *, stated: bool = False, **config: Any
) -> Path:  # fmt: skip
    """Plain weights with measurements; stated: QUANT_CONFIG stands in config.json, and up_proj is in bfloat16."""
    tensors = tensors or dense_llama()
    if stated:
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.bfloat16)
    path = write(folder, tensors, {**CONFIG, **config} if stated else None)
    if not stated:
        (path / "quant_config.json").write_text(json.dumps({**CONFIG, **config}))
    if name:
        text = {
            "GlobalRank": None,
            "LocalRank": None,
            "Mode": "DynamicRange",
            "Nodes": nodes() if found is None else found,
        }
        (path / name).write_text(json.dumps(text))
    return path


def saved(
    folder: Path, change: dict[str, torch.Tensor | None] | None = None, *, channels: bool = False, **config: Any
) -> Path:
    """A model as INC saves it: up_proj and q_proj in fp8, transposed, and scales of the cache."""
    tensors = dense_llama()
    for module in (UP, QUERY):
        weight = tensors[f"{module}.weight"].to(torch.bfloat16)
        scale = (torch.arange(weight.shape[0]) % 3 + 1.0) / 64 if channels else torch.tensor(1 / 64)
        tensors[f"{module}.weight"] = (weight.float() / scale.reshape(-1, 1)).to(torch.float8_e4m3fn).t().contiguous()
        tensors[f"{module}.scale_weight"] = scale.to(torch.bfloat16)
        tensors[f"{module}.scale_input"] = torch.tensor(0.25, dtype=torch.bfloat16)
        tensors[f"{module}.quant_input.scale_inv"] = torch.tensor(4.0, dtype=torch.bfloat16)
    for cache in ("k", "v"):
        for part in ("quant_input.scale_inv", "dequant_output.scale"):
            tensors[f"model.layers.0.self_attn.{cache}_cache.{part}"] = torch.tensor(1.0)
    tensors |= {name: tensor for name, tensor in (change or {}).items() if tensor is not None}
    for name in (name for name, tensor in (change or {}).items() if tensor is None):
        del tensors[name]
    return write(folder, tensors, {**SAVED, **config})


@pytest.mark.parametrize("channels", [False, True])
def test_a_saved_model_is_exact_and_runs(tmp_path: Path, channels: bool) -> None:
    opened = qcore.open_checkpoint(saved(tmp_path, channels=channels))
    assert (opened.method, opened.format_version) == ("inc", "saved MAXABS_HW")
    grid = "channel" if channels else "tensor"
    assert opened.plan[UP] == Scheme.parse(f"W8A8-fp8-{grid}/fp8-tensor") == opened.weight(UP).scheme
    assert str(opened.kv_cache) == "fp8-tensor"
    for module, rows in ((UP, 96), (QUERY, 64)):  # q_proj is square: nothing but the format says that it is transposed
        scale = (torch.arange(rows) % 3 + 1.0).reshape(-1, 1) / 64 if channels else torch.tensor(1 / 64)
        plain = dense_llama()[f"{module}.weight"].to(torch.bfloat16).float()
        assert torch.equal(
            opened.dequantize(module), (plain / scale).to(torch.float8_e4m3fn).float() * scale.bfloat16().float()
        )
    assert opened.layer(UP).input_scale == torch.tensor([0.25])
    logits = qcore.load_model(opened, dtype="float32")(torch.tensor([[1, 5, 9]])).logits
    plain = dense_llama() | {f"{m}.weight": opened.dequantize(m) for m in (UP, QUERY)}
    whole = qcore.load_model(write(tmp_path / "plain", plain), dtype="float32")(torch.tensor([[1, 5, 9]])).logits
    assert float((logits - whole).norm() / whole.norm()) < 0.05


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("form", ["saved", "qdq"])
def test_a_saved_model_is_written(tmp_path: Path, channels: bool, form: str) -> None:
    """As a Gaudi saves it, and as a CPU does: the same scales under other names."""
    first = qcore.open_checkpoint(saved(tmp_path / "a", channels=channels))
    opened = qcore.open_checkpoint(convert(first.path, f"inc:{form}", tmp_path / "b"))
    assert (
        opened.plan == first.plan
        and opened.kv_cache == first.kv_cache
        and opened.kv_scales.keys() == first.kv_scales.keys()
    )
    assert opened.format_version.startswith(f"{form} ")
    names = {"saved": ("scale_weight", "scale_input"), "qdq": ("dequant_weights.scale", "quant_input.scale")}
    read, before = opened.files.source.read, first.files.source.read
    for module in (UP, QUERY):
        for ours, theirs in zip(names[form], names["saved"], strict=True):
            assert torch.equal(read(f"{module}.{ours}").float(), before(f"{module}.{theirs}").float())
        assert torch.equal(read(f"{module}.weight").float(), before(f"{module}.weight").float())
        assert read(f"{module}.quant_input.scale_inv") == 4
    stated = json.loads((opened.path / "quantization_config.json").read_text())
    assert stated["mode"] == "LOAD" and "lm_head" in stated["blocklist"]["names"]
    logits = [qcore.load_model(c, dtype="float32")(torch.tensor([[1, 5, 9]])).logits for c in (first, opened)]
    assert torch.equal(*logits)


def test_weights_in_fp8_without_a_scale_are_refused(tmp_path: Path) -> None:
    path = convert(saved(tmp_path / "a"), "inc:qdq", tmp_path / "b")
    tensors = load_file(path / "model.safetensors")
    tensors[f"{UP}.dequant_weights.zero_point"] = torch.tensor(1.0)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(qcore.Refused, match="bad-content"):
        qcore.open_checkpoint(path)
    del tensors[f"{UP}.dequant_weights.zero_point"], tensors[f"{UP}.dequant_weights.scale"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(qcore.Refused, match="missing-tensor"):
        qcore.open_checkpoint(path)


@pytest.mark.parametrize("how", ["FP8_DYNAMIC", "W4A16-g32-sym", "W8A16-fp8-tensor"])
def test_what_inc_does_not_save_is_refused(tmp_path: Path, how: str) -> None:
    source = qcore.open_checkpoint(write(tmp_path / "a", dense_llama())).quantized(how)
    with pytest.raises(qcore.Refused, match="not-representable"):
        convert(source, "inc", tmp_path / "b")


def test_a_saved_models_config_may_stand_beside_it(tmp_path: Path) -> None:
    path = saved(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "quantization_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (path / "config.json").write_text(json.dumps(config))
    assert qcore.open_checkpoint(path).method == "inc"


def up_to_power(value: float, step: int = 1) -> float:
    return 2.0 ** (math.ceil(math.log2(value) / step) * step)


@pytest.mark.parametrize(
    ("method", "device", "largest", "scales"),
    [
        ("UNIT_SCALE", None, 3.0, (1.0, 1.0)),
        ("HW_ALIGNED_SINGLE_SCALE", None, 3.0, (128.0, 128.0)),
        ("HW_ALIGNED_SINGLE_SCALE", "GAUDI2", 3.0, (16.0, 16.0)),
        ("maxabs_hw", None, 3.0, (2.0**-9, 2.0**-5)),
        ("maxabs_hw", "GAUDI3", 3.0, (2.0**-9, 2.0**-5)),
        ("maxabs_hw", "gaudi2", 3.0, (2.0**-8, 2.0**-4)),
        ("maxabs_hw", "GAUDI2", 3000.0, (2.0**-8, 16.0)),
        ("maxabs_pow2", "GAUDI2", 3.0, (2.0**-8, 2.0**-4)),
        ("maxabs_pow2", None, 7.0, (2.0**-9, 2.0**-4)),
        ("maxabs_arbitrary", None, 3.0, (0.408203125 / 224, 3 / 112)),
    ],
)
def test_every_scale_method(
    tmp_path: Path, method: str, device: str | None, largest: float, scales: tuple[float, float]
) -> None:
    """The weight's largest magnitude is 0.408203125 in bfloat16; weights use half of the range, inputs a quarter."""
    plain = dense_llama()
    weight = plain[f"{UP}.weight"].to(torch.bfloat16)
    weight = (weight.float() * (0.408203125 / weight.abs().max().float())).to(torch.bfloat16)
    plain[f"{UP}.weight"] = weight
    config = {"device_for_scales": device} if device else {}
    opened = qcore.open_checkpoint(measured(tmp_path, plain, nodes(largest), scale_method=method, **config))
    assert opened.plan[UP] == Scheme.parse("W8A8-fp8-static") and opened.plan["lm_head"] is None
    layer = opened.layer(UP)
    want = [torch.tensor(scale).to(torch.bfloat16).float() for scale in scales]
    assert float(layer.weight.scales[0]) == want[0] and float(layer.input_scale) == want[1]  # type: ignore[arg-type]
    top = 240.0 if device and device.upper() == "GAUDI2" else 448.0
    inverse = (1 / want[0]).to(torch.bfloat16).float()
    codes = (weight.float() * inverse).clamp(-top, top).to(torch.float8_e4m3fn)
    assert torch.equal(layer.weight.codes.float(), codes.float())


def test_scales_by_output_channel(tmp_path: Path) -> None:
    opened = qcore.open_checkpoint(measured(tmp_path, scale_method="ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2"))
    assert opened.plan[UP] == Scheme.parse("W8A8-fp8-channel/fp8-tensor")
    layer, weight = opened.layer(UP), dense_llama()[f"{UP}.weight"].to(torch.bfloat16)
    for row in (0, 50):
        assert float(layer.weight.scales[0][row]) == up_to_power(float(weight[row].abs().max()) / 224)
    assert float((layer.weight.dequantize() - weight.float()).norm() / weight.float().norm()) < 0.04


def test_a_measured_model_runs(tmp_path: Path) -> None:
    opened = qcore.open_checkpoint(measured(tmp_path, found=nodes(8.0)))
    assert (opened.method, opened.format_version) == ("inc", "measured MAXABS_HW")
    logits = qcore.load_model(opened, dtype="float32")(torch.tensor([[1, 5, 9]])).logits
    whole = qcore.load_model(write(tmp_path / "plain", dense_llama()), dtype="float32")(
        torch.tensor([[1, 5, 9]])
    ).logits
    assert 0 < float((logits - whole).norm() / whole.norm()) < 0.09


@pytest.mark.parametrize("name", ["output/measure_hooks_maxabs.json", "measure_hooks_maxabs.json"])
def test_measurements_are_found_where_the_config_says_and_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "output").mkdir()
    assert float(qcore.open_checkpoint(measured(tmp_path, name=name)).layer(UP).input_scale) == 2.0**-5  # type: ignore[arg-type]


def test_the_largest_of_several_ranks_counts(tmp_path: Path) -> None:
    path = measured(tmp_path, name="measure_hooks_maxabs_0_2.json")
    (path / "measure_hooks_maxabs_1_2.json").write_text(json.dumps({"Nodes": nodes(12.0)}))
    assert float(qcore.open_checkpoint(path).layer(UP).input_scale) == 2.0**-3  # type: ignore[arg-type]


def test_scale_files_come_before_measurements(tmp_path: Path) -> None:
    path = measured(tmp_path)
    scales = {layer: {"inputs": [0.5], "outputs": [0.125], "params": {"weight": 0.25}} for layer in ALL}
    (path / "measure_hooks_maxabs_MAXABS_HW.json").write_text(json.dumps({"Mode": "Scale", "Nodes": scales}))
    layer = qcore.open_checkpoint(path).layer(UP)
    assert (float(layer.input_scale), float(layer.weight.scales[0])) == (0.5, 0.25)  # type: ignore[arg-type]
    again = json.loads((path / "quant_config.json").read_text()) | {"recalc_scales": True}
    (path / "quant_config.json").write_text(json.dumps(again))
    assert float(qcore.open_checkpoint(path).layer(UP).input_scale) == 2.0**-5  # type: ignore[arg-type]


def test_scale_files_by_output_channel(tmp_path: Path) -> None:
    method = "ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2"
    path = measured(tmp_path, scale_method=method)
    weight = {"0": [0.5] * 96, "1": [1.0] * 64}
    found = nodes() | {UP: {"inputs": [0.5], "params": {"weight": weight}}}
    (path / f"measure_hooks_maxabs_{method}.json").write_text(json.dumps({"Nodes": found}))
    assert qcore.open_checkpoint(path).weight(UP).scales[0].tolist() == [[0.5]] * 96
    weight["1"][3] = 2.0
    (path / f"measure_hooks_maxabs_{method}.json").write_text(json.dumps({"Nodes": found}))
    with pytest.raises(qcore.Refused, match="bad-field"):
        qcore.open_checkpoint(path).weight(UP)


def test_layers_that_were_measured_as_one_share_a_scale(tmp_path: Path) -> None:
    layers = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    homes = ["self_attn", "self_attn", "mlp", "mlp"]
    found = {f"model.layers.0.{home}.{layer}": {"inputs": [[[3.0]]], "params": {"weight": [[1.75]]}}
             for home, layer in zip(homes, layers, strict=True)}  # fmt: skip
    opened = qcore.open_checkpoint(measured(tmp_path, found=found))
    assert float(opened.weight(UP).scales[0]) == up_to_power(1.75 / 224)
    assert float(opened.weight("model.layers.0.mlp.down_proj").scales[0]) < up_to_power(1.75 / 224)


@pytest.mark.parametrize("home", ["self_attn", "self_attn.attn", "self_attn.attn.impl"])
def test_a_measured_cache_is_declared_and_its_scales_are_those_of_inputs(tmp_path: Path, home: str) -> None:
    largest = {"k": 3.0, "v": 8.0}
    found = nodes() | {f"model.layers.0.{home}.{part}_cache": {"inputs": [[[x]]]} for part, x in largest.items()}
    opened = qcore.open_checkpoint(measured(tmp_path / "a", found=found))
    assert str(opened.kv_cache) == "fp8-tensor"
    own = opened.kv_scales["model.layers.0.self_attn"]
    assert (own.k.scale.tolist(), own.v.scale.tolist()) == ([up_to_power(3 / 112)], [up_to_power(8 / 112)])
    model = qcore.load_model(opened, dtype="float32")
    assert str(kv_cache_of(model)) == "fp8-tensor"
    again = qcore.open_checkpoint(convert(opened, "inc", tmp_path / "b"))
    assert again.kv_cache == opened.kv_cache and again.kv_scales["model.layers.0.self_attn"].v.scale == own.v.scale
    (opened.path / "measure_hooks_maxabs_MAXABS_HW.json").write_text(
        json.dumps({"Nodes": nodes(0.5) | {f"model.layers.0.{home}.k_cache": {"inputs": [0.25]}}})
    )
    own = qcore.open_checkpoint(opened.path).kv_scales["model.layers.0.self_attn"]
    assert own.k.scale.tolist() == own.v.scale.tolist() == [0.25]


@pytest.mark.parametrize(
    ("config", "cached"),
    [
        ({"blocklist": {"types": ["KVCache"]}}, False),
        ({"blocklist": {"names": ["lm_head", "k_cache", "v_cache"]}}, False),
        ({"allowlist": {"types": ["Linear"]}}, False),
        ({"allowlist": {"types": ["Linear", "VLLMKVCache"]}}, True),
        ({"allowlist": {"names": ["self_attn"]}}, True),
    ],
)
def test_lists_choose_caches(tmp_path: Path, config: dict[str, Any], cached: bool) -> None:
    found = nodes() | {f"model.layers.0.self_attn.{part}_cache": {"inputs": [[[3.0]]]} for part in "kv"}
    opened = qcore.open_checkpoint(measured(tmp_path, found=found, **config))
    assert (opened.kv_cache is not None) == bool(opened.kv_scales) == cached


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"blocklist": {"names": ["lm_head", "mlp"]}}, True),
        ({"blacklist": {"names": ["lm_head", "up"]}, "blocklist": None}, True),
        ({"allowlist": {"names": ["self_attn"]}}, True),
        ({"allowlist": {"names": ["mlp"]}}, False),
        ({"allowlist": {"types": ["Matmul"]}}, True),
        ({"allowlist": {"types": ["Matmul", "RowParallelLinear"]}}, False),
        ({"blocklist": {"types": ["Linear"]}}, True),
    ],
)
def test_lists_choose_layers(tmp_path: Path, config: dict[str, Any], kept: bool) -> None:
    given = {key: value for key, value in config.items() if value is not None}
    path = measured(tmp_path, **given)
    stated = json.loads((path / "quant_config.json").read_text())
    for key in [key for key, value in config.items() if value is None]:
        del stated[key]
    (path / "quant_config.json").write_text(json.dumps(stated))
    assert (qcore.open_checkpoint(path).plan[UP] is None) == kept


def test_layers_without_measurements_are_refused_or_kept(tmp_path: Path) -> None:
    found = nodes(layers=[layer for layer in ALL if layer != UP])
    with pytest.raises(qcore.Refused, match="bad-field"):
        qcore.open_checkpoint(measured(tmp_path, found=found))
    opened = qcore.open_checkpoint(measured(tmp_path, found=found, ignore_modules_wo_measures="True"))
    assert opened.plan[UP] is None and opened.plan[QUERY] is not None


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"mode": "MEASURE"}, "unknown-variant"),
        ({"observer": "shape"}, "unknown-variant"),
        ({"scale_method": "MAXABS_PCS_POW2"}, "unknown-variant"),
        ({"scale_method": "SMOOTHQUANT_OPT"}, "unknown-variant"),
        ({"scale_method": {"default": "maxabs_hw"}}, "unknown-variant"),
        ({"device_for_scales": "ABACUS"}, "unknown-variant"),
        ({"dynamic_quantization": True}, "unknown-variant"),
        ({"dynamic_quantization": True, "scale_method": "UNIT_SCALE"}, "unknown-variant"),
        ({"scale_params": {"input_backoff": 0.5}}, "unknown-variant"),
        ({"scale_params": 3}, "bad-field"),
        ({"fp8_config": "E3M4"}, "bad-field"),
        ({"blocklist": {"names": ["re:("]}}, "bad-field"),
        ({"dump_stats_path": "../../elsewhere"}, "path-not-found"),
        ({"dump_stats_path": "x" * 5000 + "/measures"}, "path-not-found"),
    ],
)
def test_configs_that_are_not_read_are_refused(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(measured(tmp_path, **config))
    assert caught.value.refusal.code == code and caught.value.refusal.fix


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({UP: 3}, "bad-field"),
        ({UP: {"inputs": [[["3"]]]}}, "bad-content"),
        ({UP: {"inputs": [[[-1.0]]]}}, "bad-content"),
        ({UP: {"inputs": [[[float("nan")]]]}}, "bad-content"),
        ({UP: {"inputs": [[[True]]]}}, "bad-content"),
        ({UP: {"inputs": [[[10**400]]]}}, "bad-content"),
        ({UP: {"inputs": []}}, "bad-field"),
        ([], "bad-field"),
    ],
)
def test_measurements_that_are_none_are_refused(tmp_path: Path, found: Any, code: str) -> None:
    content = nodes() | found if isinstance(found, dict) else found
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(measured(tmp_path, found=content))
    assert caught.value.refusal.code == code and caught.value.refusal.fix


def test_pickled_measurements_are_never_opened(tmp_path: Path) -> None:
    path = measured(tmp_path, name="")
    (path / "measure_hooks_maxabs.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(path)
    assert caught.value.refusal.code == "unsafe-container" and "json" in caught.value.refusal.fix
    (path / "measure_hooks_maxabs.json").write_text(json.dumps({"Nodes": nodes()}))
    assert qcore.open_checkpoint(path).plan[UP] is not None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({f"{UP}.scale_input": None}, "missing-tensor"),
        ({f"{UP}.weight": None}, "missing-tensor"),
        ({f"{UP}.weight": torch.zeros(64, 96)}, "bad-dtype"),
        ({f"{UP}.scale_weight": torch.ones(64)}, "bad-shape"),
        ({f"{UP}.scale_input": torch.ones(2)}, "bad-shape"),
        ({f"{UP}.scale_weight": torch.tensor(float("nan"))}, "bad-content"),
        ({f"{UP}.mystery": torch.ones(2)}, "unexpected-tensor"),
        ({f"{UP}.weight_0_2": torch.ones(2)}, "unknown-variant"),
    ],
)
def test_saved_models_that_are_broken_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], code: str
) -> None:
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(saved(tmp_path, change)).weight(UP)
    assert caught.value.refusal.code == code and caught.value.refusal.fix


def test_incs_name_over_autorounds_keys_is_autoround(tmp_path: Path) -> None:
    parts = {test_auto_round.UP: test_auto_round.layer(test_auto_round.UP, 4, 32, "auto_round", sym=False)[0]}
    path = test_auto_round.checkpoint(tmp_path, parts, packing_format="auto_round", quant_method="inc")
    assert qcore.open_checkpoint(path).method == "auto-round"


def test_incs_codebooks_under_gptqs_name_are_refused(tmp_path: Path) -> None:
    tensors = dense_llama()
    del tensors[f"{UP}.weight"]
    tensors |= {f"{UP}.qweight": torch.zeros(96, 8, dtype=torch.int32), f"{UP}.scales": torch.ones(96, 2)}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    with pytest.raises(qcore.Refused, match="nf4"):
        qcore.open_checkpoint(write(tmp_path, tensors, config))


@pytest.mark.parametrize(
    "way", ["a/" * 3000 + "x", "/etc/x", "../x", "a/../../x", "out/x", "loop/x", "x" * 5000, "a\0/x"]
)
def test_measurements_are_only_looked_for_in_the_folder(tmp_path: Path, way: str) -> None:
    path = measured(tmp_path / "model", dump_stats_path=way)
    for file in path.glob("*_hooks_*"):
        file.unlink()
    (tmp_path / "x_hooks_maxabs.json").write_text(json.dumps({"Nodes": nodes()}))
    (path / "out").symlink_to(tmp_path)
    (path / "loop").symlink_to("loop")
    with pytest.raises(qcore.Refused, match="path-not-found"):
        _ = qcore.open_checkpoint(path).plan
