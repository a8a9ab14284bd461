"""GGUF files made from checkpoints: what is written is what was there, for qcore, gguf-py and transformers alike."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcore
from commands import command
from makers import LLAMA, dense_llama, gptq_tensors
from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.architecture import model_class
from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.convert import convert
from qcore.gguf.contents import Contents, contents_of
from qcore.gguf.encode_tokenizer import PROBES
from qcore.gguf.make import recipe_of, save_gguf, types_of
from qcore.gguf.recipes import RECIPES
from qcore.refusal import Refused
from test_gguf_model import MODELS, original_of

GOLDEN = Path(__file__).parent / "golden"
BASE = GOLDEN / "base"
SHARED = Path(os.environ.get("QCORE_GOLDEN", GOLDEN))
VOCABULARY = 1024
CHANGES: dict[str, list[dict[str, Any]]] = {
    # Configs beside those of the reader's tests.
    "llama": [
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 64, "max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    "mistral3": [{"sliding_window": 64}],
    "qwen2": [{"max_position_embeddings": 2048, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16.0}}],
    "gemma2": [{"layer_types": ["full_attention", "sliding_attention"]}],
    "gemma3": [{"rope_scaling": None, "layer_types": ["full_attention", "sliding_attention"]}],
    "phi3": [{"max_position_embeddings": 2048, "sliding_window": 32, "rope_scaling": {
        "type": "longrope", "long_factor": [1.5] * 6, "short_factor": [1.0] * 5 + [1.25]}}],
}  # fmt: skip
CASES = [(name, changes) for name in MODELS for changes in ({}, *CHANGES.get(name, ()))]


def refusal(error: pytest.ExceptionInfo[Refused]) -> tuple[str, str | None]:
    return error.value.refusal.code, error.value.refusal.field


def folder_of(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A transformers checkpoint with random weights and the tokenizer of a real one."""
    model = original_of(name, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=3, **changes)
    model.to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BASE / file, folder / file)
    return folder


