"""Mixtures of experts: what every architecture and format computes, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
import qcore.kernels.reference
from mixtures import CONFIGS, EXPERTS, HIDDEN, INNER, TOKENS, Mixture, Tensors, fp8, gptq, logits, packed
from qcore.model.experts import QuantizedExperts
from qcore.model.load import kernel_counts

BY_NAME = [kind for kind in CONFIGS if kind != "gpt_oss"]
Maker = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
FORMATS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "gptq": (gptq, GPTQ),
    "fp8": (lambda weight: fp8(weight, None), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8-block": (lambda weight: fp8(weight, 32), {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "compressed-tensors": (packed, {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
    }),
}  # fmt: skip


def quantized(mixture: Mixture, make: Maker, modules: list[str] | None = None) -> Tensors:
    """The checkpoint's tensors with these experts' modules quantized (all by default); the mixture's parts follow."""
    tensors = mixture.tensors()
    for module in mixture.parts if modules is None else modules:
        parts, mixture.parts[module] = make(tensors.pop(f"{module}.weight"))
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05, "the logits tell weights apart"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_plain_experts_are_stacked(tmp_path: Path, kind: str) -> None:
    mixture = Mixture(kind)
    model = qcore.load_model(mixture.write(tmp_path, mixture.tensors()))
    same(logits(model), mixture.logits())
    assert not kernel_counts(model)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", BY_NAME)
def test_quantized_experts_compute_what_their_weights_say(
    tmp_path: Path, kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qcore.kernels.reference, "quantize_input", lambda x, *_: x)
    make, config = FORMATS[form]
    mixture = Mixture(kind)
    path = mixture.write(tmp_path, quantized(mixture, make), config)
    model = qcore.load_model(path, kernel="reference_linear")
    same(logits(model), mixture.logits())
    assert kernel_counts(model) == {"reference_linear": len(mixture.parts)}
    opened = qcore.open_checkpoint(path)
    for module, weight in mixture.parts.items():
        torch.testing.assert_close(opened.dequantize(module), weight)


LAYER = "model.layers.1.mlp.experts"


def test_every_expert_may_have_its_own_scheme(tmp_path: Path) -> None:
    """4 and 8 bits by a `dynamic` pattern, two plain experts, one of which only in part, and a fused stack elsewhere."""
    mixture = Mixture("qwen2_moe")
    left = [module for module in mixture.parts if ".experts.3." in module or module.endswith("experts.2.up_proj")]
    wide = [module for module in mixture.parts if ".experts.1." in module]
    tensors = quantized(mixture, gptq, [m for m in mixture.parts if m not in left + wide and "layers.1" in m])
    for module in wide:
        parts, mixture.parts[module] = gptq(mixture.parts[module], bits=8)
        tensors.pop(f"{module}.weight")
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    dynamic = {r"+:.*\.experts\.1\..*": {"bits": 8}, r"-:.*\.experts\.3\..*": {}, r"-:.*\.mlp\.gate": {}}
    path = mixture.write(tmp_path, tensors, {**GPTQ, "dynamic": dynamic})
    opened = qcore.open_checkpoint(path)
    assert {str(opened.plan[f"{LAYER}.{expert}.up_proj"]) for expert in range(EXPERTS)} == {
        "W4A16-g32-sym", "W8A16-g32-sym", "None"}  # fmt: skip
    assert "dynamic pattern" in opened.layers["model.layers.0.mlp.gate"].reason
    model = qcore.load_model(path)
    same(logits(model), mixture.logits())
    with torch.inference_mode():
        text = model.generate(TOKENS, max_new_tokens=5, do_sample=False)
        assert torch.equal(text, mixture.model.generate(TOKENS, max_new_tokens=5, do_sample=False))


def test_a_plain_stack_beside_quantized_experts(tmp_path: Path) -> None:
    mixture = Mixture("qwen3_moe")
    downs = [module for module in mixture.parts if module.endswith("down_proj")]
    tensors = quantized(mixture, gptq, downs)
    stacks: dict[str, list[torch.Tensor]] = {}
    for module in mixture.parts:
        if module not in downs:
            stack = f"{module.partition('.experts.')[0]}.experts.gate_up_proj"
            stacks.setdefault(stack, []).append(tensors.pop(f"{module}.weight"))
    tensors |= {name: torch.cat(halves).view(EXPERTS, 2 * INNER, HIDDEN) for name, halves in stacks.items()}
    same(logits(qcore.load_model(mixture.write(tmp_path, tensors, GPTQ))), mixture.logits())


