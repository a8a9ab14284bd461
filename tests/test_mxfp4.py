"""gpt-oss's mxfp4: its stacked experts against transformers' own reader and model, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qcore
from makers import dense_llama, write
from mixtures import EXPERTS, HIDDEN, INNER, TOKENS, Mixture, Tensors, logits
from qcore.cli.inspect import describe
from qcore.convert import convert
from qcore.model.experts import QuantizedExperts
from qcore.model.load import kernel_counts

CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
EXPERTS_0 = "model.layers.0.mlp.experts"
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def quantized(mixture: Mixture, **changes: torch.Tensor | None) -> Tensors:
    """The checkpoint's tensors; the mixture's weights follow. changes: tensors of layer 0's experts, replaced."""
    tensors = dict(mixture.rest)
    for name in mixture.rest:
        if not name.endswith("_proj") or "experts" not in name:
            continue
        count, columns, rows = tensors.pop(name).shape  # transformers holds them transposed
        codes = torch.randint(0, 16, (count, rows, columns))
        scales = torch.randint(120, 126, (count, rows, columns // 32), dtype=torch.uint8)
        low, high = codes.unflatten(2, (-1, 2)).unbind(3)
        blocks = (low | high << 4).to(torch.uint8).unflatten(2, (-1, 16))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[f"{name}_bias"] = mixture.rest[f"{name}_bias"] = mixture.rest[f"{name}_bias"].bfloat16().float()
        weight = torch.tensor(VALUES + [-value for value in VALUES])[codes]
        weight = weight * torch.exp2(scales.float() - 127).repeat_interleave(32, 2)
        mixture.rest[name] = weight.transpose(1, 2).contiguous()
    for part, tensor in changes.items():
        tensors.pop(f"{EXPERTS_0}.{part}", None)
        if tensor is not None:
            tensors[f"{EXPERTS_0}.{part}"] = tensor
    return tensors


def refused(path: Path) -> qcore.Refusal:
    with pytest.raises(qcore.Refused) as caught:
        qcore.load_model(path)
    return caught.value.refusal


def test_experts_are_exact_and_run(tmp_path: Path) -> None:
    mixture = Mixture("gpt_oss")
    tensors = quantized(mixture)
    path = mixture.write(tmp_path, tensors, CONFIG)
    opened = qcore.open_checkpoint(path)
    assert opened.method == "mxfp4"
    assert opened.layers[f"{EXPERTS_0}.gate_up_proj"].shape == (EXPERTS, 2 * INNER, HIDDEN)
    for module, scheme in opened.plan.items():
        assert str(scheme) == ("W4A16-mxfp4" if "experts" in module else "None")
        if scheme is not None:
            theirs = convert_moe_packed_tensors(tensors[f"{module}_blocks"], tensors[f"{module}_scales"])
            assert torch.equal(opened.dequantize(module), theirs.float().transpose(1, 2))
            assert torch.equal(opened.dequantize(module), mixture.rest[module].transpose(1, 2))
            assert opened.weight(module).shape == opened.layers[module].shape
    model = qcore.load_model(path)
    expected = mixture.logits()
    assert expected.std() > 0.05
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model.model.layers[1].mlp.experts, QuantizedExperts)
    assert sum(kernel_counts(model).values()) == 2 * 2 * EXPERTS
    with torch.inference_mode():
        text = model.generate(TOKENS, max_new_tokens=5, do_sample=False)
        assert torch.equal(text, mixture.model.generate(TOKENS, max_new_tokens=5, do_sample=False))


def test_the_clamp_is_the_models(tmp_path: Path) -> None:
    mixture = Mixture("gpt_oss", swiglu_limit=0.5)
    path = mixture.write(tmp_path, quantized(mixture), CONFIG)
    torch.testing.assert_close(logits(qcore.load_model(path)), mixture.logits(), rtol=1e-4, atol=1e-5)


def test_inspect_and_explain_count_every_expert(tmp_path: Path) -> None:
    mixture = Mixture("gpt_oss")
    path = mixture.write(tmp_path, quantized(mixture), CONFIG)
    document = describe(qcore.open_checkpoint(path))
    beside = [f"{module}_bias" for module in mixture.rest if f"{module}_bias" in mixture.rest and "experts" in module]
    counted = [tensor.numel() for name, tensor in mixture.rest.items() if name not in beside]
    assert document["parameters"] == sum(counted)
    assert document["schemes"]["W4A16-mxfp4"] == 4
    layers = {layer.module: layer for layer in qcore.explain(path, dtype="float32").layers}
    chosen = layers[f"{EXPERTS_0}.down_proj"].selection
    assert chosen is not None and chosen.kernel is not None
    assert layers["model.layers.0.mlp.router"].reason == "only experts are quantized"


@pytest.mark.parametrize(
    ("code", "tensor", "changes"),
    [
        ("missing-tensor", "gate_up_proj_scales", {"gate_up_proj_scales": None}),
        ("missing-tensor", "gate_up_proj_blocks", {"gate_up_proj_blocks": None}),
        ("missing-tensor", "down_proj.bias", {"down_proj_bias": None}),
        ("missing-tensor", "down_proj", {"down_proj_scales": None, "down_proj_blocks": None, "down_proj_bias": None}),
        ("unexpected-tensor", "down_proj", {"down_proj": torch.zeros(EXPERTS, INNER, HIDDEN)}),
        ("unexpected-tensor", "up_proj_bias", {"up_proj_bias": torch.zeros(EXPERTS, INNER)}),
        ("unexpected-tensor", "gate_up_proj_zeros", {"gate_up_proj_zeros": torch.zeros(EXPERTS, 2 * INNER, 2)}),
        ("bad-dtype", "down_proj_blocks", {"down_proj_blocks": torch.zeros(EXPERTS, HIDDEN, 1, 16)}),
        ("bad-dtype", "down_proj_scales", {"down_proj_scales": torch.zeros(EXPERTS, HIDDEN, 1)}),
        ("bad-dtype", "down_proj_bias", {"down_proj_bias": torch.zeros(EXPERTS, HIDDEN, dtype=torch.uint8)}),
        ("bad-shape", "down_proj_bias", {"down_proj_bias": torch.zeros(EXPERTS, HIDDEN - 1)}),
        ("bad-shape", "down_proj_scales", {"down_proj_scales": torch.zeros(EXPERTS, HIDDEN, 2, dtype=torch.uint8)}),
        ("bad-shape", "down_proj_blocks", {"down_proj_blocks": torch.zeros(EXPERTS, HIDDEN, 8, dtype=torch.uint8)}),
        ("bad-shape", "down_proj_blocks", {"down_proj_blocks": torch.zeros(EXPERTS, HIDDEN, 1, 15, dtype=torch.uint8)}),
        ("bad-shape", "gate_up_proj", {
            "gate_up_proj_blocks": torch.zeros(EXPERTS + 1, 2 * INNER, 2, 16, dtype=torch.uint8),
            "gate_up_proj_scales": torch.zeros(EXPERTS + 1, 2 * INNER, 2, dtype=torch.uint8),
            "gate_up_proj_bias": torch.zeros(EXPERTS + 1, 2 * INNER)}),
        ("bad-content", "down_proj_scales",
         {"down_proj_scales": torch.full((EXPERTS, HIDDEN, 1), 255, dtype=torch.uint8)}),
    ],
)  # fmt: skip
def test_damage_is_refused(tmp_path: Path, code: str, tensor: str, changes: dict[str, Any]) -> None:
    mixture = Mixture("gpt_oss")
    refusal = refused(mixture.write(tmp_path, quantized(mixture, **changes), CONFIG))
    assert (refusal.code, refusal.tensor) == (code, f"{EXPERTS_0}.{tensor}"), str(refusal)


def test_a_plain_model_that_is_only_marked_is_refused(tmp_path: Path) -> None:
    mixture = Mixture("gpt_oss")
    refusal = refused(mixture.write(tmp_path, mixture.tensors(), CONFIG))
    assert refusal.code == "missing-tensor" and "_blocks" in str(refusal)


def test_a_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    mixture = Mixture("gpt_oss")
    path = mixture.write(tmp_path, quantized(mixture), {**CONFIG, "modules_to_not_convert": 3})
    assert refused(path).field == "quantization_config.modules_to_not_convert"
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert refused(path).code == "unknown-method"


def test_what_is_read_is_written(tmp_path: Path) -> None:
    mixture = Mixture("gpt_oss")
    tensors = quantized(mixture)
    first = qcore.open_checkpoint(mixture.write(tmp_path / "a", tensors, CONFIG))
    opened = qcore.open_checkpoint(convert(first.path, "mxfp4", tmp_path / "b"))
    assert opened.plan == first.plan
    for name, tensor in tensors.items():
        assert torch.equal(opened.files.source.read(name), tensor), name
    torch.testing.assert_close(logits(qcore.load_model(opened)), mixture.logits(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["W4A16-g32-sym", "FP8_DYNAMIC"])
def test_what_it_cannot_hold_is_refused(tmp_path: Path, how: str) -> None:
    source = qcore.open_checkpoint(write(tmp_path / "a", dense_llama())).quantized(how)
    with pytest.raises(qcore.Refused, match="stacked experts"):
        convert(source, "mxfp4", tmp_path / "b")