def rounded(value: Any) -> Any:
    """GGUF stores float32."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return (
        [rounded(part) for part in value]
        if isinstance(value, list)
        else float(f"{value:.6g}")
        if isinstance(value, float)
        else value
    )


def assert_same(source: Checkpoint, written: Checkpoint) -> None:
    names = set(source.parameters)
    if model_class(source)[1].tie_word_embeddings:
        names -= {"lm_head.weight"}
    assert set(written.parameters) == names
    gemma = "gemma" in source.config["model_type"]
    for name in names:
        before, after = source.parameter(name).float(), written.parameter(name).float()
        shift = 1 if gemma and name.endswith("norm.weight") else 0
        assert torch.equal(before + shift, after + shift), name
    ours, theirs = source.load_tokenizer(), written.load_tokenizer()
    for text in PROBES:
        assert ours(text).input_ids == theirs(text).input_ids
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.chat_template) == (
        theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.chat_template)  # fmt: skip


# --- every architecture


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_a_dense_model_comes_back(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    source = open_checkpoint(folder_of(tmp_path / "model", name, **changes))
    written = open_checkpoint(convert(source.path, "gguf", tmp_path / "model.gguf"))
    assert {info.dtype for info in written.files.source.tensors.values()} == {"F32"}
    assert_same(source, written)
    before, after = (rounded(model_class(checkpoint)[1].to_dict()) for checkpoint in (source, written))
    loose = {"dtype", "architectures", "no_rope_layer_interval"}
    if name == "mistral3" and not changes:  # without a window it is a llama
        loose |= {"model_type"}
    assert {
        key: (value, after.get(key)) for key, value in before.items() if key not in loose and value != after.get(key)
    } == {}
    tokens = torch.arange(4, 12)[None]
    with torch.inference_mode():
        logits = [qcore.load_model(c.path, dtype=torch.float32)(tokens).logits for c in (source, written)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_keep_their_dtype_and_vectors_are_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    source = open_checkpoint(folder_of(tmp_path / "model", "gemma3", dtype))
    written = open_checkpoint(convert(source.path, "gguf", tmp_path / "model.gguf"))
    kind = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    for info in written.files.source.tensors.values():
        assert info.dtype == (kind if len(info.shape) == 2 else "F32")
    assert_same(source, written)


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters"),
        ("llama", {"head_dim": 64, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
            "original_max_position_embeddings": 8192}}, "rope_parameters"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "layer_types"),
    ],
)  # fmt: skip
def test_a_config_that_gguf_cannot_say_is_refused(tmp_path: Path, name: str, changes: dict[str, Any], key: str) -> None:
    folder = folder_of(tmp_path / "model", name, **changes)
    with pytest.raises(Refused) as error:
        convert(folder, "gguf", tmp_path / "model.gguf")
    assert refusal(error) == ("not-representable", key)
    assert list(tmp_path.iterdir()) == [folder]


def test_unknown_architectures_and_tensors_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(Refused) as error:
        convert(folder, "gguf", tmp_path / "model.gguf")
    assert refusal(error) == ("unknown-architecture", "model_type")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.extra.weight": torch.zeros(4)}, folder / "model.safetensors")
    with pytest.raises(Refused) as error:
        convert(folder, "gguf", tmp_path / "model.gguf")
    assert (error.value.refusal.code, error.value.refusal.tensor) == (
        "unexpected-tensor",
        "model.layers.0.extra.weight",
    )


# --- GGUF to GGUF


@pytest.mark.parametrize("name", ["gguf-q4_0", "gguf-q4_k_m"])
def test_gguf_files_are_carried_over(tmp_path: Path, name: str) -> None:
    source = open_checkpoint(GOLDEN / name)
    written = open_checkpoint(convert(source.path, "gguf", tmp_path / "again.gguf"))
    assert written.files.source.metadata == source.files.source.metadata
    assert list(written.files.source.tensors) == list(source.files.source.tensors)
    for tensor, info in source.files.source.tensors.items():
        assert info.dtype == written.files.source.tensors[tensor].dtype
        assert torch.equal(source.files.source.read(tensor), written.files.source.read(tensor))


def test_gguf_files_are_quantized_again(tmp_path: Path) -> None:
    source = open_checkpoint(GOLDEN / "gguf-q4_0")
    written = open_checkpoint(save_gguf(source, tmp_path / "q8.gguf", "q8_0"))
    assert {str(scheme.weight) for scheme in written.plan.values() if scheme} == {"gguf:q8_0"}
    for module in source.layers:
        before, after = source.dequantize(module), written.dequantize(module)
        assert (before - after).norm() / before.norm() < 0.01
    metadata = {**source.files.source.metadata, "general.file_type": 7}
    assert written.files.source.metadata == metadata


# --- quantized layers


def quantized_llama(folder: Path, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int) -> Path:
    """A llama whose down_proj is GPTQ's; the group of a column is its number // group size."""
    module = "model.layers.0.mlp.down_proj"
    tensors = dense_llama()
    del tensors[f"{module}.weight"]
    columns = codes.shape[1] // scales.shape[1]
    tensors |= {
        f"{module}.{part}": value for part, value in gptq_tensors(codes, zeros, scales, bits, None, v1=True).items()
    }
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": columns, "desc_act": False, "sym": False,
                    "modules_in_block_to_quantize": [["mlp.down_proj"]], "lm_head": False,
                    "dynamic": {r"-:.*(self_attn|gate_proj|up_proj).*": {}}}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({**LLAMA, "vocab_size": VOCABULARY, "quantization_config": quantization})
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(VOCABULARY, tensors[name].shape[1]) / 8
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BASE / file, folder / file)
    return folder


POWERS = torch.tensor([0.25, 0.5, 0.125])


