"""The row of BitBLAS's package without it: a double that checks what the package's source checks, and a clock that says which way is quicker.

test_cuda_bitblas_package.py tries the package itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import qcore.select
from qcore.bits import pack, unpack
from qcore.discovery import registry
from qcore.explanation import explain
from qcore.kernel import Kernel
from qcore.layouts.bitblas import deinterleave, interleave
from qcore.model import pack as packing
from qcore.model.pack import Packer
from qcore.platform import Device
from qcore.refusal import Refused
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.support.matrix import LADDER, matrix
from qcore.tensor import LayerTensors
from qcore.testing.checks import Bench
from qcore.testing.layers import random_layer
from qcore_cuda import bitblas_package, race
from qcore_cuda.kernels import bitblas
from qcore_cuda.kernels.bitblas import BitblasLinear

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
ALL = {kernel.name: kernel for kernel, _ in registry().kernels}
KERNEL = ALL["bitblas_int"]
GPU = Device("gpu", "ampere", "a double", "cpu", "sm_80", frozenset({"bf16", "fp16_tensor_core"}))
SCHEMES = ("W4A16-g128-asym", "W4A16-g32-sym", "W4A16-channel-asym", "W4A16-tensor-sym", "W2A16-g64-asym", "W2A16-channel-sym")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Fields of bitblas.MatmulConfig that are given."""

    M: Any
    N: int
    K: int
    A_dtype: str
    W_dtype: str
    accum_dtype: str
    out_dtype: str
    layout: str
    with_bias: bool
    group_size: int
    with_scaling: bool
    with_zeros: bool
    zeros_mode: str
    storage_dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "M", tuple(self.M))


