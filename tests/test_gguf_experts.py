"""Mixtures of experts in GGUF files, converted as llama.cpp's converter does it, against transformers' own models."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import qcore
from mixtures import TOKENS, Mixture, logits
from qcore.blocks.dequantize import dequantize_blocks
from qcore.blocks.quantize import quantize_blocks
from qcore.checkpoint.gguf_writer import GgufTensor, write_gguf
from qcore.convert import convert
from qcore.gguf.architectures import MIXTURES
from qcore.gguf.config import model_config
from qcore.refusal import Refused
from test_gguf_model import converted, headers, nothing_read, original_of
from test_gguf_model import metadata_of as metadata_of_dense

EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2moe": {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    "qwen3moe": {"expert_feed_forward_length": 32},
    "gpt-oss": {"expert_feed_forward_length": 32, "attention.sliding_window": 128, "rope.freq_base": 150000.0,
                "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096},
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3moe": {"norm_topk_prob": True, "mlp_only_layers": []},
    "gpt-oss": {"layer_types": ["sliding_attention", "full_attention"]},
}
HEADS = {"q_proj": 4, "k_proj": 2}


def mixture(name: str) -> Mixture:
    made = Mixture(MIXTURES[name].model_type, **CHANGES.get(name, {}))
    made.logits()  # which gives the model the random weights
    return made


def metadata_of(name: str, made: Mixture) -> dict[str, Any]:
    config = made.config
    fields = {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 16, "attention.value_length": 16, "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "feed_forward_length": config.intermediate_size, "expert_count": 4, "expert_used_count": 2, "vocab_size": 128,
        "rope.freq_base": 1e4, **EXTRA[name],
    }  # fmt: skip
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope.scaling.type" not in EXTRA[name]:
        fields["rope.freq_base"] = float(rope["rope_theta"])
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in fields.items()}}


def tensors_of(name: str, made: Mixture) -> dict[str, torch.Tensor]:
    """The model's tensors by gguf-py's names, experts stacked, gate and up apart."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names, tensors = gguf.get_tensor_name_map(arch, 2), {}
    for parameter, value in made.model.state_dict().items():
        parts = {parameter: value}
        head, _, leaf = parameter.rpartition(".")
        if leaf.startswith("gate_up_proj"):
            tail = ".bias" if leaf.endswith("bias") else ".weight"
            if name == "gpt-oss":
                rows = value if tail == ".bias" else value.transpose(1, 2)
                gate, up = rows[:, ::2], rows[:, 1::2]
            else:
                gate, up = value.unflatten(1, (2, -1)).unbind(1)
            parts = {f"{head}.gate_proj{tail}": gate, f"{head}.up_proj{tail}": up}
        elif head.endswith("experts") and leaf.startswith("down_proj"):
            tail = ".bias" if leaf.endswith("bias") else ".weight"
            parts = {
                f"{head}.down_proj{tail}": value.transpose(1, 2) if name == "gpt-oss" and tail == ".weight" else value
            }
        elif leaf == "sinks":
            parts = {f"{parameter}.weight": value}
        for spelled, tensor in parts.items():
            found = names.get_name(spelled, try_suffixes=(".weight", ".bias"))
            assert found is not None, spelled
            heads = HEADS.get(spelled.split(".")[-2])
            if name == "llama" and heads:
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            if found.endswith("shexp.weight") and tensor.shape[0] == 1:
                tensor = tensor[0]
            tensors[found] = tensor.contiguous()
    return tensors


