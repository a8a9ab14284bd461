"""The core's own plugin: it comes through the same door as the vendors'.

Checkpoint formats are found by listing qcore/methods/, so that a new one is a new file and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import replace

import qcore.methods
from qcore.algorithm import Algorithm
from qcore.hookspecs import API_VERSION, hookimpl
from qcore.kernel import Accepts, Kernel
from qcore.method import Method

QCORE_API = API_VERSION

_INPUTS = (
    "none",
    "int?-token-*dyn",
    "int?-g*-dyn",
    "int8-token-sym-dyn-outliers*",
    "int?-tensor-*",
    "fp8-token-dyn*",
    "fp8-tensor*",
    "fp8-g*-dyn",
    "e?m?-g*-dyn",
)
_ANY = Accepts(elements=("*",), zeros=(None, "stored", "float"), ordered=True, inputs=_INPUTS)
_ROWS = Accepts(elements=("*",), scales=("[!f]*",), zeros=(None, "stored", "float"), ordered=True, inputs=_INPUTS)
"""All but flat groups, which cross row ends: their rows cannot be taken apart."""
_KV_CACHE = Accepts(("fp8", "e5m2", "int8"), ("tensor", "channel"), (None, "stored"))
"""One stored scale, or one for each head, or at run time one for each token and head."""
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes has; nested scales come in blocks of 256."""
_BLOCKWISE = tuple(text for n in _BLOCKS for text in (f"g{n}", f"flat{n}", f"flat{n}:dynamic8+flat{256 * n}"))
_GROUPS = ("g?", "g??", "g???", "g????", "g?????")
_FLAT = tuple(f"flat{group.removeprefix('g')}" for group in _GROUPS)
"""Groups under plain float scales: no word for the scales' type follows."""
_SEARCHED = Accepts(("int?", "uint?", "fp8", "e4m3fnuz", "e5m2", "e2m1", "e3m2", "e2m3"),
                    ("tensor", "channel", *_GROUPS, "block*", "tile*", "g*:e8m0", "g*:e4m3fn+tensor"), (None, "stored"))  # fmt: skip
"""What qcore/algorithms/grids.py finds scales for."""
_DTYPES = ("float32", "bfloat16", "float16")


@hookimpl
def qcore_methods() -> Sequence[Method]:
    """One METHOD a file."""
    names = sorted(module.name for module in pkgutil.iter_modules(qcore.methods.__path__))
    return [importlib.import_module(f"qcore.methods.{name}").METHOD for name in names]


@hookimpl
def qcore_algorithms() -> Sequence[Algorithm]:
    return [
        Algorithm("rtn", _SEARCHED, "qcore.algorithms.rtn:rtn", note="every weight becomes the nearest code; needs no calibration"),
        Algorithm("rtn-mse", _SEARCHED, "qcore.algorithms.rtn_mse:rtn_mse",
                  note="the nearest codes under the scales of least squared error; needs no calibration"),
        Algorithm("gptq", replace(_SEARCHED, elements=(*_SEARCHED.elements, "gguf:*"), scales=(*_SEARCHED.scales, "none"), ordered=True), "qcore.algorithms.gptq:gptq",
                  calibrated=True, note="columns one after the other, each making up for the errors before it; then codes and scales once more"),
        Algorithm("auto_round", replace(_SEARCHED, ordered=True), "qcore.algorithms.gptq:gptq", calibrated=True, tuned=True,
                  note="begins with gptq's weights; then roundings and scales are learned by the signs of gradients, block by block"),
        Algorithm("imatrix", Accepts(("gguf:*",), ("none",)), "qcore.algorithms.imatrix:imatrix", calibrated=True,
                  note="GGUF's blocks for the least error, in which columns count by the mean square of their inputs; llama.cpp's importance matrix"),
        Algorithm("awq", _SEARCHED, "qcore.algorithms.awq:awq", calibrated=True, scaling="qcore.algorithms.awq:factors",
                  note="columns with large inputs are scaled up, groups cut off where outputs gain by it; then the nearest codes"),
        Algorithm("smoothquant", _SEARCHED, "qcore.algorithms.awq:awq", calibrated=True, scaling="qcore.algorithms.smoothquant:factors",
                  note="what is hard to round moves from inputs to weights; then the nearest codes"),
        Algorithm("hadamard", _SEARCHED, "qcore.algorithms.rtn:rtn", preparation="qcore.calibration.rotation:rotated",
                  note="hidden states are rotated, so that no column of them is larger than others; then the nearest codes, or joined: hadamard+gptq"),
        Algorithm("bitsandbytes", Accepts(("nf4", "fp4"), _BLOCKWISE), "qcore.algorithms.codebook:codebook",
                  note="absmax blocks of the flattened weight, the nearest of 16 values; bitsandbytes' numbers"),
        Algorithm("llm.int8", Accepts(("int8",), ("channel",)), "qcore.algorithms.codebook:llm_int8",
                  note="127 steps to each row's absmax; bitsandbytes' numbers"),
        Algorithm("deepspeedfp", Accepts(("e2m1", "e3m2", "e4m3", "e4m7"), (*_GROUPS, *_FLAT)),
                  "qcore.algorithms.minifloat:minifloat",
                  note="small floats in groups of the flattened weight, without subnormals; DeepSpeed's numbers"),
    ]  # fmt: skip


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    """The reference: pure torch, any device, every scheme; what all other kernels are judged by."""
    return [
        Kernel("reference_linear", "reference", "linear", ("*",), _ANY, _DTYPES, cost=100.0,
               implementation="qcore.kernels.reference:ReferenceLinear",
               note="dequantizes by row blocks at every call; exact, slow", ragged=True),
        Kernel("reference_embedding", "reference", "embedding", ("*",), _ROWS, _DTYPES, cost=1.0,
               implementation="qcore.kernels.reference:ReferenceEmbedding",
               note="dequantizes the rows that are looked up", ragged=True),
        Kernel("reference_kv_cache", "reference", "kv_cache", ("*",), _KV_CACHE, _DTYPES, cost=1.0,
               implementation="qcore.kernels.kv_cache:KvRounding",
               note="holds keys and values in 8 bits, and hands attention all of them dequantized"),
    ]  # fmt: skip
