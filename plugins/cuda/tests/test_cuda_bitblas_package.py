"""The real package `bitblas`, where it is installed: what it makes of our weights, compiled by nvcc, and run on a CPU thread by thread.

pip install 'bitblas==0.1.0.post1' 'nvidia-cuda-runtime-cu12==12.*' 'nvidia-cuda-nvrtc-cu12==12.*'
pytest plugins/cuda/tests/test_cuda_bitblas_package.py
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcore.layouts.bitblas import deinterleave, interleave
from qcore.platform import Device
from qcore.scheme import Scheme
from qcore.testing.checks import Bench
from qcore.testing.layers import random_layer
from qcore_cuda import bitblas_package
from qcore_cuda.bitblas_package import Form, operator, package
from qcore_cuda.kernels import bitblas
from qcore_cuda.kernels.bitblas import BitblasLinear
from qcore_cuda.plugin import qcore_kernels

_SPEC = importlib.util.spec_from_file_location("bitblas_on_cpu", Path(__file__).with_name("bitblas_on_cpu.py"))
assert _SPEC is not None and _SPEC.loader is not None
on_cpu = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(on_cpu)

pytestmark = [
    pytest.mark.skipif(bool(on_cpu.missing()), reason=on_cpu.missing()),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: QCORE_BITBLAS=always qcore verify --plugin cuda --kernel bitblas_int"),
]  # fmt: skip

KERNEL = next(kernel for kernel in qcore_kernels() if kernel.name == "bitblas_int")
AMPERE = Device("gpu", "ampere", "its source on a CPU", "cpu", "sm_80", frozenset({"fp16_tensor_core"}), simulated=True)


@pytest.fixture(scope="module", autouse=True)
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A GPU as far as the package asks for one, and a database of its own."""
    folder = tmp_path_factory.mktemp("bitblas")
    before = list(sys.path), {name: os.environ.get(name) for name in ("PYTHONPATH", "TVM_IMPORT_PYTHON_PATH", "TL_CUTLASS_PATH")}  # fmt: skip
    library = os.environ.get("LIBRARY_PATH")
    with pytest.MonkeyPatch.context() as patch:
        on_cpu.pretend(folder)
        patch.setattr(bitblas_package, "_foreign", list)  # the TVM that is here is the package's own
        with package() as found:
            found.cache.operator.BITBLAS_DATABASE_PATH = str(folder / "database")
        assert before == (list(sys.path), {name: os.environ.get(name) for name in before[1]}), (
            "the import is seen outside"
        )
        patch.setenv("QCORE_BITBLAS", "always")
        patch.setattr(bitblas, "this_device", lambda index: AMPERE)
        patch.setattr(bitblas, "_architecture", lambda place: "sm_80")
        patch.setattr(torch.cuda, "device", lambda place: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
        yield
    os.environ["LIBRARY_PATH"] = library or ""


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [("W4A16-g128-asym", (128, 256)), ("W4A16-g32-sym", (384, 128)), ("W4A16-channel-asym", (256, 384)),
     ("W2A16-g64-asym", (128, 128)), ("W2A16-channel-sym", (128, 256))],
)  # fmt: skip
def test_products_by_the_packages_program(scheme: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """Packed by the package, and multiplied by the source that it writes for sm_80, called by its own `forward`."""
    layer = random_layer(Scheme.parse(scheme), *shape)
    packed = BitblasLinear.from_layer(layer, torch.float16)
    bits, stream = packed.form.bits, layer.weight.codes
    assert torch.equal(packed.weight.view(torch.uint8), interleave(stream, bits)), "our own writer packs otherwise"
    assert torch.equal(deinterleave(packed.weight.view(torch.uint8), bits), stream), "our own reader reads otherwise"
    matmul: Any = operator(packed.form, "sm_80")._matmul
    assert matmul.libpath and "HMMA" in _sass(matmul.libpath), "the program does not use the matrix unit"
    matmul.lib = on_cpu.on_cpu(matmul.lib_generator.lib_code or Path(matmul.srcpath).read_text(), tmp_path)
    bench = Bench(KERNEL, layer.weight.scheme, "float16", "odd", AMPERE, layer)
    for rows in (1, 3, 17, 130):
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(torch.float16)
        bench.compare(f"{rows} rows", packed(x), bench.product(x))


def test_a_program_is_compiled_once_for_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(4, False, 128, 128, 256)
    first = operator(form, "sm_80")
    monkeypatch.setattr(bitblas_package, "_MADE", {})
    monkeypatch.setattr(bitblas_package, "_built", lambda *given: pytest.fail("it is compiled again"))
    again = operator(form, "sm_80")
    assert again is not first
    codes = torch.randint(0, 16, (128, 256), dtype=torch.uint8)
    assert torch.equal(again.packed(codes), first.packed(codes))


@pytest.mark.parametrize("architecture", ["sm_75", "sm_89"])
def test_it_compiles_for(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "ARCHITECTURE", [f"{architecture[3]}.{architecture[4]}"])
    made: Any = operator(Form(4, False, 128, 128, 128), architecture)
    assert "HMMA" in _sass(made._matmul.libpath)


def _sass(path: str) -> str:
    """The machine code, by the tools in Triton's wheel."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    tools = f"{tool.parent}:{os.environ['PATH']}"
    return subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True, env={"PATH": tools}).stdout
