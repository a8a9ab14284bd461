"""Configs and names from GGUF metadata, against transformers' models and gguf-py's own table of names."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from qcore.checkpoint.source import TensorInfo
from qcore.gguf.architectures import ARCHITECTURES
from qcore.gguf.config import model_config
from qcore.gguf.names import parameter_names, row_permutation
from qcore.refusal import Refused

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 4, 2, 16, 64
FILE = Path("model.gguf")

SIZES = {
    "block_count": LAYERS,
    "context_length": 512,
    "embedding_length": HIDDEN,
    "feed_forward_length": 96,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
CONFIG = {
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 512,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GEMMA = {"attention.key_length": 32, "attention.value_length": 32}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The architecture's fields beside SIZES, as llama.cpp's converter writes them, and the config that it writes them from.
    "llama": (
        {"rope.dimension_count": HEAD_DIM, "rope.freq_base": 5e5},
        {"rope_theta": 5e5, "head_dim": HEAD_DIM, "tie_word_embeddings": True},
    ),
    "mistral3": (
        {"attention.key_length": 24, "attention.value_length": 24, "rope.dimension_count": 24, "rope.freq_base": 1e9},
        {"rope_theta": 1e9, "head_dim": 24, "sliding_window": None, "tie_word_embeddings": False},
    ),
    "smollm3": (
        {"rope.dimension_count": HEAD_DIM, "rope.freq_base": 5e6},
        {"rope_theta": 5e6, "no_rope_layers": [1, 1], "tie_word_embeddings": True},
    ),
    "qwen2": ({"rope.freq_base": 1e6}, {"rope_theta": 1e6, "tie_word_embeddings": False}),
    "qwen3": (
        {"rope.freq_base": 1e6, "attention.key_length": 32, "attention.value_length": 32},
        {"rope_theta": 1e6, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "gemma2": (
        {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 64},
        {"head_dim": 32, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 64,
         "query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"],
         "tie_word_embeddings": True},
    ),
    "gemma3": (
        {**GEMMA, "rope.freq_base": 1e6, "attention.sliding_window": 64, "rope.scaling.type": "linear",
         "rope.scaling.factor": 8.0},
        {"head_dim": 32, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 64, "query_pre_attn_scalar": 32,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "tie_word_embeddings": True},
    ),
    "phi3": (
        {"rope.dimension_count": 12, "rope.freq_base": 1e4, "rope.scaling.original_context_length": 512,
         "attention.sliding_window": 0},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 512,
         "sliding_window": None, "tie_word_embeddings": False},
    ),
}  # fmt: skip


def metadata_of(name: str, **changes: Any) -> dict[str, Any]:
    fields = {f"{name}.{key}": value for key, value in {**SIZES, **MODELS[name][0]}.items()}
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    return {"general.architecture": name, **fields, **ids, **{f"{name}.{k}": v for k, v in changes.items()}}


def original_of(name: str, **changes: Any) -> PreTrainedModel:
    """The model that the file was converted from, with random weights."""
    values = {**CONFIG, **MODELS[name][1], **changes}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[ARCHITECTURES[name].model_type](**values)
    return AutoModelForCausalLM.from_config(config).float()


def converted(name: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors under gguf-py's names, changed as llama.cpp's converter changes them."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    name_map = gguf.get_tensor_name_map(arch, LAYERS)
    tensors = {}
    for parameter, value in model.state_dict().items():
        if parameter == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        tensor = name_map.get_name(parameter, try_suffixes=(".weight", ".bias"))
        assert tensor is not None, parameter
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(parameter.split(".")[-2])
        if name in ("llama", "mistral3", "smollm3") and heads:
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if name.startswith("gemma") and parameter.endswith("norm.weight"):
            value = value + 1
        tensors[tensor] = value
    return tensors


def headers(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "F32", tuple(value.shape), FILE, 0, value.nbytes) for name, value in tensors.items()}


def reader(tensors: Mapping[str, torch.Tensor]) -> Callable[[str], list[float]]:
    return lambda name: tensors[name].flatten().tolist()


def nothing_read(name: str) -> list[float]:
    raise AssertionError(f"{name} was read")


@pytest.mark.parametrize("name", ARCHITECTURES)
class TestEveryArchitecture:
    def test_config_is_the_originals(self, name: str) -> None:
        model = original_of(name)
        values = model_config(metadata_of(name), headers(converted(name, model)), nothing_read)
        assert values["architectures"] == [type(model).__name__]
        assert "dtype" not in values and "torch_dtype" not in values
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        got, expected = config.to_dict(), model.config.to_dict()
        ours = {"architectures", "no_rope_layer_interval", "head_dim"}  # stated by us, left to a default there
        assert {k: v for k, v in got.items() if k not in ours and v != expected.get(k)} == {}
        assert set(expected) - set(got) - {"dtype", "torch_dtype"} == set()
        assert config.head_dim == getattr(model.config, "head_dim", None) or HEAD_DIM

    def test_names_and_values_are_the_originals(self, name: str) -> None:
        model = original_of(name)
        tensors = converted(name, model)
        metadata, infos = metadata_of(name), headers(tensors)
        config = CONFIG_MAPPING[ARCHITECTURES[name].model_type].from_dict(model_config(metadata, infos, nothing_read))
        with torch.device("meta"):
            rebuilt = AutoModelForCausalLM.from_config(config)
        expected = {key: value for key, value in model.state_dict().items()
                    if key != "lm_head.weight" or not config.tie_word_embeddings}  # fmt: skip
        assert {key: value.shape for key, value in rebuilt.state_dict().items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }
        names = parameter_names(metadata, infos)
        assert set(names) == set(expected)
        for key, source in names.items():
            value = tensors[source.tensor]
            if source.heads:
                value = value[row_permutation(value.shape[0], source.heads)]
            # 1 + w - 1 loses the last bits of w; all else is only moved
            torch.testing.assert_close(value + source.add, expected[key], rtol=0, atol=1e-6 if source.add else 0)

    def test_a_missing_field_is_named(self, name: str) -> None:
        infos = headers(converted(name, original_of(name)))
        optional = {"attention.head_count_kv"}
        for key in SIZES.keys() - optional:
            metadata = metadata_of(name)
            del metadata[f"{name}.{key}"]
            with pytest.raises(Refused) as refused:
                model_config(metadata, infos, nothing_read)
            assert (refused.value.refusal.code, refused.value.refusal.field) == ("bad-field", f"{name}.{key}")
            assert refused.value.refusal.kind == "bad-file"


HOSTILE = [
    ("block_count", 10**9), ("block_count", 0), ("block_count", True), ("block_count", "2"), ("embedding_length", -64),
    ("embedding_length", 64.0), ("attention.head_count", 0), ("attention.head_count", [4, 4]),
    ("attention.head_count", 5), ("attention.head_count_kv", 3), ("attention.head_count_kv", None),
    ("feed_forward_length", 1 << 60), ("context_length", 0), ("attention.layer_norm_rms_epsilon", math.nan),
    ("attention.layer_norm_rms_epsilon", 0.0), ("attention.layer_norm_rms_epsilon", math.inf), ("rope.freq_base", -1.0),
    ("rope.freq_base", "10000"), ("rope.dimension_count", 0), ("attention.key_length", 1 << 40),
    ("rope.scaling.factor", -2.0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=lambda value: str(value)[:24])
def test_values_that_no_model_has_are_refused(key: str, value: object) -> None:
    infos = headers(converted("llama", original_of("llama")))
    with pytest.raises(Refused) as refused:
        model_config(metadata_of("llama", **{key: value}), infos, nothing_read)
    assert refused.value.refusal.code == "bad-field"
    assert refused.value.refusal.field == f"llama.{key}"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "rope.dimension_count", 8),
        ("llama", "rope.scaling.type", "longrope"),
        ("qwen3", "attention.value_length", 16),
        ("mistral3", "attention.temperature_scale", 0.1),
    ],
)
def test_variants_that_are_not_read_are_refused(name: str, key: str, value: object) -> None:
    infos = headers(converted(name, original_of(name)))
    with pytest.raises(Refused) as refused:
        model_config(metadata_of(name, **{key: value}), infos, nothing_read)
    refusal = refused.value.refusal
    assert (refusal.code, refusal.kind, refusal.field) == ("unknown-variant", "notimpl", f"{name}.{key}")


@pytest.mark.parametrize("found", ["mamba", None, ["llama"], 3])
def test_unknown_architectures_name_the_known_ones(found: object) -> None:
    infos = headers(converted("llama", original_of("llama")))
    metadata = {**metadata_of("llama"), "general.architecture": found}
    for read in (lambda: model_config(metadata, infos, nothing_read), lambda: parameter_names(metadata, infos)):
        with pytest.raises(Refused) as refused:
            read()
        assert (refused.value.refusal.code, refused.value.refusal.kind) == ("unknown-architecture", "notimpl")
        assert all(name in refused.value.refusal.fact for name in ARCHITECTURES)


@pytest.mark.parametrize(
    "tensor",
    ["blk.0.ffn_gate_exps.weight", "blk.2.attn_q.weight", "blk.00.attn_q.weight", "blk.0.attn_norm.bias",
     "output.bias", "output_norm", "blk.0.attn_q", "v.blk.0.attn_q.weight", "blk.-1.attn_q.weight", ""],
)  # fmt: skip
def test_tensors_of_no_parameter_are_refused(tensor: str) -> None:
    infos = headers({**converted("llama", original_of("llama")), tensor: torch.zeros(HIDDEN, HIDDEN)})
    with pytest.raises(Refused) as refused:
        parameter_names(metadata_of("llama"), infos)
    assert (refused.value.refusal.code, refused.value.refusal.tensor) == ("unexpected-tensor", tensor)


def test_tensors_that_must_be_there() -> None:
    tensors = converted("llama", original_of("llama"))
    for needed in ("token_embd.weight", "blk.1.attn_norm.weight"):
        infos = headers({name: value for name, value in tensors.items() if name != needed})
        with pytest.raises(Refused) as refused:
            model_config(metadata_of("llama"), infos, nothing_read)
        assert (refused.value.refusal.code, refused.value.refusal.tensor) == ("missing-tensor", needed)
    with pytest.raises(Refused, match="no tensors"):
        model_config(metadata_of("llama"), {}, nothing_read)


def test_rows_that_do_not_divide_into_heads_are_refused() -> None:
    infos = headers({**converted("llama", original_of("llama")), "blk.0.attn_q.weight": torch.zeros(63, HIDDEN)})
    with pytest.raises(Refused) as refused:
        parameter_names(metadata_of("llama"), infos)
    assert refused.value.refusal.code == "bad-shape"


def test_biases_are_seen_in_the_tensors() -> None:
    model = original_of("llama", attention_bias=True, mlp_bias=True)
    tensors = converted("llama", model)
    values = model_config(metadata_of("llama"), headers(tensors), nothing_read)
    assert values["attention_bias"] is True and values["mlp_bias"] is True
    names = parameter_names(metadata_of("llama"), headers(tensors))
    source = names["model.layers.1.self_attn.k_proj.bias"]
    assert (source.tensor, source.heads) == ("blk.1.attn_k.bias", KV_HEADS)


def test_vocabulary_and_embedding_agree() -> None:
    infos = headers(converted("llama", original_of("llama")))
    metadata = {**metadata_of("llama"), "tokenizer.ggml.tokens": ["x"] * 39}
    with pytest.raises(Refused) as refused:
        model_config(metadata, infos, nothing_read)
    assert refused.value.refusal.code == "bad-shape"
    flat = {**infos, "token_embd.weight": TensorInfo("token_embd.weight", "F32", (), FILE, 0, 4)}
    with pytest.raises(Refused, match="matrix"):
        model_config(metadata_of("llama"), flat, nothing_read)
    for bad in (40, -1, 1.0, "</s>"):
        with pytest.raises(Refused) as refused:
            model_config({**metadata_of("llama"), "tokenizer.ggml.eos_token_id": bad}, infos, nothing_read)
        assert refused.value.refusal.field == "tokenizer.ggml.eos_token_id"


def test_chat_models_end_at_the_end_of_a_turn() -> None:
    infos = headers(converted("llama", original_of("llama")))
    tokens = [f"t{i}" for i in range(40)]
    tokens[7], tokens[8] = "<|im_end|>", "<|eot_id|>"
    types = [1] * 40
    types[7] = 3  # the other one is not a control token, so it is ordinary text
    metadata = {**metadata_of("llama"), "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert model_config(metadata, infos, nothing_read)["eos_token_id"] == [2, 7]
    assert model_config({**metadata, "tokenizer.ggml.eot_token_id": 9}, infos, nothing_read)["eos_token_id"] == [
        2,
        9,
        7,
    ]


LONG_HEADS = {"rope.dimension_count": 128, "attention.key_length": 128, "context_length": 131072}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_again(factor: float) -> None:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    model = original_of("llama", head_dim=128, max_position_embeddings=131072, rope_scaling=dict(scaling))
    plain = original_of("llama", head_dim=128, max_position_embeddings=131072)
    # transformers' own frequencies are the oracle for the factors that the converter stores
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    tensors = {**converted("llama", model), "rope_freqs.weight": factors}
    metadata, infos = metadata_of("llama", **LONG_HEADS), headers(tensors)
    assert model_config(metadata, infos, reader(tensors))["rope_scaling"] == {
        **scaling,
        "factor": pytest.approx(factor),
    }
    assert "rope_freqs.weight" not in {source.tensor for source in parameter_names(metadata, infos).values()}

    tensors["rope_freqs.weight"] = factors * torch.linspace(1, 1.1, len(factors))
    with pytest.raises(Refused) as refused:
        model_config(metadata, infos, reader(tensors))
    assert (refused.value.refusal.code, refused.value.refusal.tensor) == ("unknown-variant", "rope_freqs.weight")
    tensors["rope_freqs.weight"] = torch.ones_like(factors)
    assert "rope_scaling" not in model_config(metadata, infos, reader(tensors))


@pytest.mark.parametrize("values", [[math.nan] * 64, [0.0] * 64, [1.0] * 63])
def test_bad_rotary_factors_are_refused(values: list[float]) -> None:
    tensors = {**converted("llama", original_of("llama", head_dim=128)), "rope_freqs.weight": torch.tensor(values)}
    with pytest.raises(Refused) as refused:
        model_config(metadata_of("llama", **LONG_HEADS), headers(tensors), reader(tensors))
    assert refused.value.refusal.code == ("bad-content" if len(values) == 64 else "bad-shape")


def test_longrope_factors_of_phi3() -> None:
    model = original_of("phi3")
    long, short = torch.linspace(1, 5, 6), torch.linspace(1, 2, 6)
    tensors = {**converted("phi3", model), "rope_factors_long.weight": long, "rope_factors_short.weight": short}
    attention = math.sqrt(1 + math.log(4) / math.log(512))
    changes = {"context_length": 2048, "rope.scaling.attn_factor": attention}
    infos = headers(tensors)
    values = model_config(metadata_of("phi3", **changes), infos, reader(tensors))
    config = CONFIG_MAPPING["phi3"].from_dict(values)
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(attention)
    frequencies = 1 / (short * 10000.0 ** (torch.arange(0, 12, 2) / 12))
    torch.testing.assert_close(rotary.inv_freq, frequencies)
    assert values["rope_scaling"]["long_factor"] == long.tolist()
    parameter_names(metadata_of("phi3"), infos)

    with pytest.raises(Refused) as refused:
        model_config(metadata_of("phi3", **{**changes, "rope.scaling.attn_factor": 1.5}), infos, reader(tensors))
    assert refused.value.refusal.code == "unknown-variant"
    del infos["rope_factors_short.weight"]
    with pytest.raises(Refused) as refused:
        model_config(metadata_of("phi3", **changes), infos, reader(tensors))
    assert refused.value.refusal.code == "missing-tensor"


def test_yarn_as_the_converter_writes_it() -> None:
    changes = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512,
               "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_attn_factor": 1.25, "context_length": 2048}  # fmt: skip
    infos = headers(converted("qwen2", original_of("qwen2")))
    values = model_config(metadata_of("qwen2", **changes), infos, nothing_read)
    assert values["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
                                      "beta_fast": 16.0, "attention_factor": 1.25}  # fmt: skip
    rotary = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen2"].from_dict(values)).model.rotary_emb
    assert rotary.attention_scaling == 1.25
    with pytest.raises(Refused) as refused:
        model_config(metadata_of("qwen2", **changes, **{"rope.scaling.yarn_ext_factor": 0.5}), infos, nothing_read)
    assert refused.value.refusal.code == "unknown-variant"


def test_linear_scaling_is_the_default_kind() -> None:
    infos = headers(converted("llama", original_of("llama")))
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        values = model_config(metadata_of("llama", **{key: 2.0}), infos, nothing_read)
        assert values["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    for changes in ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {"rope.scaling.factor": 1.0}):
        assert "rope_scaling" not in model_config(metadata_of("llama", **changes), infos, nothing_read)


def deep(name: str, layers: int, **changes: Any) -> dict[str, Any]:
    infos = headers(converted(name, original_of(name)))
    for i in range(layers):
        infos[f"blk.{i}.attn_norm.weight"] = infos["blk.0.attn_norm.weight"]
    return model_config(metadata_of(name, block_count=layers, **changes), infos, nothing_read)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gemmas_largest_models_scale_attention_by_the_hidden_size(name: str, layers: int) -> None:
    assert deep(name, layers)["query_pre_attn_scalar"] == HIDDEN // HEADS
    assert deep(name, layers - 1)["query_pre_attn_scalar"] == 32


def test_layers_with_a_window() -> None:
    original = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=12)
    assert deep("gemma3", 12)["layer_types"] == original.layer_types
    stated = [True, False, True]
    assert deep("gemma3", 3, **{"attention.sliding_window_pattern": stated})["layer_types"] == [
        "sliding_attention", "full_attention", "sliding_attention"]  # fmt: skip
    assert deep("gemma3", 3, **{"attention.sliding_window_pattern": 1})["layer_types"] == ["full_attention"] * 3
    assert deep("gemma3", 3, **{"attention.sliding_window": 0})["layer_types"] == ["full_attention"] * 3
    with pytest.raises(Refused):
        deep("gemma3", 4, **{"attention.sliding_window_pattern": stated})


def test_layers_without_a_rotary_embedding() -> None:
    original = CONFIG_MAPPING["smollm3"](num_hidden_layers=9)
    assert deep("smollm3", 9)["no_rope_layers"] == original.no_rope_layers


@pytest.mark.parametrize(("rows", "heads"), [(64, 4), (32, 1), (6, 3), (128, 2)])
def test_row_permutation_undoes_the_converters(rows: int, heads: int) -> None:
    originals = torch.arange(rows)
    stored = originals.reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
    assert torch.equal(stored[row_permutation(rows, heads)], originals)
    assert row_permutation(rows, heads).dtype == torch.int64
