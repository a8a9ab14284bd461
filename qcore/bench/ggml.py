"""llama.cpp's matrix products, through ggml's shared libraries as llama-cpp-python brings them (ggml.h, ggml-backend.h, ggml-cpu.h).

A weight is laid out as ggml likes it best on the host: in the first of its extra buffers that takes the type, else as in the file.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch

_F32 = 0
"""ggml's number of its type float32."""
_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)]),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_QUIET = _Log(lambda *_: None)
"""Messages such as which layout a weight is put into are no part of a table."""


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def _folder() -> Path | None:
    found = importlib.util.find_spec("llama_cpp")
    places = found.submodule_search_locations if found else None
    return Path(places[0]) / "lib" if places else None


def installed() -> bool:
    folder = _folder()
    return folder is not None and (folder / "libggml-cpu.so").is_file()


@cache
def _library() -> Library:
    return Library()


class Library:
    """ggml, its processor's backend, and the kinds of buffers that weights may be put into, the best first."""

    def __init__(self) -> None:
        folder = _folder()
        assert folder is not None
        self.parts = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")
        ]
        self.call = {name: self._function(name, *types) for name, types in _FUNCTIONS.items()}
        self._function("ggml_log_set", None, [_Log, c_void_p])(_QUIET, None)
        self.init = self._function("ggml_init", c_void_p, [_Parameters])
        self.backend = self.call["ggml_backend_cpu_init"]()
        register = self.call["ggml_backend_cpu_reg"]()
        self.device = self.call["ggml_backend_reg_dev_get"](register, 0)
        self.buffers: list[int] = []
        extra = self.call["ggml_backend_reg_get_proc_address"](register, b"ggml_backend_dev_get_extra_bufts")
        if extra:
            listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(extra)(self.device)
            while listed and listed[len(self.buffers)]:
                self.buffers.append(int(listed[len(self.buffers)] or 0))
        self.buffers.append(self.call["ggml_backend_cpu_buffer_type"]())

    def _function(self, name: str, result: type | None, arguments: list[type]) -> ctypes._NamedFuncPointer:
        part = next(part for part in self.parts if hasattr(part, name))
        function: ctypes._NamedFuncPointer = getattr(part, name)
        function.restype, function.argtypes = result, arguments
        return function

    def context(self, tensors: int) -> int:
        size = (tensors + 1) * self.call["ggml_tensor_overhead"]() + self.call["ggml_graph_overhead"]()
        return int(self.init(_Parameters(size, None, True)))


class Product:
    """x float32 [M, K] -> float32 [M, N], by a weight's bytes of ggml's type `kind`, uint8 [N, bytes of a row]."""

    def __init__(self, kind: int, data: torch.Tensor, shape: tuple[int, int]) -> None:
        self.library, self.shape = _library(), shape
        self.rows: dict[int, tuple[int, int, int]] = {}
        self.made: list[tuple[int, int]] = []
        rows, columns = shape
        call = self.library.call
        for kind_of_buffer in self.library.buffers:
            context = self.library.context(1)
            self.weight = call["ggml_new_tensor_2d"](context, kind, columns, rows)
            held = call["ggml_backend_alloc_ctx_tensors_from_buft"](context, kind_of_buffer)
            if held and self._takes():
                break
            if held:
                call["ggml_backend_buffer_free"](held)
            call["ggml_free"](context)
        self.made.append((context, held))
        call["ggml_backend_tensor_set"](self.weight, data.data_ptr(), 0, data.nbytes)

    def _takes(self) -> bool:
        """Whether the weight, where it is, can be multiplied by."""
        context, call = self.library.context(2), self.library.call
        x = call["ggml_new_tensor_2d"](context, _F32, self.shape[1], 1)
        taken: bool = call["ggml_backend_dev_supports_op"](
            self.library.device, call["ggml_mul_mat"](context, self.weight, x)
        )
        call["ggml_free"](context)
        return taken

    def _graph(self, batch: int) -> tuple[int, int, int]:
        """The graph of a batch, where its input and its result are."""
        context, call = self.library.context(2), self.library.call
        x = call["ggml_new_tensor_2d"](context, _F32, self.shape[1], batch)
        result = call["ggml_mul_mat"](context, self.weight, x)
        graph = call["ggml_new_graph"](context)
        call["ggml_build_forward_expand"](graph, result)
        self.made.append((context, call["ggml_backend_alloc_ctx_tensors"](context, self.library.backend)))
        return graph, call["ggml_get_data"](x), call["ggml_get_data"](result)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        graph, given, result = self.rows.get(len(x)) or self.rows.setdefault(len(x), self._graph(len(x)))
        call, out = self.library.call, torch.empty(len(x), self.shape[0])
        call["ggml_backend_cpu_set_n_threads"](self.library.backend, torch.get_num_threads())
        ctypes.memmove(given, x.data_ptr(), x.nbytes)
        if status := call["ggml_backend_graph_compute"](self.library.backend, graph):
            raise RuntimeError(f"ggml_backend_graph_compute ended with status {status}")
        ctypes.memmove(out.data_ptr(), result, out.nbytes)
        return out

    def __del__(self) -> None:
        for context, held in self.made:
            self.library.call["ggml_backend_buffer_free"](held)
            self.library.call["ggml_free"](context)


def quantized(kind: int, weight: torch.Tensor) -> torch.Tensor:
    """The bytes that ggml itself makes of a weight, float32 [N, K]: uint8 [N, bytes of a row]."""
    rows, columns = weight.shape
    call, given = _library().call, weight.contiguous()
    data = torch.empty(rows, call["ggml_row_size"](kind, columns), dtype=torch.uint8)
    call["ggml_quantize_chunk"](kind, given.data_ptr(), data.data_ptr(), 0, rows, columns, None)
    return data