def test_a_quantized_router_becomes_plain(tmp_path: Path) -> None:
    mixture = Mixture("mixtral", num_local_experts=8)  # GPTQ packs eight rows' zero points into a word
    tensors = quantized(mixture, gptq)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        parts, mixture.rest[name] = gptq(mixture.rest[name])
        tensors.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        tensors |= {f"model.layers.{layer}.block_sparse_moe.gate.{part}": tensor for part, tensor in parts.items()}
    same(logits(qcore.load_model(mixture.write(tmp_path, tensors, GPTQ))), mixture.logits())


def test_only_chosen_experts_run(tmp_path: Path) -> None:
    mixture = Mixture("mixtral")
    model = qcore.load_model(mixture.write(tmp_path, quantized(mixture, gptq), GPTQ))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, QuantizedExperts)
    seen: list[tuple[int, int]] = []
    for number, layer in enumerate(experts.parts["down"]):
        layer.register_forward_hook(lambda _, given, __, number=number: seen.append((number, given[0].shape[0])))
    chosen = torch.tensor([[3, 1], [1, 3], [3, 1]])
    hidden, weights = torch.randn(3, HIDDEN), torch.rand(3, 2)
    with torch.inference_mode():
        answer = experts(hidden, chosen, weights)
        assert seen == [(1, 3), (3, 3)], "tokens of one expert run together"
        torch.testing.assert_close(answer[:1], experts(hidden[:1], chosen[:1], weights[:1]))


def test_packed_experts_stay_packed(tmp_path: Path) -> None:
    mixture = Mixture("mixtral")
    model = qcore.load_model(mixture.write(tmp_path, quantized(mixture, gptq), GPTQ), kernel="reference_linear")
    experts = model.model.layers[0].mlp.experts
    held = sum(tensor.nbytes for tensor in (*experts.buffers(), *experts.parameters()))
    assert held < 5 / 32 * sum(w.nbytes for name, w in mixture.parts.items() if "layers.0" in name)


