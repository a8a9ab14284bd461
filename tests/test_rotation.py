"""Rotated checkpoints: the same model as before, in memory, written, and quantized; what a rotation is for; and models that are not rotated."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import qcore
from golden_checkpoints import FOLDERS
from mixtures import _COMMON, CONFIGS
from qcore.algorithms.hadamard import Hadamard
from qcore.calibration.rotation import rotated
from qcore.calibration.run import quantize
from qcore.checkpoint.open import Checkpoint
from qcore.convert import convert
from qcore.evaluation import evaluate
from qcore.model.roles import NotRotated, Roles, recorded
from qcore.refusal import Refused

GOLDEN = FOLDERS[0]
BASE = GOLDEN / "base"
TEXT = (GOLDEN / "text.txt").read_text(encoding="utf-8")
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 48, "head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "phi3": {},
    "deepseek_v2": CONFIGS["deepseek_v2"],
    "mixtral": CONFIGS["mixtral"],
    "qwen2_moe": CONFIGS["qwen2_moe"],
    "gpt_oss": CONFIGS["gpt_oss"],
    "gemma2": {},
    "gpt2": {},
    "olmo": {},
}
TOKENS = torch.tensor([[1, 5, 9, 100, 3, 7, 2, 2, 64]])


def saved(kind: str, folder: Path, **config: Any) -> Any:
    """A tiny model, whose gains are no ones and whose biases no zeros, and its checkpoint."""
    torch.manual_seed(0)
    wanted = CONFIG_MAPPING[kind](**{**_COMMON, "intermediate_size": 96, **KINDS[kind], **config})
    model = AutoModelForCausalLM.from_config(wanted).float().eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(0.5 + 0.3 * torch.randn_like(tensor) if tensor.dim() == 1 else 0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(tokens, use_cache=False).logits.float()
    return found


def loaded(checkpoint: Checkpoint | Path) -> Any:
    return qcore.load_model(checkpoint, device="cpu", dtype="float32")


def golden32(folder: Path) -> Path:
    """The golden model in float32, with columns that norms make small and the layers behind them large: the same model."""
    shutil.copytree(BASE, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[::50] /= 16
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, ::50] *= 16
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


@pytest.mark.parametrize("width", [1, 2, 7, 12, 36, 48, 52, 64, 576, 1024])
def test_rotations(width: int) -> None:
    """The same each time, orthogonal, and but for widths without a Hadamard matrix of Sylvester's or Paley's, 7 and 52 here, with all numbers of one size."""
    matrix = Hadamard(width).turn(torch.eye(width))
    torch.testing.assert_close(matrix.double() @ matrix.double().T, torch.eye(width).double(), rtol=0, atol=1e-6)
    even = bool(((matrix.abs() * width**0.5 - 1).abs() < 1e-5).all())
    assert even == (width not in (7, 52))
    x = torch.randn(3, 5, 2 * width, generator=torch.Generator().manual_seed(1))
    by_parts = torch.cat([x[..., :width] @ matrix, x[..., width:] @ matrix], -1)
    torch.testing.assert_close(Hadamard(width).turn(x), by_parts, rtol=1e-5, atol=1e-5)
    assert torch.equal(Hadamard(width).turn(x), Hadamard(width).turn(x))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "phi3", "deepseek_v2", "mixtral", "qwen2_moe", "gpt_oss"])  # fmt: skip
def test_the_same_model(kind: str, tmp_path: Path) -> None:
    """Biases, ties, gains of 1 + weight, queries that share keys, layers that are joined, latents, experts apart and stacked, their biases and orders. Written, transformers reads it."""
    model = saved(kind, tmp_path / "model")
    source = qcore.open_checkpoint(tmp_path / "model")
    made = rotated(source)
    torch.testing.assert_close(logits(loaded(made)), logits(model), rtol=0, atol=1e-4)
    moved = [
        name for name in source.parameters if not torch.equal(source.parameter(name).float(), made.parameter(name))
    ]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in moved} >= {"embed_tokens", "norm", "o_proj"}
    assert made.config["tie_word_embeddings"] is False and "lm_head" in made.layers
    out = convert(made, "dense", tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-4)


def test_values_of_heads_are_rotated(tmp_path: Path) -> None:
    """By 12 numbers each: v_proj's rows beside its columns."""
    saved("llama", tmp_path / "model")
    source = qcore.open_checkpoint(tmp_path / "model")
    made, name = rotated(source), "model.layers.1.self_attn.v_proj"
    gain = source.parameter("model.layers.1.input_layernorm.weight")
    rows = Hadamard(48).turn(source.parameter(f"{name}.weight") * gain)
    assert not torch.allclose(rows, made.parameter(f"{name}.weight"), atol=1e-3)
    torch.testing.assert_close(Hadamard(12).turn(rows.T).T, made.parameter(f"{name}.weight"))
    torch.testing.assert_close(Hadamard(12).turn(source.parameter(f"{name}.bias")), made.parameter(f"{name}.bias"))


