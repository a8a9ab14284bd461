"""Reads a GGUF file with llama.cpp: ggml's own reader and C dequantization, after the model itself was loaded and run.

python tools/readers/with_llama_cpp.py MODEL.gguf OUT.safetensors [TOKENS.safetensors]
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import load_file, save_file

REQUIRES = "llama-cpp-python==0.3.36 safetensors numpy"
CASES = (
    ("gptqmodel-gptq-4bit-sym", "gguf"),
    ("autoawq-gemm-w4-zp", "gguf"),
    ("base", "gguf:q4_0"), ("base", "gguf:q4_1"), ("base", "gguf:q5_0"), ("base", "gguf:q5_1"), ("base", "gguf:q8_0"),
    ("base", "gguf:q2_k"), ("base", "gguf:q2_k_s"), ("base", "gguf:q3_k_s"), ("base", "gguf:q3_k_m"), ("base", "gguf:q3_k_l"),
    ("base", "gguf:q4_k_s"), ("base", "gguf:q4_k_m"), ("base", "gguf:q5_k_s"), ("base", "gguf:q5_k_m"), ("base", "gguf:q6_k"),
    ("base", "gguf:iq1_s"), ("base", "gguf:iq1_m"), ("base", "gguf:iq2_xxs"), ("base", "gguf:iq2_xs"), ("base", "gguf:iq2_s"),
    ("base", "gguf:iq2_m"), ("base", "gguf:iq3_xxs"), ("base", "gguf:iq3_xs"), ("base", "gguf:iq3_s"), ("base", "gguf:iq3_m"),
    ("base", "gguf:iq4_nl"), ("base", "gguf:iq4_xs"), ("base", "gguf:tq1_0"), ("base", "gguf:tq2_0"), ("base", "gguf:mxfp4"),
    ("base", "gguf:nvfp4"), ("base", "gguf:q1_0"), ("base", "gguf:q2_0"),
    ("mixtral", "gguf:q4_0"), ("mixtral", "gguf:q4_k_m"), ("mixtral", "gguf:iq2_xs"), ("mixtral", "gguf:mxfp4_moe"),
    ("qwen2_moe", "gguf:q8_0"), ("qwen2_moe", "gguf:q3_k_m"), ("qwen3_moe", "gguf:q5_1"), ("qwen3_moe", "gguf:iq4_xs"),
    ("gpt_oss", "gguf:q6_k"), ("gpt_oss", "gguf:mxfp4_moe"),
)  # fmt: skip
RUNS = (
    ("gptq:Q4_K_M", "gguf"), ("imatrix:Q4_K_M", "gguf"), ("gptq:IQ2_XS", "gguf"), ("imatrix:IQ3_S", "gguf"),
    ("hadamard+gptq:Q4_K_M", "gguf"), ("gptq:Q5_K_S", "gguf"), ("gptq:IQ4_XS", "gguf"), ("gptq:MXFP4", "gguf"), ("gptq:Q8_0", "gguf"),
)  # fmt: skip
LOGITS = 1e-4
"""It rounds the inputs of matrices to 8 bits, and what attention keeps to float16."""
PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj", "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
"""transformers' names of the parts of a llama and of mixtures."""
_PAIRED = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
"""Parts whose rows stand in the order of ggml's rotary embedding, and the number of their heads."""


class Options(ctypes.Structure):
    """gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


class Tensor(ctypes.Structure):
    """The first fields of ggml_tensor."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]


class Traits(ctypes.Structure):
    """ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def library() -> ctypes.CDLL:
    """ggml, as llama-cpp-python ships it."""
    ggml = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base*"))))
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Options]
    for name in ("ggml_get_first_tensor", "ggml_get_data", "ggml_get_next_tensor"):
        getattr(ggml, name).restype = ctypes.c_void_p
    ggml.ggml_get_first_tensor.argtypes = ggml.ggml_get_data.argtypes = ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_get_next_tensor.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    ggml.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return ggml


def matrices(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every matrix, or stack of experts' matrices, by GGUF's name, dequantized by ggml."""
    ggml, context = library(), ctypes.c_void_p()
    held = ggml.gguf_init_from_file(str(file).encode(), Options(False, ctypes.pointer(context)))
    assert held, "ggml does not read the file"
    at = ggml.ggml_get_first_tensor(context)
    while at:
        name, tensor = ggml.ggml_get_name(at).decode(), Tensor.from_address(at)
        columns, rows, experts, _ = tensor.ne
        if rows > 1:
            shape = (experts, rows, columns) if experts > 1 else (rows, columns)
            traits, values = ggml.ggml_get_type_traits(tensor.type).contents, np.empty(shape, np.float32)
            if traits.to_float:
                traits.to_float(ggml.ggml_get_data(at), values.ctypes.data, values.size)
                yield name, values
            elif traits.type_name == b"f32":
                ctypes.memmove(values.ctypes.data, ggml.ggml_get_data(at), values.nbytes)
                yield name, values
        at = ggml.ggml_get_next_tensor(context, at)


def logits(model: llama_cpp.Llama, tokens: np.ndarray) -> np.ndarray:
    """[windows, tokens, vocabulary] float32."""
    found = []
    for window in tokens:
        model.reset()
        model.eval(window.tolist())
        found.append(model.scores[: len(window)].copy())
    return np.stack(found)


def main(file: Path, out: Path, tokens: Path | None = None) -> None:
    """Runs the model once, then saves its matrices under transformers' names."""
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    for token in (1, 5, 9):  # one at a time
        model.eval([token])
    assert np.isfinite(model.scores[:3]).all(), "llama.cpp's logits are not finite"
    weights = {} if tokens is None else {"logits": logits(model, load_file(tokens)["tokens"])}
    for name, matrix in matrices(file):
        outer = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
        if name in outer:
            weights[outer[name]] = matrix
            continue
        _, layer, part, last = name.split(".")
        if part not in PARTS or last != "weight":
            continue  # biases of experts, and what chooses them
        if part in _PAIRED and _PAIRED[part] in model.metadata:
            heads = int(model.metadata[_PAIRED[part]])
            matrix = matrix.reshape(heads, -1, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)
        weights[f"model.layers.{layer}.{PARTS[part]}.weight"] = np.ascontiguousarray(matrix)
    save_file(weights, out, {"tool": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