def test_the_routing_correction_is_loaded_and_stays_wide(tmp_path: Path) -> None:
    mixture = Mixture("deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = mixture.tensors()
    model = qcore.load_model(mixture.write(tmp_path / "whole", tensors), dtype="bfloat16")
    loaded = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert loaded.dtype == torch.float32 and torch.equal(loaded, tensors.pop(name))
    assert refused(mixture.write(tmp_path / "less", tensors)).tensor == name


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    mixture = Mixture("deepseek_v3")
    tensors = quantized(mixture, gptq)
    parts, _ = gptq(torch.empty(64, 64))
    tensors |= {f"model.layers.61.self_attn.o_proj.{part}": tensor for part, tensor in parts.items()}
    same(logits(qcore.load_model(mixture.write(tmp_path, tensors, GPTQ))), mixture.logits())


def refused(path: Path) -> qcore.Refusal:
    with pytest.raises(qcore.Refused) as caught:
        qcore.load_model(path)
    return caught.value.refusal


WEIGHT = torch.zeros(INNER, HIDDEN)


@pytest.mark.parametrize(
    ("code", "named", "changes"),
    [
        ("missing-tensor", "1.up_proj.weight", {"1.up_proj.weight": None}),
        ("missing-tensor", "3.gate_proj.weight", {f"3.{part}_proj.weight": None for part in ("gate", "up", "down")}),
        ("unexpected-tensor", "4.up_proj.weight", {"4.up_proj.weight": WEIGHT}),
        ("unexpected-tensor", "999999.up_proj.weight", {"999999.up_proj.weight": WEIGHT}),
        ("unexpected-tensor", "9999999.up_proj.weight", {"9999999.up_proj.weight": WEIGHT}),
        ("unexpected-tensor", "03.up_proj.weight", {"03.up_proj.weight": WEIGHT}),
        ("unexpected-tensor", "-1.up_proj.weight", {"-1.up_proj.weight": WEIGHT}),
        ("unexpected-tensor", "1.w3.weight", {"1.w3.weight": WEIGHT}),
        ("unexpected-tensor", "1.up_proj.bias", {"1.up_proj.bias": torch.ones(INNER)}),
        ("unexpected-tensor", "up_proj.weight", {"up_proj.weight": torch.zeros(EXPERTS, INNER, HIDDEN)}),
        ("unexpected-tensor", "down_proj", {"down_proj": torch.zeros(EXPERTS, HIDDEN, INNER)}),
        ("unexpected-tensor", "1.up_proj.extra", {"1.up_proj.extra": WEIGHT}),
        ("bad-shape", "1.up_proj.weight", {"1.up_proj.weight": WEIGHT.t()}),
        ("bad-shape", "1.up_proj.weight", {"1.up_proj.weight": WEIGHT[0]}),
        ("unknown-method", "1.up_proj.weight", {"1.up_proj.weight": WEIGHT.char()}),
    ],
)
def test_damage_to_plain_experts_is_refused(
    tmp_path: Path, code: str, named: str, changes: dict[str, torch.Tensor | None]
) -> None:
    mixture = Mixture("qwen3_moe")
    tensors = mixture.tensors()
    tensors |= {f"{LAYER}.{name}": tensor for name, tensor in changes.items() if tensor is not None}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[f"{LAYER}.{name}"]
    refusal = refused(mixture.write(tmp_path, tensors))
    assert refusal.code == code, str(refusal)
    twins = (f"{LAYER}.1.up_proj.weight", f"{LAYER}.0.{named}", f"{LAYER}.0.{named}.weight")
    assert refusal.tensor in (f"{LAYER}.{named}", *twins), str(refusal)


@pytest.mark.parametrize(("code", "change"), [("missing-tensor", 5), ("unexpected-tensor", 3), ("bad-field", 10**9)])
def test_a_count_that_disagrees_with_the_config_is_refused(tmp_path: Path, code: str, change: int) -> None:
    for form, config in (("plain", None), ("gptq", GPTQ)):
        mixture = Mixture("mixtral")
        tensors = mixture.tensors() if config is None else quantized(mixture, gptq)
        for layer in range(2):  # so that only the experts disagree
            tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = torch.zeros(min(change, 5), HIDDEN)
        refusal = refused(mixture.write(tmp_path / form, tensors, config, num_local_experts=change))
        assert refusal.code == code, str(refusal)
        if code == "missing-tensor":
            assert ".block_sparse_moe.experts.4." in (refusal.tensor or "")
        if code == "unexpected-tensor":
            assert ".block_sparse_moe.experts.3." in (refusal.tensor or "")


@pytest.mark.parametrize("part", ["qweight", "scales"])
def test_damage_to_a_quantized_expert_is_refused(tmp_path: Path, part: str) -> None:
    mixture = Mixture("mixtral")
    tensors = quantized(mixture, gptq)
    del tensors[f"model.layers.0.block_sparse_moe.experts.2.w3.{part}"]
    refusal = refused(mixture.write(tmp_path, tensors, GPTQ))
    assert refusal.code in ("missing-tensor", "unexpected-tensor") and "experts.2.w3" in (refusal.tensor or "")


def test_two_spellings_of_one_weight_are_refused(tmp_path: Path) -> None:
    mixture = Mixture("mixtral")
    tensors = mixture.tensors()
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(EXPERTS, HIDDEN)
    refusal = refused(mixture.write(tmp_path, tensors))
    assert refusal.code == "unexpected-tensor" and ".gate.weight" in (refusal.tensor or "")


def test_stacked_fp8_without_its_scales_is_refused_by_name(tmp_path: Path) -> None:
    mixture = Mixture("qwen3_moe")
    tensors = quantized(mixture, lambda weight: fp8(weight, 32), [f"{LAYER}.0.up_proj"])
    for module in [module for module in mixture.parts if module.startswith(LAYER) and "down" not in module]:
        for part in ("weight", "weight_scale_inv"):
            tensors.pop(f"{module}.{part}", None)
    tensors[f"{LAYER}.gate_up_proj"] = torch.zeros(EXPERTS, 2 * INNER, HIDDEN).to(torch.float8_e4m3fn)
    tensors[f"{LAYER}.gate_up_proj_scale"] = torch.ones(EXPERTS, 2, 2)
    tensors["model.layers.0.self_attn.o_proj.weight"] = tensors["model.layers.0.self_attn.o_proj.weight"].to(
        torch.float8_e4m3fn
    )
    tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"] = torch.ones(2, 2)
    path = mixture.write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(path)
    assert caught.value.refusal.code == "unknown-variant" and caught.value.refusal.tensor == f"{LAYER}.gate_up_proj"
