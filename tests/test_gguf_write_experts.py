"""Mixtures of experts written to GGUF: as transformers' models have them, as gguf-py names them, as llama.cpp types them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qcore
from commands import command
from mixture_shapes import MODELS, header_of, shortened
from mixtures import EXPERTS, HIDDEN, INNER, Mixture, Tensors, gptq, logits
from qcore.blocks.dequantize import dequantize_blocks
from qcore.blocks.quantize import quantize_blocks
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.gguf_writer import GgufTensor, write_gguf
from qcore.checkpoint.open import open_checkpoint
from qcore.convert import convert
from qcore.gguf.architectures import MIXTURES
from qcore.gguf.contents import Contents, contents_of
from qcore.gguf.make import recipe_of, save_gguf, types_of
from qcore.refusal import Refusal, Refused
from test_experts import FORMATS, GPTQ
from test_experts import quantized as quantized_parts
from test_gguf_experts import CHANGES, tensors_of
from test_gguf_write import BASE, GOLDEN, VOCABULARY, imatrix
from test_mxfp4 import CONFIG as MXFP4
from test_mxfp4 import quantized as mxfp4_experts

DOWN = "blk.1.ffn_down_exps.weight"


def made(name: str, **changes: Any) -> Mixture:
    """A model that llama.cpp can say, with the vocabulary of a real tokenizer."""
    return Mixture(MIXTURES[name].model_type, vocab_size=VOCABULARY, **{**CHANGES.get(name, {}), **changes})


def written(folder: Path, mixture: Mixture, tensors: Tensors, quantization: dict[str, Any] | None = None) -> Path:
    path = mixture.write(folder, {name: value.contiguous() for name, value in tensors.items()}, quantization)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BASE / file, folder / file)
    return path


def file_of(path: Path) -> GgufSource:
    source = open_checkpoint(path).files.source
    assert isinstance(source, GgufSource)
    return source


def refused(make: Callable[[], object]) -> Refusal:
    with pytest.raises(Refused) as caught:
        make()
    return caught.value.refusal


# --- every architecture


@pytest.mark.parametrize("spelled", ["apart", "stacked"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_comes_back(tmp_path: Path, name: str, spelled: str) -> None:
    """Experts one by one, as transformers saves them, and stacked, as its models hold them."""
    mixture = made(name)
    expected = mixture.logits()
    tensors = mixture.tensors() if spelled == "apart" else dict(mixture.model.state_dict())
    path = convert(written(tmp_path / "model", mixture, tensors), "gguf", tmp_path / "model.gguf")
    assert torch.equal(logits(qcore.load_model(path, dtype=torch.float32)), expected)
    source = file_of(path)
    theirs = tensors_of(name, mixture)
    assert source.tensors.keys() == theirs.keys()
    for tensor, values in theirs.items():
        assert torch.equal(source.read(tensor), values), tensor
    metadata = source.metadata
    fields = {"expert_count": EXPERTS, "expert_used_count": 2}
    if name != "llama":
        fields["expert_feed_forward_length"] = INNER
    if name == "qwen2moe":
        fields["expert_shared_feed_forward_length"] = 64
    assert {key: metadata[f"{name}.{key}"] for key in fields} == fields


@pytest.mark.parametrize(
    ("name", "widths"),
    [("qwen2moe", {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}),
     ("qwen3moe", {"moe_intermediate_size": 768})],
)  # fmt: skip
def test_transformers_loads_the_file(tmp_path: Path, name: str, widths: dict[str, int]) -> None:
    """It reads two of these architectures, with experts as wide as one model's."""
    mixture = made(name, **widths)
    expected = mixture.logits()
    source = written(tmp_path / "model", mixture, mixture.tensors())
    path = save_gguf(open_checkpoint(source), tmp_path / "model.gguf", "f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    for layer in theirs.model.layers:
        layer.mlp.gate.norm_topk_prob = mixture.config.norm_topk_prob  # which no field tells, and llama.cpp assumes
    assert torch.allclose(logits(theirs.eval()), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_keep_their_dtype_and_what_chooses_them_is_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    mixture = made("gpt-oss")
    tensors = {name: value.to(dtype) for name, value in mixture.rest.items()}
    source = written(tmp_path / "model", mixture, tensors)
    path = convert(source, "gguf", tmp_path / "model.gguf")
    kind = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    for tensor, info in file_of(path).tensors.items():
        plain = "norm" in tensor or "gate_inp" in tensor or "sinks" in tensor or tensor.endswith("bias")
        assert info.dtype == ("F32" if plain else kind), tensor
    assert logits(qcore.load_model(path, dtype=torch.float32)).equal(
        logits(qcore.load_model(source, dtype=torch.float32))
    )


# --- quantized experts


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["llama", "qwen2moe", "qwen3moe"])
def test_quantized_experts_keep_every_number(tmp_path: Path, name: str, form: str) -> None:
    maker, config = FORMATS[form]

    def make(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts, values = maker(weight)
        if form == "gptq":
            return parts, values
        parts["weight_scale"] = parts["weight_scale"].half().float()  # which is what a block's scale is
        return parts, values

    mixture = made(name)
    source = written(tmp_path / "model", mixture, quantized_parts(mixture, make), config)
    path = convert(source, "gguf", tmp_path / "model.gguf")
    kinds = {info.dtype for tensor, info in file_of(path).tensors.items() if "_exps" in tensor}
    assert kinds == {"Q4_0"}
    before, after = (logits(qcore.load_model(p, dtype=torch.float32)) for p in (source, path))
    assert torch.allclose(before, after, atol=1e-5)


def test_mxfp4_experts_go_over_bit_for_bit(tmp_path: Path) -> None:
    mixture = made("gpt-oss")
    source = written(tmp_path / "model", mixture, mxfp4_experts(mixture), MXFP4)
    path = convert(source, "gguf", tmp_path / "model.gguf")
    held = file_of(path)
    assert {held.tensors[t].dtype for t in held.tensors if t.endswith("exps.weight")} == {"MXFP4"}
    assert {held.tensors[t].dtype for t in held.tensors if t.endswith("exps.bias")} == {"F32"}
    opened = open_checkpoint(path)
    for part, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
        expected = mixture.rest["model.layers.0.mlp.experts.gate_up_proj"].transpose(1, 2)[:, rows]
        assert torch.equal(opened.dequantize(f"model.layers.0.mlp.experts.{part}_proj"), expected)
    assert torch.allclose(logits(qcore.load_model(path, dtype=torch.float32)), mixture.logits(), atol=1e-5)


def test_the_experts_of_a_layer_get_one_type(tmp_path: Path) -> None:
    """The smallest that holds all of them."""
    mixture = made("qwen3moe")
    tensors = quantized_parts(mixture, gptq)
    wide = "model.layers.1.mlp.experts.2.down_proj"
    parts, mixture.parts[wide] = gptq(mixture.parts[wide], bits=8)
    tensors |= {f"{wide}.{part}": value for part, value in parts.items()}
    config = {**GPTQ, "dynamic": {r"+:.*1\.mlp\.experts\.2\.down_proj": {"bits": 8}}}
    source = written(tmp_path / "model", mixture, tensors, config)
    path = convert(source, "gguf", tmp_path / "model.gguf")
    held = file_of(path).tensors
    assert held[DOWN].dtype == "Q8_0" and held["blk.0.ffn_down_exps.weight"].dtype == "Q4_0"
    opened = open_checkpoint(path)
    assert torch.equal(opened.dequantize("model.layers.1.mlp.experts.down_proj")[2], mixture.parts[wide])


def test_plain_experts_beside_quantized_ones_are_refused_and_are_quantized(tmp_path: Path) -> None:
    mixture = made("qwen3moe")
    bare = "model.layers.1.mlp.experts.2.down_proj"
    tensors = quantized_parts(mixture, gptq, [module for module in mixture.parts if module != bare])
    config = {**GPTQ, "dynamic": {r"-:.*1\.mlp\.experts\.2\.down_proj": {}}}
    source = written(tmp_path / "model", mixture, tensors, config)
    refusal = refused(lambda: convert(source, "gguf", tmp_path / "model.gguf"))
    assert (refusal.code, refusal.subject) == ("not-representable", bare)
    path = save_gguf(open_checkpoint(source), tmp_path / "model.gguf", "f32")
    assert torch.allclose(logits(qcore.load_model(path, dtype=torch.float32)), mixture.logits(), atol=1e-5)


def test_a_quantized_router_becomes_float32(tmp_path: Path) -> None:
    mixture = made("llama", num_local_experts=8)
    tensors = quantized_parts(mixture, gptq)
    for layer in range(2):
        spelled = f"model.layers.{layer}.block_sparse_moe.gate"
        parts, values = gptq(tensors.pop(f"{spelled}.weight"))
        mixture.rest[f"model.layers.{layer}.mlp.gate.weight"] = values
        tensors |= {f"{spelled}.{part}": tensor for part, tensor in parts.items()}
    path = convert(written(tmp_path / "model", mixture, tensors, GPTQ), "gguf", tmp_path / "model.gguf")
    assert file_of(path).tensors["blk.0.ffn_gate_inp.weight"].dtype == "F32"
    assert torch.allclose(logits(qcore.load_model(path, dtype=torch.float32)), mixture.logits(), atol=1e-5)


def test_experts_are_quantized_in_flight(tmp_path: Path) -> None:
    mixture = made("qwen3moe")
    source = open_checkpoint(written(tmp_path / "model", mixture, mixture.tensors()))
    path = convert(source.quantized("rtn:W4A16-g32-sym"), "gguf", tmp_path / "model.gguf")
    kinds = {info.dtype for tensor, info in file_of(path).tensors.items() if tensor.endswith("exps.weight")}
    assert kinds == {"Q4_0"}


def test_quantized_inputs_are_refused(tmp_path: Path) -> None:
    maker, config = FORMATS["fp8"]
    mixture = made("qwen3moe")
    source = written(tmp_path / "model", mixture, quantized_parts(mixture, maker), config)
    refusal = refused(lambda: save_gguf(open_checkpoint(source), tmp_path / "model.gguf", "q8_0"))
    assert refusal.code == "not-representable" and "experts.0" in refusal.subject


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_quantized_each_for_itself(tmp_path: Path, name: str) -> None:
    mixture = made(name)
    mixture.logits()
    source = written(tmp_path / "model", mixture, mixture.tensors())
    path = save_gguf(open_checkpoint(source), tmp_path / "model.gguf", "q8_0")
    held, theirs = file_of(path), tensors_of(name, mixture)
    for tensor in theirs:
        if not tensor.endswith("exps.weight"):
            continue
        assert held.tensors[tensor].dtype == "Q8_0"
        expected = quantize_blocks("q8_0", theirs[tensor].flatten(0, 1), None)
        assert torch.equal(held.read(tensor), expected), tensor
    assert {held.tensors[t].dtype for t in theirs if "gate_inp" in t or t.endswith("bias")} == {"F32"}
    found = logits(qcore.load_model(path, dtype=torch.float32))
    expected = logits(mixture.model)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_gguf_mixtures_are_quantized_again(tmp_path: Path) -> None:
    mixture = made("qwen2moe")
    source = written(tmp_path / "model", mixture, mixture.tensors())
    first = save_gguf(open_checkpoint(source), tmp_path / "q8.gguf", "q8_0")
    second = save_gguf(open_checkpoint(first), tmp_path / "q4.gguf", "q4_0")
    again = convert(first, "gguf", tmp_path / "again.gguf")
    assert again.read_bytes() == first.read_bytes()
    before, after = file_of(first), file_of(second)
    assert after.tensors["blk.0.ffn_gate_exps.weight"].dtype == "Q4_0"
    for number in range(EXPERTS):
        rows = dequantize_blocks("q8_0", before.read_rows(DOWN, number, number + 1))
        assert torch.equal(after.read_rows(DOWN, number, number + 1), quantize_blocks("q4_0", rows, None))


# --- types and importance

TYPES = json.loads((GOLDEN / "llama-cpp-expert-types.json").read_text())["types"]


@pytest.fixture(scope="module")
def headers() -> dict[str, Contents]:
    source = open_checkpoint(BASE)  # of which only the path is used
    return {model: Contents(source, *header_of(model), {}, {}, {}) for model in MODELS}


@pytest.mark.parametrize("case", TYPES)
def test_types_are_llama_cpps(headers: dict[str, Contents], case: str) -> None:
    model, scheme, asked = case.split()
    for guided in {"either": (False, True), "plain": (False,), "guided": (True,)}[asked]:
        types = types_of(headers[model], recipe_of(scheme), [], guided=guided)
        assert shortened([kind.upper() for kind in types.values()]) == TYPES[case]


def test_importance_is_each_experts_own(tmp_path: Path) -> None:
    mixture = made("qwen3moe")
    mixture.logits()
    source = open_checkpoint(written(tmp_path / "model", mixture, mixture.tensors()))
    torch.manual_seed(1)
    given = torch.rand(EXPERTS, INNER) ** 4 + 1e-3
    given[2] = 0  # which no token reached
    flat = imatrix(tmp_path / "flat.imatrix", {DOWN: given.flatten()})
    sums, counts = given * 4, torch.full((EXPERTS, 1), 4.0)
    sums[2], counts[2] = 0, 0
    write_gguf(tmp_path / "imatrix.gguf", {"general.type": "imatrix"}, [
        GgufTensor(f"{DOWN}.in_sum2", "F32", (EXPERTS, INNER), lambda: [sums]),
        GgufTensor(f"{DOWN}.counts", "F32", (EXPERTS, 1), lambda: [counts]),
    ])  # fmt: skip
    weights = tensors_of("qwen3moe", mixture)[DOWN]
    for number, file in enumerate((flat, tmp_path / "imatrix.gguf")):
        held = file_of(save_gguf(source, tmp_path / f"{number}.gguf", "iq4_nl", importance=file))
        for expert in range(EXPERTS):
            own = torch.ones(INNER) if expert == 2 else given[expert]
            expected = quantize_blocks("iq4_nl", weights[expert], own)
            assert torch.equal(held.read_rows(DOWN, expert, expert + 1), expected)
    assert not torch.equal(expected, quantize_blocks("iq4_nl", weights[-1], given[0])), "the importances tell"
    wrong = imatrix(tmp_path / "wrong.imatrix", {DOWN: torch.ones(INNER)})
    refusal = refused(lambda: save_gguf(source, tmp_path / "x.gguf", "iq4_nl", importance=wrong))
    assert (refusal.code, refusal.tensor, refusal.field) == ("bad-shape", DOWN, "values")
    assert str(EXPERTS * INNER) in str(refusal)


def test_one_expert_is_in_memory_at_a_time(tmp_path: Path) -> None:
    mixture = made("llama")
    contents = contents_of(open_checkpoint(written(tmp_path / "model", mixture, mixture.tensors())))
    for pieces in (contents.rows(DOWN), contents.exact(DOWN, "F32")):
        assert [tuple(piece.shape) for piece in pieces] == [(HIDDEN, INNER)] * EXPERTS


# --- what is refused


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen2moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen2moe", {"qkv_bias": False}, "qkv_bias"),
        ("llama", {"sliding_window": 16}, "sliding_window"),
        ("gpt-oss", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
        ("gpt-oss", {"rope_parameters": {"rope_type": "yarn", "factor": 32.0, "rope_theta": 150000.0, "beta_fast": 32.0,
                                         "beta_slow": 1.0, "original_max_position_embeddings": 4096}}, "rope_parameters"),
        ("qwen3moe", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)  # fmt: skip
def test_a_mixture_that_llama_cpp_would_run_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], key: str
) -> None:
    mixture = made(name, **changes)
    source = written(tmp_path / "model", mixture, mixture.tensors())
    for make in (convert, lambda source, _, out: save_gguf(open_checkpoint(source), out, "q8_0")):
        refusal = refused(lambda make=make: make(source, "gguf", tmp_path / "model.gguf"))  # type: ignore[misc]
        assert (refusal.code, refusal.field) == ("not-representable", key)
    assert list(tmp_path.iterdir()) == [source]


LAYER = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("code", "tensor", "changes"),
    [
        ("missing-tensor", "2.up_proj.weight", {"2.up_proj.weight": None}),
        ("unexpected-tensor", "4.up_proj.weight", {"4.up_proj.weight": torch.zeros(INNER, HIDDEN)}),
        ("unexpected-tensor", "1.up_proj.bias", {"1.up_proj.bias": torch.zeros(INNER)}),
        ("unexpected-tensor", "1.w3.weight", {"1.w3.weight": torch.zeros(INNER, HIDDEN)}),
        ("unexpected-tensor", "1.up_proj.extra", {"1.up_proj.extra": torch.zeros(INNER, HIDDEN)}),
        ("unexpected-tensor", "down_proj", {"down_proj": torch.zeros(EXPERTS, HIDDEN, INNER)}),
        ("bad-shape", "1.up_proj.weight", {"1.up_proj.weight": torch.zeros(HIDDEN, INNER)}),
    ],
)
def test_damage_to_experts_is_named(
    tmp_path: Path, code: str, tensor: str, changes: dict[str, torch.Tensor | None]
) -> None:
    mixture = made("qwen3moe")
    tensors = mixture.tensors()
    for name, value in changes.items():
        tensors.pop(f"{LAYER}.{name}", None)
        if value is not None:
            tensors[f"{LAYER}.{name}"] = value
    source = written(tmp_path / "model", mixture, tensors)
    refusal = refused(lambda: convert(source, "gguf", tmp_path / "model.gguf"))
    assert refusal.code == code
    twins = {"down_proj": f"{LAYER}.0.down_proj.weight", "1.w3.weight": f"{LAYER}.1.up_proj.weight"}
    assert refusal.tensor in (f"{LAYER}.{tensor}", twins.get(tensor)), refusal


