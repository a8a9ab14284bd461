"""What only the model can tell is refused when it is loaded: sizes, counts and parts that no layer has. And hostile
importance matrices, which are read for themselves."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
import test_imatrix
from hostile_tensors import WAYS
from makers import dense_llama, write
from mutations import Sample, put_files
from qcore.checkpoint.imatrix import read_imatrix
from variants import VARIANTS

HUGE = 1 << 40
pytestmark = pytest.mark.alone
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
CONFIGS: list[tuple[str, str, Any]] = [
    *(("bad-field", key, value) for key, values in {
        "hidden_size": (0, -1, "x", None, 65, 1.5, HUGE, [64], {}),
        "num_hidden_layers": (-1 << 70, "x", None, HUGE, 1 << 30, []),
        "num_attention_heads": (0, -1, 3, "x", HUGE),
        "num_key_value_heads": (0, -1, "x"),
        "vocab_size": (-1, "x", []),
        "intermediate_size": (-1, "x"),
        "head_dim": (0, -1, "x", HUGE),
        "rms_norm_eps": ("x", None, []),
        "hidden_act": ("abacus", 3, None, "__import__('os')"),
        "rope_scaling": ("x", 3, {"type": "abacus"}, {"rope_type": "linear"}),
        "num_labels": (HUGE, 1 << 30),
        "id2label": ({"x": 1}, 3),
        "text_config": (3, {}, {"num_hidden_layers": HUGE}),
        "vision_config": ({"num_hidden_layers": HUGE},),
        "layer_types": (["x"],),
        "attn_implementation": ("abacus",),
        "tie_word_embeddings": ("x",),
        "pad_token_id": ("x", HUGE),
    }.items() for value in values),
    *(("bad-shape", key, value) for key, values in {
        "hidden_size": (128, 1 << 20), "vocab_size": (64, HUGE), "intermediate_size": (64, HUGE),
        "num_key_value_heads": (4, HUGE)}.items() for value in values),
    *(("unknown-architecture", "model_type", value) for value in (3, None, [], "", "../x", "x" * 100_000)),
    *(("", key, 0) for key in ("vocab_size", "intermediate_size")),  # what transformers says of them varies
    ("missing-tensor", "num_hidden_layers", 5),
    ("missing-tensor", "attention_bias", True),
    ("unexpected-tensor", "num_hidden_layers", 0),
]  # fmt: skip
TYPES = (("qwen3", "num_hidden_layers"), ("gemma2", "num_hidden_layers"), ("llama4_text", "num_hidden_layers"),
         ("granitemoehybrid", "num_hidden_layers"), ("mamba2", "num_hidden_layers"), ("gpt2", "n_inner"),
         ("xglm", "max_position_embeddings"), ("gptj", "rotary_dim"))  # fmt: skip


def refused(call: Callable[[], object], code: str, folder: Path) -> None:
    began = time.process_time()
    with pytest.raises(qcore.Refused) as caught:
        call()
    assert time.process_time() - began < 3, "transformers imports the class's module in this time too"
    refusal = caught.value.refusal
    assert refusal.code == code or not code, refusal
    assert refusal.file and refusal.file.startswith(str(folder)) and (refusal.field or refusal.tensor), refusal


@pytest.mark.parametrize(("code", "key", "value"), CONFIGS, ids=[f"{k} {v!r:.30}" for _, k, v in CONFIGS])
def test_configs_of_no_model(tmp_path: Path, code: str, key: str, value: Any) -> None:
    path = write(tmp_path, dense_llama(), **{key: value})
    refused(lambda: qcore.load_model(path), code, tmp_path)


@pytest.mark.parametrize(("kind", "key"), TYPES)
def test_counts_that_transformers_would_count_up_to(tmp_path: Path, kind: str, key: str) -> None:
    path = write(tmp_path, dense_llama(), model_type=kind, **{key: 1 << 30})
    refused(lambda: qcore.load_model(path), "", tmp_path)


DENSE = {
    "a matrix is lost": ("missing-tensor", lambda t: t.pop(f"{UP}.weight")),
    "a norm is lost": ("missing-tensor", lambda t: t.pop("model.norm.weight")),
    "a matrix is wider": ("bad-shape", lambda t: t.update({f"{UP}.weight": torch.zeros(96, 65)})),
    "a matrix is flat": ("bad-shape", lambda t: t.update({f"{UP}.weight": torch.zeros(96 * 64)})),
    "a matrix is empty": ("bad-shape", lambda t: t.update({f"{UP}.weight": torch.zeros(0, 64)})),
    "a norm is longer": ("bad-shape", lambda t: t.update({"model.norm.weight": torch.zeros(65)})),
    "one layer more": ("unexpected-tensor", lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(9, 9)})),
    "a bias": ("unexpected-tensor", lambda t: t.update({f"{UP}.bias": torch.zeros(96)})),
    "a name with spaces": ("unexpected-tensor", lambda t: t.update({"a b": torch.zeros(1)})),
    "a name of dots": ("unexpected-tensor", lambda t: t.update({"....": torch.zeros(1)})),
    "a name of an attribute": ("unexpected-tensor", lambda t: t.update({"__class__.weight": torch.zeros(2, 2)})),
}  # fmt: skip


@pytest.mark.parametrize("case", DENSE)
def test_plain_tensors_of_no_model(tmp_path: Path, case: str) -> None:
    code, change = DENSE[case]
    tensors = dense_llama()
    change(tensors)
    refused(lambda: qcore.load_model(write(tmp_path, tensors)), code, tmp_path)


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if not name.startswith(("gguf", "dense")) and "kv" not in name]
)
@pytest.mark.parametrize("way", ["lost", "longer", "renamed"])
def test_codes_of_no_model(tmp_path: Path, variant: str, way: str) -> None:
    """The codes themselves: whatever of it the headers tell, the model needs them all."""
    VARIANTS[variant](tmp_path)
    sample = Sample.read(tmp_path)
    module = UP if any(name.startswith(f"{UP}.") and not name.endswith(".weight") for name in sample.tensors) else DOWN
    parts = ("qweight", "B", "weight_packed", "_weight_qdata", "weight")
    name = next(f"{module}.{part}" for part in parts if f"{module}.{part}" in sample.tensors)
    held = sample.tensors.pop(name)
    if way == "longer":
        WAYS["longer"][0](held)
        sample.tensors[name] = held
    elif way == "renamed":
        sample.tensors[name.replace("layers.0", "layers.7")] = held
    put_files(tmp_path, sample.files())
    refused(lambda: qcore.load_model(tmp_path), "", tmp_path)


BINARY = [argument.values if hasattr(argument, "values") else argument
          for mark in test_imatrix.test_a_wrong_binary_file_is_refused.pytestmark for argument in mark.args[1]]  # fmt: skip


@pytest.mark.parametrize(("data", "code"), BINARY)
def test_importance_matrices(tmp_path: Path, data: bytes, code: str) -> None:
    (tmp_path / "imatrix.dat").write_bytes(data)
    refused(lambda: read_imatrix(tmp_path / "imatrix.dat"), code, tmp_path)