def write(file: Path, name: str, made: Mixture, kind: str = "F32") -> Path:
    """Experts and attention in this type."""
    held = []
    for tensor, values in tensors_of(name, made).items():
        if kind != "F32" and tensor.endswith("weight") and values.dim() > 1 and "gate_inp" not in tensor:
            rows = quantize_blocks(kind.lower(), values.flatten(0, -2).float(), None)
            held.append(GgufTensor(tensor, kind, tuple(values.shape), lambda rows=rows: [rows]))
        else:
            held.append(GgufTensor(tensor, "F32", tuple(values.shape), lambda values=values: [values.float()]))
    write_gguf(file, metadata_of(name, made), held)
    return file


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_read_and_runs(tmp_path: Path, name: str) -> None:
    made = mixture(name)
    file = write(tmp_path / "model.gguf", name, made)
    assert torch.allclose(logits(qcore.load_model(file, dtype=torch.float32)), logits(made.model), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "Q4_0"), ("qwen2moe", "Q8_0"), ("qwen3moe", "Q8_0"), ("gpt-oss", "MXFP4")]
)
def test_quantized_experts_run_as_they_are(tmp_path: Path, name: str, kind: str) -> None:
    made = mixture(name)
    file = write(tmp_path / "model.gguf", name, made, kind)
    opened = qcore.open_checkpoint(file)
    module = "model.layers.1.mlp.experts.down_proj"
    assert str(opened.plan[module]) == f"W{opened.plan[module].weight.bits}A16-gguf:{kind.lower()}"  # type: ignore[union-attr]
    raw = opened.files.source.read("blk.1.ffn_down_exps.weight")
    expected = dequantize_blocks(kind.lower(), raw).reshape(4, 64, 32)
    assert torch.equal(opened.dequantize(module), expected)
    # transformers' own model of what the blocks stand for
    state = made.model.state_dict()
    for parameter in state:
        if not parameter.endswith(("proj", "proj.weight")) and "embed" not in parameter and "lm_head" not in parameter:
            continue
        values = state[parameter]
        turned = name == "gpt-oss" and "experts" in parameter
        rows = (values.transpose(1, 2) if turned else values).contiguous()
        blocks = quantize_blocks(kind.lower(), rows.flatten(0, -2).float(), None)
        again = dequantize_blocks(kind.lower(), blocks).reshape(rows.shape)
        state[parameter] = again.transpose(1, 2) if turned else again
    reference = AutoModelForCausalLM.from_config(made.config).eval().float()
    reference.load_state_dict(state)
    for quantized in (False, True):
        model = qcore.load_model(file, dtype=torch.float32, kernel="reference_linear" if quantized else None)
        with torch.inference_mode():
            assert torch.allclose(model(TOKENS).logits, logits(reference), atol=2e-3)


def test_stacked_experts_go_where_they_can(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", "qwen3moe", mixture("qwen3moe"), "Q8_0")
    with pytest.raises(Refused, match="not-representable"):
        convert(file, "gptq", tmp_path / "gptq")


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("expert_gating_func", 2, "unknown-variant"), ("expert_weights_scale", 2.5, "unknown-variant"),
        ("expert_weights_norm", False, "unknown-variant"), ("expert_used_count", 5, "bad-field"),
        ("expert_count", 1 << 40, "bad-field"), ("expert_count", "4", "bad-field"), ("expert_feed_forward_length", 0, "bad-field"),
    ],
)  # fmt: skip
def test_other_mixtures_are_refused_by_field(tmp_path: Path, key: str, value: object, code: str) -> None:
    made = mixture("qwen3moe")
    file = tmp_path / "model.gguf"
    held = [GgufTensor(tensor, "F32", tuple(values.shape), lambda values=values: [values.float()])
            for tensor, values in tensors_of("qwen3moe", made).items()]  # fmt: skip
    write_gguf(file, metadata_of("qwen3moe", made) | {f"qwen3moe.{key}": value}, held)
    with pytest.raises(Refused) as caught:
        qcore.load_model(file)
    assert (caught.value.refusal.code, caught.value.refusal.field) == (code, f"qwen3moe.{key}")


def test_dense_architectures_have_no_experts() -> None:
    metadata = metadata_of_dense("gemma2") | {"gemma2.expert_count": 8}
    with pytest.raises(Refused) as caught:
        model_config(metadata, headers(converted("gemma2", original_of("gemma2"))), nothing_read)
    assert (caught.value.refusal.code, caught.value.refusal.field) == ("bad-field", "gemma2.expert_count")