class Matmul:
    """bitblas.Matmul on a CPU: its signature, and the formulas of its zeros modes, by the numbers of the words that it holds."""

    made: ClassVar[list[Matmul]] = []
    fault: BaseException | None = None
    factor = 1.0

    def __init__(self, config: MatmulConfig, target: str, enable_tuning: bool) -> None:
        if self.fault is not None:
            raise self.fault
        assert target == "cuda -arch=sm_80" and not enable_tuning
        assert config.A_dtype == config.out_dtype == "float16" and config.accum_dtype == "float32"
        self.config, self.signed = config, not config.W_dtype.startswith("u")
        self.bits, self.tuned = int(config.W_dtype[-1]), 0
        assert self.bits in (2, 4), "tilelang's decoder takes no others"
        assert self.signed != config.with_zeros and config.with_scaling and config.zeros_mode == "original"
        self.lib: Any = SimpleNamespace(init=lambda: None)
        self.made.append(self)

    def retrieve_weight_shape(self) -> list[int]:
        return [self.config.N, self.config.K * self.bits // 8]

    def weight_transform(self, codes: torch.Tensor) -> torch.Tensor:
        assert codes.dtype == torch.int8 and tuple(codes.shape) == (self.config.N, self.config.K)
        assert codes.device.type == "cpu" and codes.is_contiguous() and codes.min() >= 0 and codes.max() < 2**self.bits
        return interleave(pack(codes.view(torch.uint8), self.bits), self.bits).view(torch.int8)

    def hardware_aware_finetune(self, topk: int) -> None:
        self.tuned += topk

    def forward(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None, output: torch.Tensor) -> torch.Tensor:  # fmt: skip
        config, groups = self.config, 1 if self.config.group_size == -1 else self.config.K // self.config.group_size
        for part in (x, weight, scale, output, *([] if zeros is None else [zeros])):
            assert part.is_contiguous() and part.data_ptr() % 16 == 0 and part.dtype == (torch.int8 if part is weight else torch.float16)  # fmt: skip
        assert list(weight.shape) == self.retrieve_weight_shape() and (zeros is None) == self.signed
        assert (
            x.shape[1] == config.K
            and list(output.shape) == [len(x), config.N]
            and len(scale) >= -(-config.N // 128) * 128
        )
        codes = (
            unpack(deinterleave(weight.view(torch.uint8), self.bits), self.bits, config.K)
            .view(config.N, groups, -1)
            .half()
        )
        middle = 2 ** (self.bits - 1) if zeros is None else zeros[: config.N, :, None]
        dense = ((codes - middle) * scale[: config.N, :, None]).flatten(1)
        output.copy_((x.float() @ dense.float().t() * self.factor).half())
        return output


class OperatorCache(dict[MatmulConfig, Matmul]):
    """bitblas.cache.OperatorCache, whose files are in a mapping."""

    files: ClassVar[dict[str, dict[MatmulConfig, Matmul]]] = {}

    def add(self, config: MatmulConfig, matmul: Matmul) -> None:
        self[config] = matmul

    def load_from_database(self, path: str, target: str) -> None:
        self.update(self.files.get(f"{path}/{target}", {}))

    def save_into_database(self, path: str, target: str) -> None:
        self.files.setdefault(f"{path}/{target}", {}).update(self)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The double in the package's place, and a GPU that is this CPU."""
    double = ModuleType("bitblas")
    cache = SimpleNamespace(OperatorCache=OperatorCache, get_database_path=lambda: "database")
    for name, value in (
        ("MatmulConfig", MatmulConfig),
        ("Matmul", Matmul),
        ("cache", cache),
        ("__version__", "0.1.0.post1"),
    ):
        setattr(double, name, value)
    monkeypatch.setattr(bitblas_package, "_imported", lambda: double)
    monkeypatch.setattr(bitblas_package, "_MADE", {})
    monkeypatch.setattr(bitblas_package.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(bitblas, "_VERDICTS", {})
    monkeypatch.setattr(bitblas, "this_device", lambda index: GPU)
    monkeypatch.setattr(bitblas, "_architecture", lambda place: "sm_80")
    monkeypatch.setattr(torch.cuda, "device", lambda place: contextlib.nullcontext())
    for name, value in (("made", []), ("fault", None), ("factor", 1.0)):
        monkeypatch.setattr(Matmul, name, value)
    monkeypatch.setattr(OperatorCache, "files", {})
    monkeypatch.delenv("QCORE_BITBLAS", raising=False)
    reference = [(ALL[name], "core") for name in ("bitblas_int", "reference_linear")]
    for module in (bitblas, packing):
        monkeypatch.setattr(module, "registry", lambda: SimpleNamespace(kernels=reference))
    monkeypatch.setattr(qcore.select, "_version", lambda name: "9.0")
    yield monkeypatch


def clock(monkeypatch: pytest.MonkeyPatch, *quicker: bool) -> list[int]:
    """For the numbers of rows in turn, whether the package's way is the quicker. What it returns has an entry for each measurement."""
    asked: list[int] = []

    def seconds(runs: Any, place: str) -> list[float]:
        first = quicker[len(asked) % len(quicker)]
        asked.append(len(runs))
        return [1e-5, 2e-5] if first else [2e-5, 2e-5]

    monkeypatch.setattr(race, "seconds", seconds)
    return asked


def refused(layer: LayerTensors) -> Any:
    with pytest.raises(Refused) as error:
        BitblasLinear.from_layer(layer, torch.float16)
    return error.value.refusal


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_it_is_quicker_it_is_taken_and_right(package: pytest.MonkeyPatch, scheme: str) -> None:
    asked = clock(package, True)
    layer = random_layer(Scheme.parse(scheme), 384, 256)
    assert KERNEL.accepts.refuse(layer.weight.scheme) is None
    packed = BitblasLinear.from_layer(layer, torch.float16)
    assert len(asked) == len(race.ROWS)
    bench = Bench(KERNEL, layer.weight.scheme, "float16", "odd", GPU, layer)
    for x in (
        torch.randn(3, 256),
        torch.randn(2, 5, 256),
        torch.randn(256, 4).t(),
        torch.randn(0, 256),
        torch.randn(1025)[1:].view(4, 256),
    ):
        given = x.half()
        bench.compare(f"{list(x.shape)}", packed(given), bench.product(given))
    assert isinstance(BitblasLinear.from_layer(layer, torch.float16), BitblasLinear)
    assert len(asked) == len(race.ROWS) and len(Matmul.made) == 1, "a shape is timed and compiled once"


@pytest.mark.parametrize("slow", range(len(race.ROWS)))
def test_where_it_is_not_quicker_for_one_number_of_rows_it_is_refused(package: pytest.MonkeyPatch, slow: int) -> None:
    asked = clock(package, *(i != slow for i in range(len(race.ROWS))))
    layer = random_layer(Scheme.parse("W4A16-g128-asym"), 128, 256)
    first = refused(layer)
    assert first.code == "not-quicker" and "reference_linear" in first.reason and "128 x 256" in first.fact
    assert f" {race.ROWS[slow]} rows" in first.reason and "20.0 us beside 20.0" in first.fact
    assert refused(layer) == first and len(asked) == len(race.ROWS), "a shape is timed once"
    assert refused(random_layer(Scheme.parse("W4A16-g128-asym"), 256, 256)) != first and len(asked) == 2 * len(
        race.ROWS
    )


def test_the_next_kernel_takes_the_layer_and_it_is_said_once(
    package: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = random_layer(Scheme.parse("W4A16-g128-asym"), 128, 256)
    for quicker, taken in ((True, "bitblas_int"), (False, "reference_linear")):
        clock(package, quicker)
        bitblas._VERDICTS.clear()
        packer = Packer(GPU, torch.float16, None, True)
        with caplog.at_level(logging.INFO, "qcore"):
            assert [packer.linear(layer).kernel_name for _ in range(3)] == [taken] * 3
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"], caplog.text
    assert "is quicker than reference_linear" in caplog.records[0].message
    assert "not-quicker" in caplog.records[1].message


def test_an_answer_unlike_the_others_is_refused_however_quick(package: pytest.MonkeyPatch) -> None:
    clock(package, True)
    package.setattr(Matmul, "factor", 1.02)
    assert refused(random_layer(Scheme.parse("W4A16-g32-sym"), 128, 128)).code == "kernel-wrong"


@pytest.mark.parametrize("fault", [ValueError("no schedule"), SystemExit(1)])
def test_whatever_its_compilers_do_is_a_refusal(package: pytest.MonkeyPatch, fault: BaseException) -> None:
    package.setattr(Matmul, "fault", fault)
    found = refused(random_layer(Scheme.parse("W4A16-g32-sym"), 128, 128))
    assert found.code == "kernel-failed" and type(fault).__name__ in found.fact


def test_a_clock_that_fails_is_a_refusal(package: pytest.MonkeyPatch) -> None:
    package.setattr(race, "seconds", lambda runs, place: 1 / 0)
    assert refused(random_layer(Scheme.parse("W4A16-g32-sym"), 128, 128)).code == "kernel-failed"


@pytest.mark.parametrize(("name", "value"), [("lib", None), ("lib", object())])
def test_a_program_that_nvcc_did_not_make_is_refused(package: pytest.MonkeyPatch, name: str, value: object) -> None:
    package.setattr(Matmul, "__setattr__", lambda self, key, given: object.__setattr__(self, key, value if key == name else given))  # fmt: skip
    assert refused(random_layer(Scheme.parse("W4A16-g32-sym"), 128, 128)).code == "kernel-failed"


def test_a_weight_of_another_shape_is_refused(package: pytest.MonkeyPatch) -> None:
    package.setattr(Matmul, "retrieve_weight_shape", lambda self: [8, 8, 16, 8])
    assert refused(random_layer(Scheme.parse("W4A16-g32-sym"), 128, 128)).code == "kernel-wrong"


def test_it_needs_nvcc_where_no_program_is_stored(package: pytest.MonkeyPatch) -> None:
    clock(package, True)
    layer = random_layer(Scheme.parse("W4A16-g32-sym"), 128, 128)
    package.setattr(bitblas_package.shutil, "which", lambda name: None)
    assert refused(layer).code == "missing-package"
    package.setattr(bitblas_package.shutil, "which", lambda name: "/bin/nvcc")
    bitblas_package._MADE.clear()
    BitblasLinear.from_layer(layer, torch.float16)
    package.setattr(bitblas_package.shutil, "which", lambda name: None)
    bitblas_package._MADE.clear()
    BitblasLinear.from_layer(layer, torch.float16)
    assert len(Matmul.made) == 1, "what was compiled once is read from the database"


def test_tuned_programs_go_before_others(package: pytest.MonkeyPatch) -> None:
    clock(package, True)
    layer = random_layer(Scheme.parse("W4A16-g32-sym"), 128, 128)
    BitblasLinear.from_layer(layer, torch.float16)
    assert list(OperatorCache.files) == ["database/qcore-untuned/0.1.0.post1/cuda -arch=sm_80"]
    package.setenv("QCORE_BITBLAS", "tune")
    bitblas_package._MADE.clear()
    BitblasLinear.from_layer(layer, torch.float16)
    package.delenv("QCORE_BITBLAS")
    bitblas_package._MADE.clear()
    packed = BitblasLinear.from_layer(layer, torch.float16)
    assert "database/cuda -arch=sm_80" in OperatorCache.files and len(Matmul.made) == 2
    found: Any = bitblas_package.operator(packed.form, "sm_80")._matmul
    assert found.tuned == 20 and [matmul.tuned for matmul in Matmul.made] == [0, 20]


def test_always_asks_no_clock(package: pytest.MonkeyPatch) -> None:
    asked = clock(package, False)
    package.setenv("QCORE_BITBLAS", "always")
    BitblasLinear.from_layer(random_layer(Scheme.parse("W4A16-g32-sym"), 128, 128), torch.float16)
    assert not asked


@pytest.mark.parametrize(
    ("scale", "dtype", "taken"),
    [(0.0078125, torch.bfloat16, True), (1e-9, torch.bfloat16, False), (0.1, torch.float32, False), (5000.0, torch.float16, False),
     (float("nan"), torch.float16, False)],
)  # fmt: skip
def test_scales_must_be_numbers_of_float16(
    package: pytest.MonkeyPatch, scale: float, dtype: torch.dtype, taken: bool
) -> None:
    clock(package, True)
    layer = random_layer(Scheme.parse("W4A16-g128-asym"), 128, 128)
    scales = torch.full_like(layer.weight.scales[0], 0.0078125, dtype=dtype)
    scales[3] = scale
    layer = dataclasses.replace(layer, weight=dataclasses.replace(layer.weight, scales=(scales,)))
    if taken:
        BitblasLinear.from_layer(layer, torch.float16)
    else:
        assert refused(layer).code == "contents-unsupported"


def test_the_operator_traces(package: pytest.MonkeyPatch) -> None:
    clock(package, True)
    packed = BitblasLinear.from_layer(random_layer(Scheme.parse("W4A16-g32-asym"), 128, 128), torch.float16)
    given = (torch.randn(3, 128).half(), packed.weight, packed.scales, packed.zeros, 4, 32, 128)
    torch.library.opcheck(bitblas.product, given, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(TypeError, match="float16"):
        packed(torch.randn(3, 128))


def test_without_a_gpu_it_is_refused_before_the_package_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitblas, "examine", lambda: SimpleNamespace(devices=()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bitblas_package, "_imported", lambda: pytest.fail("the package is imported"))
    bitblas.this_device.cache_clear()
    try:
        assert refused(random_layer(Scheme.parse("W4A16-g32-sym"), 128, 128)).code == "no-device"
    finally:
        bitblas.this_device.cache_clear()


def test_gpus_of_several_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = tuple(Device(f"cuda:{i}", "ampere", "a GPU", f"cuda:{i}", f"sm_8{6 * i}") for i in range(2))
    for found, fits in ((devices, False), (devices[:1], True)):
        monkeypatch.setattr(bitblas, "examine", lambda found=found: SimpleNamespace(devices=found))
        bitblas.this_device.cache_clear()
        if fits:
            assert bitblas.this_device(0) is devices[0]
        else:
            with pytest.raises(Refused, match="all of one kind"):
                bitblas.this_device(0)
    bitblas.this_device.cache_clear()


def test_what_the_import_leaves_behind_is_not_seen(tmp_path: Path) -> None:
    """A package that does to sys.path and the environment what bitblas does; then one that does not import; then another's TVM."""
    (tmp_path / "bitblas").mkdir()
    (tmp_path / "bitblas" / "cache.py").write_text("")
    (tmp_path / "bitblas" / "__init__.py").write_text(
        "import logging, os, sys\nlogging.basicConfig(filename='out.log', level=logging.INFO)\nsys.path = [path for path in sys.path if 'tvm' not in path]\nsys.path.insert(0, 'own/tvm')\n"
        "os.environ['PYTHONPATH'] = 'own/tvm:' + os.environ.get('PYTHONPATH', '')\nos.environ['TVM_IMPORT_PYTHON_PATH'] = 'own/tvm'\n"
    )
    code = f"""
import os, sys
from qcore.refusal import Refused
from qcore_cuda import bitblas_package, plugin
from qcore_cuda.kernels import bitblas
assert 'bitblas' not in sys.modules, 'imported before its first layer'
sys.path[:0] = [{str(tmp_path)!r}, 'my/tvm']
list_, before = sys.path, (list(sys.path), dict(os.environ))
for _ in range(2):
    with bitblas_package.package():
        assert sys.path[0] == 'own/tvm' and os.environ['PYTHONPATH'].startswith('own/tvm') and os.environ['TVM_IMPORT_PYTHON_PATH'] == 'own/tvm'
    assert sys.path is list_ and (list(sys.path), dict(os.environ)) == before
import logging
assert not os.path.exists('out.log') and not logging.getLogger().handlers and logging.getLogger().level == logging.WARNING
del sys.modules['bitblas']
bitblas_package._imported.cache_clear()
open({str(tmp_path / "bitblas" / "__init__.py")!r}, 'w').write('raise RuntimeError("Cannot find cuda device 0.")')
for foreign in (False, True):
    if foreign:
        sys.modules['tvm'] = sys
        bitblas_package._imported.cache_clear()
    try:
        with bitblas_package.package():
            raise SystemExit('not refused')
    except Refused as refused:
        assert refused.refusal.code == 'missing-package' and ('another TVM' in str(refused)) == foreign, refused
"""
    subprocess.run(
        [sys.executable, "-B", "-c", code],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


# --- Selection --------------------------------------------------------------------------------------------------------


def chosen(platform: str, scheme: str = "W4A16-g128-asym", dtype: str = "float16", **more: Any) -> Any:
    request = LayerRequest("linear", Scheme.parse(scheme), more.pop("shape", (256, 256)), dtype, **more)
    found = select(request, platform, registry().kernels)
    return found.kernel, next(c.refusal for c in found.candidates if c.kernel is KERNEL)


def test_it_comes_just_before_the_next_where_the_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qcore.select, "_version", lambda name: "0.1.0.post1" if name == "bitblas" else "9.0")
    for platform in ("volta", "turing", "ampere", "ada"):
        assert chosen(platform)[0] is KERNEL
    for given, code in (
        ({"platform": "hopper"}, "wrong-platform"), ({"platform": "blackwell"}, "wrong-platform"),
        ({"platform": "ampere", "dtype": "bfloat16"}, "dtype-unsupported"),
        ({"platform": "ampere", "scheme": "W8A16-g128-sym"}, "scheme-unsupported"),
        ({"platform": "ampere", "scheme": "W4A16-g128-sym-actorder"}, "scheme-unsupported"),
        ({"platform": "ampere", "shape": (192, 256)}, "shape-unsupported"), ({"platform": "ampere", "shape": (128, 320)}, "shape-unsupported"),
    ):  # fmt: skip
        kernel, why = chosen(**given)
        assert kernel is not KERNEL and why.code == code, (given, why)
    assert chosen("ampere", expert=True)[0].name == "marlin_int4", "experts in one launch go before experts one by one"


@pytest.mark.parametrize("platform", ["volta", "turing", "ampere", "ada", "hopper"])
def test_without_the_package_goldens_run_as_if_the_row_were_not_there(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qcore.select, "_version", lambda name: "" if name == "bitblas" else "9.0")
    seen: set[str] = set()
    for path in sorted(path for path in GOLDEN.iterdir() if path.is_dir()):
        for layer in explain(path, platform=platform, dtype="float16").layers:
            if layer.selection is None or layer.scheme is None or layer.selection.candidates[0].kernel.op != "linear":
                continue
            why = next(c.refusal for c in layer.selection.candidates if c.kernel is KERNEL)
            assert layer.selection.kernel is not KERNEL and why is not None
            seen.add(why.code)
            assert why.code != "missing-requirement" or why.fact == "bitblas>=0.1, found none"
            first = next(c.kernel for c in layer.selection.candidates if c.accepted and c.kernel is not KERNEL)
            assert layer.selection.kernel is first
    if platform == "hopper":
        assert seen == {"wrong-platform"}
    else:
        assert not seen - {"missing-requirement", "scheme-unsupported", "shape-unsupported"}, seen
    kernel, why = chosen(platform)
    assert kernel.name == {"volta": "triton_fp16_integers", "turing": "marlin_fp16_int4"}.get(platform, "marlin_int4")
    assert why.code == ("wrong-platform" if platform == "hopper" else "missing-requirement")


def test_the_matrix_is_what_it_is_without_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cheaper kernel that nothing proves stands for no scheme that another is proved for."""
    plugins = registry()

    def without() -> Any:
        rows = [row for row in plugins.kernels if row[0] is not KERNEL]
        return matrix(
            SimpleNamespace(
                **{name: getattr(plugins, name) for name in ("plugins", "platforms", "methods", "absent")}, kernels=rows
            )
        )  # type: ignore[arg-type]

    found, wanted = matrix(), without()
    for cell, other in zip(found.cells, wanted.cells, strict=True):
        assert LADDER.index(cell.evidence) <= LADDER.index(other.evidence) and cell.kernels == other.kernels, (cell.row.id, cell.platform)  # fmt: skip


def test_the_row_and_its_note() -> None:
    assert isinstance(KERNEL, Kernel) and KERNEL.optional and ("bitblas", "0.1") in KERNEL.requires
    assert "quicker" in KERNEL.note and KERNEL.cost < min(kernel.cost for name, kernel in ALL.items() if name.startswith("marlin"))  # fmt: skip
