"""The package `bitblas` as a library: its product of one form of weights, compiled by it for this host's GPU or read from a database of such.

Of what 0.1.0.post1, its last release, has for 16-bit activations, this takes what is right and can be built (its ops/general_matmul and gpu/intrin/lop3):

    codes        of 2 and 4 bits. Those of 8 it cannot build: tilelang's decoder of them does not take its own arguments.
    zero points  none with signed codes, `original` with unsigned ones. `quantized` reads a byte beside the zero point's own; `rescale` takes a 4-bit
                 weight's zero point for a positive number, and rounds a 2-bit weight twice.
    sums         in float32; its default is float16.
    weights      not propagated, for that is what the many numbers of rows that one program is for ask for.

It multiplies 128 rows of x however few there are until it is tuned, which times 20 programs for each number of rows on the GPU: minutes for a weight's shape.
So tuned ones are looked for in its own database, which it and other tools fill too; QCORE_BITBLAS=tune makes them. Where there is none the untuned program is
compiled, once for a host. It compiles by nvcc.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qcore.refusal import Kind, Refusal, Refused

ROWS = (1, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of rows of x that it is tuned for: its own default."""
SPARE = 256
"""Rows of scales and zero points behind the weight's: its programs read those of whole blocks of rows."""
_CANDIDATES = 20


@dataclass(frozen=True)
class Form:
    """bits: 2 or 4. signed: codes stand for q - 2^(bits - 1), without zero points; else there are some. group: columns under one scale, -1: all. rows, columns: N, K."""

    bits: int
    signed: bool
    group: int
    rows: int
    columns: int

    def config(self) -> dict[str, object]:
        """The arguments of bitblas.MatmulConfig."""
        return {
            "M": list(ROWS), "N": self.rows, "K": self.columns, "A_dtype": "float16", "W_dtype": f"{'int' if self.signed else 'uint'}{self.bits}",
            "accum_dtype": "float32", "out_dtype": "float16", "layout": "nt", "with_bias": False, "group_size": self.group,
            "with_scaling": True, "with_zeros": not self.signed, "zeros_mode": "original", "storage_dtype": "int8",
        }  # fmt: skip


class Operator:
    """A bitblas.Matmul of a form."""

    def __init__(self, matmul: Any) -> None:
        self._matmul = matmul
        self._ready: set[int] = set()

    def packed(self, codes: torch.Tensor) -> torch.Tensor:
        """codes: uint8 [N, K], those of signed weights 2^(bits - 1) higher. int8 [N, K bits / 8] as the program has them, on the CPU."""
        done: torch.Tensor = self._matmul.weight_transform(codes.cpu().contiguous().view(torch.int8))
        return done

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, out: torch.Tensor
    ) -> None:  # fmt: skip
        """out [M, N] of x [M, K], float16, contiguous, x at a multiple of 16 bytes; on torch's current stream of their device."""
        with torch.cuda.device(x.device):
            if x.device.index not in self._ready:  # a block's shared memory is set for each device
                self._matmul.lib.init()
                self._ready.add(x.device.index)
            self._matmul.forward(x, weight, scale=scales, zeros=zeros, output=out)


_MADE: dict[tuple[Form, str], Operator | Refusal] = {}


def operator(form: Form, architecture: str) -> Operator:
    """The operator, made once in a process. architecture: `sm_80`. Raises Refused (missing-package, kernel-failed, kernel-wrong)."""
    key = form, architecture
    if key not in _MADE:
        try:
            _MADE[key] = _make(form, architecture)
        except Refused as error:
            _MADE[key] = error.refusal
        except (Exception, SystemExit) as fault:  # its compilers raise anything, and its parser may exit
            _MADE[key] = refusal("kernel-failed", "notyet", "the package bitblas makes no product of this weight here",
                                 f"{form}, {architecture}: {type(fault).__name__}: {fault}"[:300], "Another kernel is used.")  # fmt: skip
    found = _MADE[key]
    if isinstance(found, Refusal):
        raise Refused(found)
    return found


def refusal(code: str, kind: Kind, reason: str, fact: str, fix: str) -> Refusal:
    return Refusal(code, kind, "bitblas_int", reason, fact, fix)