def test_biases_of_experts_are_asked_for_where_llama_cpp_needs_them(tmp_path: Path) -> None:
    mixture = made("gpt-oss")
    tensors = mixture.tensors()
    del tensors[f"{LAYER}.gate_up_proj_bias"]
    source = written(tmp_path / "model", mixture, tensors)
    assert refused(lambda: convert(source, "gguf", tmp_path / "model.gguf")).code == "missing-tensor"


def test_other_mixtures_are_named(tmp_path: Path) -> None:
    mixture = Mixture("phimoe", vocab_size=VOCABULARY)
    source = written(tmp_path / "model", mixture, mixture.tensors())
    refusal = refused(lambda: convert(source, "gguf", tmp_path / "model.gguf"))
    assert (refusal.code, refusal.field) == ("unknown-architecture", "model_type") and "mixtral" in str(refusal)


# --- the command line


def test_the_commands(tmp_path: Path) -> None:
    mixture = made("llama")
    source = written(tmp_path / "model", mixture, mixture.tensors())
    done = command("quantize", source, "--scheme", "MXFP4_MOE", "--out", tmp_path / "q.gguf", "--json")
    assert done.returncode == 0, done.stderr
    held = file_of(tmp_path / "q.gguf")
    assert held.tensors[DOWN].dtype == "MXFP4" and held.tensors["blk.0.attn_q.weight"].dtype == "Q8_0"
    assert held.tensors["blk.0.ffn_gate_inp.weight"].dtype == "F32"
    assert held.metadata["general.file_type"] == 38
    done = command("convert", source, "--format", "gguf", "--out", tmp_path / "f32.gguf")
    assert done.returncode == 0, done.stderr
