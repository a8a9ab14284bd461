"""Tiny mixtures of experts: random models of transformers, and checkpoints of them that hold the experts one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from makers import gptq_tensors, words, write

TOKENS = torch.tensor([[1, 5, 9, 100, 3, 7, 2, 2, 64]])
EXPERTS, HIDDEN, INNER = 4, 64, 32

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_DEEPSEEK: dict[str, Any] = {
    "intermediate_size": 96, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8, **_MLA,
}  # fmt: skip
_QWEN: dict[str, Any] = {"intermediate_size": 96, "moe_intermediate_size": INNER, "num_experts": EXPERTS}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": INNER, "num_local_experts": EXPERTS},
    "phimoe": {"intermediate_size": INNER, "num_local_experts": EXPERTS},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_QWEN, "mlp_only_layers": [0]},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": {"intermediate_size": INNER, "num_local_experts": EXPERTS, "layer_types": ["full_attention"] * 2},
}
SPELLINGS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "phimoe": ("block_sparse_moe", ("w1", "w3", "w2")),
}
Tensors = dict[str, torch.Tensor]


class Mixture:
    """A model with random weights. parts: each expert's matrices, by the checkpoint's name of the module; rest: the
    other tensors, by transformers' names."""

    def __init__(self, kind: str, **changes: Any) -> None:
        torch.manual_seed(0)
        self.kind, self.experts = kind, changes.get("num_local_experts", EXPERTS)
        self.config = CONFIG_MAPPING[kind](**{**_COMMON, **CONFIGS[kind], **changes})
        self.model: Any = AutoModelForCausalLM.from_config(self.config).eval().float()
        state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in self.model.state_dict().items()}
        self.block, spelled = SPELLINGS.get(kind, ("mlp", ("gate_proj", "up_proj", "down_proj")))
        self.rest: Tensors = {}
        self.parts: Tensors = {}
        for name, tensor in state.items():
            prefix = name.rpartition(".")[0].replace(".mlp.", f".{self.block}.")
            if kind != "gpt_oss" and name.endswith("experts.gate_up_proj"):
                for expert, (gate, up) in enumerate(tensor.unflatten(1, (2, -1)).unbind(0)):
                    self.parts[f"{prefix}.{expert}.{spelled[0]}"] = gate
                    self.parts[f"{prefix}.{expert}.{spelled[1]}"] = up
            elif kind != "gpt_oss" and name.endswith("experts.down_proj"):
                self.parts |= {f"{prefix}.{expert}.{spelled[2]}": down for expert, down in enumerate(tensor)}
            else:
                self.rest[name] = tensor
        self.spelled = spelled

    def tensors(self) -> Tensors:
        """What an unquantized checkpoint holds."""
        router = ".gate.weight" if self.kind == "phimoe" else ".router.weight"
        rest = {
            name.replace(".mlp.", f".{self.block}.").replace(".router.weight", router): tensor
            for name, tensor in self.rest.items()
        }
        return rest | {f"{module}.weight": weight for module, weight in self.parts.items()}

    def logits(self) -> torch.Tensor:
        """What transformers computes from `parts` and `rest`."""
        state = dict(self.rest)
        for layer in range(2):
            prefix = f"model.layers.{layer}.{self.block}.experts."
            if f"{prefix}0.{self.spelled[0]}" in self.parts:
                gate, up, down = (
                    torch.stack([self.parts[f"{prefix}{e}.{part}"] for e in range(self.experts)])
                    for part in self.spelled
                )
                where = prefix.replace(f".{self.block}.", ".mlp.")
                state |= {f"{where}gate_up_proj": torch.cat([gate, up], 1), f"{where}down_proj": down}
        self.model.load_state_dict(state)
        return logits(self.model)

    def write(self, folder: Path, tensors: Tensors, quantization: dict[str, Any] | None = None, **config: Any) -> Path:
        values = json.loads(self.config.to_json_string(use_diff=False))
        return write(folder, tensors, quantization, **{**values, "dtype": "float32", **config})


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits.float()
    return found


def gptq(weight: torch.Tensor, bits: int = 4) -> tuple[Tensors, torch.Tensor]:
    """A random GPTQ layer of the weight's shape, and the weight that it stands for."""
    rows, columns = weight.shape
    middle = 1 << (bits - 1)
    codes = torch.randint(0, 2 * middle, (rows, columns))
    scales = (torch.rand(rows, columns // 32) * 0.05 + 0.01).to(torch.float16)
    scales = scales * (8 / middle)
    made = (codes - middle) * scales.float().repeat_interleave(32, 1)
    return gptq_tensors(codes, torch.full_like(scales, middle).long(), scales, bits, None, v1=True), made


def packed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The same as compressed-tensors packs it."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns))
    scales = torch.rand(rows, columns // 32) * 0.05 + 0.01
    parts = {"weight_packed": words(codes, 4), "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}
    return parts, (codes - 8) * scales.repeat_interleave(32, 1)


def fp8(weight: torch.Tensor, block: int | None) -> tuple[Tensors, torch.Tensor]:
    """The same in fp8, with one scale or one for each block."""
    rows, columns = weight.shape
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    if block is None:
        scale = torch.rand(()) * 0.2 + 0.1
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale
    scale = torch.rand(-(-rows // block), -(-columns // block)) * 0.2 + 0.1
    wide = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * wide