def _make(form: Form, architecture: str) -> Operator:
    with package() as bitblas:
        target, config = f"cuda -arch={architecture}", bitblas.MatmulConfig(**form.config())
        database = bitblas.cache.get_database_path()
        version = getattr(bitblas, "__version__", "0")
        untuned = str(Path(database, "qcore-untuned", version))
        tune = os.environ.get("QCORE_BITBLAS") == "tune"
        matmul = _stored(bitblas, config, database, target)
        if matmul is None and not tune:
            matmul = _stored(bitblas, config, untuned, target)
        if matmul is None:
            matmul = _built(bitblas, config, target, tune)
            cache = bitblas.cache.OperatorCache()
            cache.add(config, matmul)
            cache.save_into_database(database if tune else untuned, target)
        if matmul.lib is None or not hasattr(matmul.lib, "init"):
            raise RuntimeError("its program is not compiled")
        held = [form.rows, form.columns * form.bits // 8]
        if list(matmul.retrieve_weight_shape()) != held:
            raise Refused(refusal("kernel-wrong", "notyet", "the package bitblas wants the weight in a shape that is not known",
                                  f"found {matmul.retrieve_weight_shape()}, expected {held}", "Another kernel is used."))  # fmt: skip
    return Operator(matmul)


def _stored(bitblas: Any, config: Any, database: str, target: str) -> Any:
    """What a database has for the config, or None."""
    cache = bitblas.cache.OperatorCache()
    cache.load_from_database(database, target)
    return cache.get(config)


def _built(bitblas: Any, config: Any, target: str, tune: bool) -> Any:
    if shutil.which("nvcc") is None:
        raise Refused(refusal("missing-package", "missing-dep", "the package bitblas compiles its programs by nvcc, and there is none", "no nvcc on the PATH",
                              "Install CUDA's toolkit and put its nvcc on the PATH."))  # fmt: skip
    matmul = bitblas.Matmul(config, target=target, enable_tuning=False)
    if tune:
        matmul.hardware_aware_finetune(topk=_CANDIDATES)
    return matmul


_ADDED: tuple[list[str], dict[str, str]] = [], {}
"""What the package's import has put on sys.path and into the environment."""


@contextmanager
def package() -> Iterator[Any]:
    """The package, imported at the first time. It wants its own TVM and tilelang first on sys.path and, for the processes that it starts, in the
    environment; afterwards both are as they were. Raises Refused (missing-package)."""
    path, entries, variables = sys.path, list(sys.path), dict(os.environ)
    sys.path = [*_ADDED[0], *entries]
    os.environ |= _ADDED[1]
    try:
        found = _imported()
        if isinstance(found, Refusal):
            raise Refused(found)
        yield found
    finally:
        _ADDED[0][:] = [entry for entry in sys.path if entry not in entries]
        _ADDED[1].update({name: text for name, text in os.environ.items() if variables.get(name) != text})
        path[:] = entries
        sys.path = path
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        os.environ.update(variables)


def _foreign() -> list[str]:
    """What others have imported under the names of the package's own parts."""
    return [name for name in ("tvm", "tilelang") if name in sys.modules and "bitblas" not in sys.modules]


@cache
def _imported() -> Any:
    """The package, or the refusal that its first import came to."""
    if foreign := _foreign():
        return refusal("missing-package", "missing-dep", "another TVM or tilelang is in this process than the package bitblas has",
                       f"found {' and '.join(foreign)} imported", "Import qcore in a process of its own.")  # fmt: skip
    root, keeper = logging.getLogger(), logging.NullHandler()
    root.addHandler(keeper)  # else tilelang writes all logs to a file `out.log` in the working directory
    try:
        found = importlib.import_module("bitblas")
        importlib.import_module("bitblas.cache")
    except Exception as fault:  # without a GPU, or one of its libraries, it raises whatever it likes
        return refusal("missing-package", "missing-dep", "the package bitblas cannot be imported here",
                       f"{type(fault).__name__}: {fault}"[:300], "pip install 'bitblas==0.1.0.post1', beside an NVIDIA GPU and its driver")  # fmt: skip
    finally:
        root.removeHandler(keeper)
    return found