@pytest.mark.parametrize(
    ("bits", "zero", "scales", "expected"),
    [
        (4, 8, "float16", "q4_0"),  # symmetric
        (2, 2, "float16", "q4_0"),
        (3, 4, "float16", "q4_0"),
        (4, 3, "power", "q4_1"),  # the minimum is a float16 as well
        (4, 3, "float16", "q5_0"),
        (8, 128, "float16", "q8_0"),
        (4, 8, "float32", None),
        (8, 60, "float16", None),
    ],
)
def test_integers_become_blocks_where_that_is_exact(
    tmp_path: Path, bits: int, zero: int, scales: str, expected: str | None
) -> None:
    codes = torch.randint(0, 1 << bits, (64, 96))
    codes[0, :2] = torch.tensor([0, (1 << bits) - 1])
    factors = {
        "float16": torch.rand(64, 3).half(),
        "power": POWERS.expand(64, 3).half(),
        "float32": torch.rand(64, 3) + 1e-3,
    }
    source = quantized_llama(tmp_path / "model", codes, torch.full((64, 3), zero), factors[scales], bits)
    out = tmp_path / "model.gguf"
    if expected is None:
        with pytest.raises(Refused) as error:
            convert(source, "gguf", out)
        assert error.value.refusal.code == "not-representable" and "qcore quantize" in error.value.refusal.fix
        assert not out.exists()
        return
    written = open_checkpoint(convert(source, "gguf", out))
    assert written.files.source.tensors["blk.0.ffn_down.weight"].dtype == expected.upper()
    module = "model.layers.0.mlp.down_proj"
    assert torch.equal(written.dequantize(module), open_checkpoint(source).dequantize(module))


EXACT = {
    "gptqmodel-gptq-4bit-sym": {"Q4_0"}, "gptqmodel-gptq-3bit-sym": {"Q4_0"}, "llmcompressor-w4a16-gptq": {"Q4_0"},
    "autoawq-gemm-w4-zp": {"Q5_0"}, "llmcompressor-mxfp4a16": {"MXFP4"}, "llmcompressor-w4a16-awq-asym": {"Q5_0"},
    "gptqmodel-gptq-8bit-sym": {"Q8_0"},
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in EXACT if (SHARED / name).is_dir()])
def test_real_checkpoints_keep_every_number(tmp_path: Path, name: str) -> None:
    path = SHARED / name
    source, written = open_checkpoint(path), open_checkpoint(convert(path, "gguf", tmp_path / "model.gguf"))
    kinds = {written.files.source.tensors[t].dtype for t in written.files.source.tensors} - {"F32", "F16", "BF16"}
    assert kinds <= EXACT[name] | {"Q5_1", "Q4_1"} and kinds
    for module in source.layers:
        assert torch.equal(source.dequantize(module), written.dequantize(module)), module


@pytest.mark.parametrize(
    "name", ["llmcompressor-fp8-block", "llmcompressor-w8a8-int8-dynamic", "gptqmodel-gptq-4bit-asym-descact", "bitsandbytes-nf4-dq"]
)  # fmt: skip
def test_what_no_block_holds_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused) as error:
        convert(GOLDEN / name, "gguf", tmp_path / "model.gguf")
    assert error.value.refusal.code == "not-representable"
    assert list(tmp_path.iterdir()) == []


# --- quantizing

UNKNOWN_TO_GGUF_PY = {"q1_0", "q2_0", "nvfp4"}


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_type_is_read_by_gguf_py_as_by_us(tmp_path: Path, kind: str) -> None:
    source = open_checkpoint(BASE)
    path = save_gguf(source, tmp_path / "model.gguf", kind, overrides={"": kind})
    written = open_checkpoint(path)
    matrices = {name: info for name, info in written.files.source.tensors.items() if len(info.shape) == 2}
    assert {info.dtype for info in matrices.values()} == {kind.upper()}
    if kind in UNKNOWN_TO_GGUF_PY:
        return
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name not in matrices or not tensor.name.startswith(("token_embd", "blk.0.ffn", "blk.1.attn_v")):
            continue
        theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        ours = next(n for n, p in written._method._names(written.files).items() if p.tensor == tensor.name)  # type: ignore[attr-defined]
        assert torch.equal(written.dequantize(ours.removesuffix(".weight")), theirs)


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_k_m", "q2_k", "iq4_xs"])
def test_transformers_loads_the_file(tmp_path: Path, kind: str) -> None:
    source = open_checkpoint(BASE)
    path = save_gguf(source, tmp_path / "model.gguf", kind)
    written = open_checkpoint(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    for module in written.layers:
        assert torch.equal(theirs[f"{module}.weight"], written.dequantize(module)), module
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "The cat sat on the mat, it's fine."
    assert tokenizer(text).input_ids == source.load_tokenizer()(text).input_ids


MIXTURES = json.loads((GOLDEN / "llama-cpp-types.json").read_text())


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contents]:
    """The models that llama.cpp was given: two layers with an output matrix, and sixteen without, four heads to a key."""
    deep = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 8,
            "num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 32}  # fmt: skip
    folder = folder_of(tmp_path_factory.mktemp("mixtures") / "deep", "llama", torch.bfloat16, **deep)
    return {"base": contents_of(open_checkpoint(BASE)), "deep": contents_of(open_checkpoint(folder))}