def test_dtypes() -> None:
    """Layers are not rounded before they are quantized; what stays as it is has the dtype that it had."""
    source = qcore.open_checkpoint(BASE)
    made = rotated(source)
    kinds = {name: info.dtype for name, info in made.parameters.items()}
    assert {kinds["model.embed_tokens.weight"], kinds["lm_head.weight"], kinds["model.norm.weight"]} == {"BF16"}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "F32" and made.own_dtype == "bfloat16"
    assert all(str(made.parameter(name).dtype) == {"F32": "torch.float32", "BF16": "torch.bfloat16"}[kind] for name, kind in kinds.items())  # fmt: skip
    tokens = torch.tensor([source.load_tokenizer()(TEXT)["input_ids"][:64]])
    torch.testing.assert_close(logits(loaded(made), tokens), logits(loaded(source), tokens), rtol=0, atol=0.05)


def test_quantized(tmp_path: Path) -> None:
    """Columns that are larger than others spread over all of them; so a rotated model is nearer to itself in 4 bits. Calibrated, written and loaded, nearer still."""
    source = qcore.open_checkpoint(golden32(tmp_path / "model"))
    made = rotated(source)
    base = loaded(source)
    tokens = source.load_tokenizer()(TEXT[28_000:])["input_ids"][:1024]
    torch.testing.assert_close(logits(loaded(made), torch.tensor([tokens[:64]])), logits(base, torch.tensor([tokens[:64]])), rtol=0, atol=1e-4)  # fmt: skip
    up = "model.layers.0.mlp.up_proj"
    assert kurtosis(source.dequantize(up)) > 50 and kurtosis(made.dequantize(up)) < 5

    def apart(path: Checkpoint | Path) -> float:
        return float(evaluate(loaded(path), tokens, reference=base, context=256).summary()["kld_mean"])

    plain, turned = (apart(checkpoint.quantized("rtn:W4A16-g128-sym")) for checkpoint in (source, made))
    assert turned < 0.2 * plain
    out = quantize(made, "W4A16-g128-sym", "gptq", TEXT[:28_000], out=tmp_path / "out", samples=4, seqlen=64).paths[0]
    assert apart(out) < 0.6 * turned


def kurtosis(weight: torch.Tensor) -> float:
    return float((weight - weight.mean()).pow(4).mean() / weight.var() ** 2)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("gemma2", "post_attention_layernorm, a norm behind a layer"),
        ("gpt2", "ln_1, a LayerNorm whose outputs are not"),
        ("olmo", "other logits behind model.layers.0"),
    ],
)
def test_models_that_are_not_rotated(kind: str, found: str, tmp_path: Path) -> None:
    """Norms inside of a branch, norms that take a mean away, and such without a gain."""
    saved(kind, tmp_path / "model")
    with pytest.raises(Refused, match=found) as refused:
        rotated(qcore.open_checkpoint(tmp_path / "model"))
    assert refused.value.refusal.code == "unknown-architecture"


