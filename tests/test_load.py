"""Loading models: what is replaced, tied, refused, and how much memory it takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qcore
from makers import LINEARS, dense_llama, gptq_tensors, write
from qcore.model.devices import find_device
from qcore.model.linear import QuantizedEmbedding, QuantizedLinear
from qcore.model.load import kernel_counts

GOLDEN = Path(__file__).parent / "golden"
TOKENS = torch.tensor([[1, 5, 9, 100, 3, 7]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits.float()
    return found


def quantized(folder: Path, modules: dict[str, tuple[int, int]], *, tied: bool = False, bias: bool = False) -> Path:
    """A llama whose named modules are GPTQ int4, the rest dense."""
    tensors = dense_llama(tie_word_embeddings=tied)
    for module, (rows, columns) in modules.items():
        if module.endswith("embed_tokens"):  # the vocabulary is its input
            rows, columns = columns, rows
        codes = torch.randint(0, 16, (rows, columns))
        scales = (torch.rand(rows, columns // 32) * 0.02).to(torch.float16)
        parts = gptq_tensors(codes, torch.full_like(scales, 8).long(), scales, 4, None, v1=True)
        tensors.pop(f"{module}.weight", None)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        if bias and "attn" in module:
            tensors[f"{module}.bias"] = torch.randn(rows)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    return write(folder, tensors, config, tie_word_embeddings=tied, attention_bias=bias)


ALL = {f"model.layers.0.{name}": shape for name, shape in LINEARS.items()}


def reference(path: Path) -> torch.Tensor:
    """The same model in transformers, with weights that qcore dequantized, one by one."""
    from transformers import LlamaConfig

    opened = qcore.open_checkpoint(path)
    config = LlamaConfig(
        **{k: v for k, v in opened.config.items() if k not in ("model_type", "architectures", "dtype")}
    )
    model = AutoModelForCausalLM.from_config(config).eval().float()
    state = {f"{module}.weight": opened.dequantize(module) for module in opened.plan}
    state |= {name: opened.parameter(name).float() for name in opened.parameters if name not in state}
    state |= {
        f"{m}.bias": opened.layer(m).bias.float()
        for m, s in opened.plan.items()
        if s and opened.layer(m).bias is not None
    }
    if opened.config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return logits(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("modules", "tied"),
    [
        ({}, False),
        ({}, True),
        (ALL, False),
        (ALL, True),
        ({**ALL, "lm_head": (128, 64)}, False),
        ({"model.layers.0.mlp.up_proj": (96, 64)}, False),
        ({**ALL, "model.embed_tokens": (128, 64)}, True),
        ({**ALL, "model.embed_tokens": (128, 64), "lm_head": (128, 64)}, False),
    ],
)
def test_models_compute_what_their_weights_say(
    tmp_path: Path, modules: dict[str, tuple[int, int]], tied: bool, bias: bool
) -> None:
    if bias:  # biases of the unquantized attention layers come with them
        modules = {**ALL, **modules}
    modules = {name: (rows, columns) for name, (rows, columns) in modules.items() if columns % 32 == 0}
    path = (
        quantized(tmp_path, modules, tied=tied, bias=bias)
        if modules
        else write(tmp_path, dense_llama(tie_word_embeddings=tied), tie_word_embeddings=tied)
    )
    model = qcore.load_model(path, dtype=torch.float32)
    assert torch.allclose(logits(model), reference(path), atol=1e-5)
    for module in modules:
        kind = QuantizedEmbedding if module.endswith("embed_tokens") else QuantizedLinear
        assert isinstance(model.get_submodule(module), kind)
    assert sum(kernel_counts(model).values()) == len(modules) + (tied and "model.embed_tokens" in modules)
    if tied and "model.embed_tokens" not in modules:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dtype_defaults_to_the_checkpoints_own() -> None:
    assert qcore.load_model(GOLDEN / "gptqmodel-gptq-4bit-sym").dtype == torch.bfloat16
    assert qcore.load_model(GOLDEN / "gguf-q4_0").dtype == torch.float32
    assert qcore.load_model(GOLDEN / "base", dtype="float16").dtype == torch.float16


def test_misspelt_activations_are_refused() -> None:
    for ask in (qcore.load_model, qcore.explain):
        with pytest.raises(qcore.Refused, match="bad-argument"):
            ask(GOLDEN / "gguf-q4_0", activations="exakt")


def test_a_named_kernel_is_used_where_it_can_be() -> None:
    model = qcore.load_model(GOLDEN / "gptqmodel-gptq-4bit-sym", kernel="reference_linear")
    assert kernel_counts(model) == {"reference_linear": 14}
    with pytest.raises(qcore.Refused, match="unknown-kernel"):
        qcore.load_model(GOLDEN / "base", kernel="warp_drive")


def test_generation_is_greedy_and_cached() -> None:
    from qcore.model.generate import generate

    path = GOLDEN / "gguf-q4_0"
    model, tokenizer = qcore.load_model(path), qcore.load_tokenizer(path)
    prompt = tokenizer("the quick brown")["input_ids"]
    text = "".join(generate(model, tokenizer, prompt, max_new_tokens=12))
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("missing-tensor", {"model.norm.weight": None}),
        ("missing-tensor", {"model.layers.0.mlp.up_proj.weight": None}),
        ("missing-tensor", {"lm_head.weight": None}),
        ("unexpected-tensor", {"model.layers.7.mlp.up_proj.weight": torch.ones(96, 64)}),
        ("unexpected-tensor", {"something.else": torch.ones(3)}),
        ("bad-shape", {"model.norm.weight": torch.ones(65)}),
        ("bad-shape", {"lm_head.weight": torch.ones(128, 63)}),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    tmp_path: Path, code: str, change: dict[str, torch.Tensor | None]
) -> None:
    tensors = {name: tensor for name, tensor in {**dense_llama(), **change}.items() if tensor is not None}
    with pytest.raises(qcore.Refused) as caught:
        qcore.load_model(write(tmp_path, tensors))
    assert caught.value.refusal.code == code
    assert next(iter(change)) in (caught.value.refusal.tensor or "")


def test_a_head_of_its_own_beats_a_config_that_ties_it(tmp_path: Path) -> None:
    tensors = dense_llama()
    model = qcore.load_model(write(tmp_path, tensors, tie_word_embeddings=True))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(("value", "fits"), [(0.0, True), (0.5, False)])
def test_biases_of_zeros_are_left_out(tmp_path: Path, value: float, fits: bool) -> None:
    path = quantized(tmp_path, {"model.layers.0.mlp.up_proj": (96, 64)})
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.full((96,), value)
    save_file(tensors, path / "model.safetensors")
    if fits:
        assert qcore.load_model(path).model.layers[0].mlp.up_proj.bias is None
    else:
        with pytest.raises(qcore.Refused, match="unexpected-tensor"):
            qcore.load_model(path)


@pytest.mark.parametrize(
    ("code", "config"),
    [
        ("unknown-architecture", {"model_type": "no_such_model"}),
        ("unknown-architecture", {"model_type": ["llama"]}),
        ("unknown-architecture", {"model_type": None}),
        ("remote-code", {"model_type": "no_such_model", "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}),
        ("bad-field", {"hidden_size": "large"}),
        ("bad-field", {"num_attention_heads": 0}),
        ("bad-field", {"num_hidden_layers": 10**9}),
        ("bad-field", {"num_hidden_layers": -1, "rope_theta": "x"}),
    ],
)
def test_configs_that_cannot_be_built_are_refused(tmp_path: Path, code: str, config: dict[str, Any]) -> None:
    with pytest.raises(qcore.Refused) as caught:
        qcore.load_model(write(tmp_path, dense_llama(), **config))
    assert caught.value.refusal.code == code


def test_code_in_the_checkpoint_is_never_run(tmp_path: Path) -> None:
    path = write(
        tmp_path, dense_llama(), auto_map={"AutoModelForCausalLM": "modeling.Evil", "AutoConfig": "modeling.Evil"}
    )
    (path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    qcore.load_model(path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_larger_than_memory_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    header = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 41]}}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (1 << 41))  # a sparse file: it takes no space
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(qcore.Refused) as caught:
        qcore.load_model(tmp_path)
    assert caught.value.refusal.code == "not-enough-memory" and "GiB" in caught.value.refusal.fact


def test_loading_peaks_at_the_packed_size(tmp_path: Path) -> None:
    """400 MiB of int4 weights: loading may take them, the largest tensor and 150 MiB, in a process of its own."""
    rows, columns, layers = 4096, 4096, 7
    tensors = {
        "model.embed_tokens.weight": torch.zeros(512, columns, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(columns, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(512, columns, dtype=torch.bfloat16),
    }
    shapes = {"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1, "self_attn.o_proj": 1,
              "mlp.gate_proj": 1, "mlp.up_proj": 1, "mlp.down_proj": 1}  # fmt: skip
    for layer in range(layers):
        for name in shapes:
            prefix = f"model.layers.{layer}.{name}."
            tensors[prefix + "qweight"] = torch.randint(0, 1 << 31, (columns // 8, rows), dtype=torch.int32)
            tensors[prefix + "qzeros"] = torch.full((columns // 128, rows // 8), 0x77777777, dtype=torch.int32)
            tensors[prefix + "scales"] = torch.full((columns // 128, rows), 0.001, dtype=torch.float16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(columns, dtype=torch.bfloat16)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    path = write(tmp_path, tensors, config, hidden_size=columns, intermediate_size=columns, num_hidden_layers=layers,
                 num_attention_heads=32, num_key_value_heads=32, vocab_size=512, dtype="bfloat16")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "qcore", "bench", "load", str(path), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["quantized_mib"] > 400
    assert answer["peak_rss_mib"] - answer["baseline_rss_mib"] <= answer["limit_mib"]
    assert answer["above_baseline_mib"] < answer["quantized_mib"] + answer["largest_tensor_mib"] * 1.1 + 150


def test_the_environment_says_which_device_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_DEVICE", "cpu")
    assert find_device().id == find_device("auto").id == "cpu"
    monkeypatch.setenv("QCORE_DEVICE", "abacus:0")
    with pytest.raises(qcore.Refused, match=r"abacus:0.*no such device"):
        find_device()
    assert find_device("cpu").id == "cpu"