@pytest.mark.parametrize("case", MIXTURES["types"])
def test_mixtures_are_llama_cpps(contents: dict[str, Contents], case: str) -> None:
    """Which tensor gets which type, for every mixture that llama.cpp makes."""
    model, scheme, guided = case.split()
    types = types_of(contents[model], recipe_of(scheme), [], guided=guided == "guided")
    expected = zip(MIXTURES["tensors"][model], MIXTURES["types"][case].split(), strict=True)
    assert {tensor: kind.upper() for tensor, kind in types.items()} == dict(expected)


def test_a_mixture_is_written_as_planned(tmp_path: Path) -> None:
    path = save_gguf(open_checkpoint(BASE), tmp_path / "model.gguf", "q4_k_m")
    found = {name: info.dtype for name, info in open_checkpoint(path).files.source.tensors.items()}
    assert found == dict(zip(MIXTURES["tensors"]["base"], MIXTURES["types"]["base q4_k_m plain"].split(), strict=True))
    assert open_checkpoint(path).files.source.metadata["general.file_type"] == RECIPES["q4_k_m"].number


def test_rows_that_are_no_whole_blocks_get_another_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_checkpoint(folder_of(tmp_path / "model", "qwen3"))  # rows of 64, 96 and 128
    path = save_gguf(source, tmp_path / "model.gguf", "Q4_K_M")
    found = {name: info.dtype for name, info in open_checkpoint(path).files.source.tensors.items()}
    assert found["token_embd.weight"] == "Q8_0" and found["blk.0.attn_q.weight"] == "Q5_0"
    assert found["blk.1.ffn_down.weight"] == "Q8_0" and found["blk.0.attn_norm.weight"] == "F32"
    assert "no whole blocks of Q4_K" in caplog.text


def imatrix(path: Path, entries: dict[str, torch.Tensor]) -> Path:
    data = len(entries).to_bytes(4, "little")
    for name, values in entries.items():
        data += len(name).to_bytes(4, "little") + name.encode() + (1).to_bytes(4, "little")
        data += values.numel().to_bytes(4, "little") + values.float().numpy().tobytes()
    path.write_bytes(data)
    return path


def test_an_importance_matrix_moves_the_error(tmp_path: Path) -> None:
    source = open_checkpoint(BASE)
    module, tensor = "model.layers.0.mlp.down_proj", "blk.0.ffn_down.weight"
    importance = torch.ones(512)
    importance[::4] = 1000.0
    file = imatrix(tmp_path / "a.imatrix", {tensor: importance})
    errors = []
    for name, guide in (("plain", None), ("guided", file)):
        path = save_gguf(source, tmp_path / f"{name}.gguf", "iq3_s", importance=guide)
        written = open_checkpoint(path)
        errors.append((written.dequantize(module) - source.dequantize(module))[:, ::4].square().mean())
        assert written.files.source.metadata.get("quantize.imatrix.file") == (guide and file.name)
    assert errors[1] < 0.9 * errors[0]
    with pytest.raises(Refused) as error:
        save_gguf(
            source, tmp_path / "b.gguf", "iq3_s", importance=imatrix(tmp_path / "b.imatrix", {tensor: torch.ones(7)})
        )
    assert error.value.refusal.code == "bad-shape"