def test_checkpoints_that_are_not_rotated(tmp_path: Path) -> None:
    """Quantized ones, and such whose tensors are not the model's."""
    with pytest.raises(Refused, match="found gptq"):
        rotated(qcore.open_checkpoint(GOLDEN / "gptqmodel-gptq-4bit-sym"))
    saved("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for code, changed in (
        ("unknown-architecture", {**tensors, "mtp.proj.weight": torch.ones(4, 4)}),
        ("bad-shape", {**tensors, "model.layers.1.mlp.up_proj.weight": torch.ones(96, 64)}),
        ("bad-argument", {**tensors, "model.layers.0.self_attn.k_scale": torch.ones(1)}),
        ("missing-tensor", {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(Refused) as refused:
            rotated(qcore.open_checkpoint(tmp_path / "model"))
        assert refused.value.refusal.code == code


def test_what_is_asked_for_stays(tmp_path: Path) -> None:
    """Of a checkpoint whose layers are quantized while they are read: they are rotated before."""
    source = qcore.open_checkpoint(golden32(tmp_path / "model"))
    one, other = rotated(source).quantized("rtn:W4A16-g128-sym"), rotated(source.quantized("rtn:W4A16-g128-sym"))
    for module in ("model.layers.0.self_attn.o_proj", "lm_head"):
        assert torch.equal(one.dequantize(module), other.dequantize(module))
    assert replace(other.files, source=source.files.source).config == other.config


class Sent(torch.nn.Module):
    """A tiny model of experts that are layers each, of which the tokens of a text go to some."""

    def __init__(self, *, alike: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.norm, self.last = torch.nn.RMSNorm(8), torch.nn.RMSNorm(8)
        up, down = ([torch.nn.Linear(*sizes, bias=False) for _ in range(3)] for sizes in ((8, 12), (12, 8)))
        self.experts = torch.nn.ModuleList(torch.nn.ModuleDict({"w1": a, "w2": b}) for a, b in zip(up, down, strict=True))  # fmt: skip
        self.lone = torch.nn.Linear(*((12, 3) if alike else (8, 3)))
        self.lm_head = torch.nn.Linear(8, 16, bias=False)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        stream = self.embed(tokens)
        x = self.norm(stream)
        for number in (0, 2):
            rows = torch.arange(number, len(tokens), 3)
            expert: Any = self.experts[number]
            stream = stream.index_add(0, rows, expert["w2"](torch.relu(expert["w1"](x[rows]))))
        found: torch.Tensor = self.lm_head(self.last(stream))
        return found


def test_experts_that_no_token_reaches() -> None:
    """They are as others of their name; a layer that has no like is refused."""
    for alike in (True, False):
        model = Sent(alike=alike).requires_grad_(False)
        with recorded(model) as calls:
            model(torch.arange(16))
        if not alike:
            with pytest.raises(NotRotated, match="lone, which no token"):
                Roles(model, calls)
            continue
        roles = Roles(model, calls)
        assert roles.readers == {**{f"experts.{number}.w1": "norm" for number in range(3)}, "lm_head": "last"}
        assert sorted(roles.writers) == [f"experts.{number}.w2" for number in range(3)]


def test_joined_to_others(tmp_path: Path) -> None:
    """While a model is loaded, written, and calibrated; and it stands before what makes the weights."""
    loaded_so = qcore.open_checkpoint(BASE).quantized("hadamard+rtn:W8A8")
    written = qcore.open_checkpoint(quantize(BASE, "W8A8", "hadamard+rtn", out=tmp_path / "rtn").paths[0])
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(loaded_so.weight(name).dequantize(), written.weight(name).dequantize())
    assert not torch.equal(
        written.weight(name).dequantize(), qcore.open_checkpoint(BASE).quantized("rtn:W8A8").weight(name).dequantize()
    )
    text = (GOLDEN / "text.txt").read_text(encoding="utf-8")
    made = quantize(BASE, "W4A16-g128-sym", "hadamard+gptq", text, out=tmp_path / "gptq", samples=8, seqlen=128).paths[0]  # fmt: skip
    tokens = qcore.open_checkpoint(BASE).load_tokenizer()(text)["input_ids"][-1024:]
    scored = evaluate(loaded(made), tokens, reference=loaded(BASE), context=256).summary()
    assert float(scored["kld_mean"]) < 1e-3
    with pytest.raises(Refused, match="before"):
        quantize(BASE, "W8A8", "rtn+hadamard", out=tmp_path / "other")