@pytest.mark.parametrize(
    ("kind", "overrides", "subject"),
    [("q4_9", {}, "q4_9"), ("q4_0", {"ffn": "q4_9"}, "q4_9"), ("q4_0", {"(": "q8_0"}, "(")],
)
def test_unknown_types_are_named(tmp_path: Path, kind: str, overrides: dict[str, str], subject: str) -> None:
    with pytest.raises(Refused) as error:
        save_gguf(open_checkpoint(BASE), tmp_path / "model.gguf", kind, overrides=overrides)
    assert (error.value.refusal.code, error.value.refusal.subject) == ("bad-argument", subject)


def test_overrides_win_over_the_mixture(tmp_path: Path) -> None:
    overrides = {r"ffn_(up|gate)": "iq4_nl", r"blk\.0\.": "Q8_0", "output": "bf16"}
    path = save_gguf(open_checkpoint(BASE), tmp_path / "model.gguf", "q4_k_m", overrides=overrides)
    found = {name: info.dtype for name, info in open_checkpoint(path).files.source.tensors.items()}
    assert found["blk.0.ffn_up.weight"] == found["blk.1.ffn_gate.weight"] == "IQ4_NL"
    assert found["blk.0.attn_q.weight"] == "Q8_0" and found["output.weight"] == "BF16"
    assert found["blk.1.attn_q.weight"] == "Q4_K" and found["output_norm.weight"] == "F32"


# --- the file appears whole, or not at all


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    with pytest.raises(Refused) as error:
        save_gguf(open_checkpoint(BASE), out, "q8_0")
    assert error.value.refusal.code == "output-exists" and out.read_text() == "mine"


def test_a_killed_run_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; from qcore.checkpoint.open import open_checkpoint\n"
        "from qcore.gguf.make import save_gguf\n"
        "def progress(label, done, total):\n    if done == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_gguf(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), 'q8_0', progress=progress)"
    )
    out = tmp_path / "model.gguf"
    done = subprocess.run([sys.executable, "-c", code, str(BASE), str(out)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1  # what the next run removes
    save_gguf(open_checkpoint(BASE), out, "q8_0")
    assert list(tmp_path.iterdir()) == [out]


# --- the command line


def test_the_commands(tmp_path: Path) -> None:
    done = command("quantize", BASE, "--format", "gguf", "--scheme", "Q4_K_M", "--out", tmp_path / "q.gguf",
                   "--tensor-type", "ffn_up=q8_0", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["size_bytes"] == (tmp_path / "q.gguf").stat().st_size
    assert open_checkpoint(tmp_path / "q.gguf").files.source.tensors["blk.0.ffn_up.weight"].dtype == "Q8_0"
    done = command("convert", tmp_path / "q.gguf", "--format", "gguf", "--out", tmp_path / "again.gguf")
    assert done.returncode == 0 and (tmp_path / "again.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()
    done = command("quantize", BASE, "--format", "gptq", "--scheme", "W4A16", "--out", tmp_path / "gptq")
    assert done.returncode == 0, done.stderr
    made = open_checkpoint(tmp_path / "gptq")
    assert made.method == "gptq" and str(made.plan["model.layers.0.mlp.up_proj"]) == "W4A16-g128-sym"
    done = command("quantize", tmp_path / "gptq", "--scheme", "W4A16", "--ignore", "lm_head", "--out", tmp_path / "x")
    assert done.returncode == 2 and "left to be quantized" in done.stderr
    done = command("quantize", BASE, "--scheme", "W4A16", "--imatrix", tmp_path / "i", "--out", tmp_path / "x")
    assert done.returncode == 2 and "--imatrix" in done.stderr
    done = command("quantize", BASE, "--scheme", "Q4_9", "--out", tmp_path / "x")
    assert done.returncode == 2 and "Q4_K_M" in done.stderr
