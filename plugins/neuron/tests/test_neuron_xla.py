"""Kernels as torch-xla lowers them, which is how torch-neuronx gets its programs, too: within what Neuron's compiler is known to take, and run by XLA on the CPU.

`make test-neuron` installs torch-xla; without it all of this is skipped. QCORE_GOLDEN=FOLDER runs more checkpoints than those of this repository.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from neuron_goldens import logits_agree

from golden_checkpoints import goldens
from qcore.accuracy import error_bound, worst_error
from qcore.discovery import registry
from qcore.kernel import Kernel
from qcore.platform import Device
from qcore.scheme import PRESETS, Scheme
from qcore.testing.cases import claimed, row_schemes
from qcore.testing.checks import Bench
from qcore.testing.verify import examine, unable
from qcore_neuron import stand_in
from qcore_neuron.operators import ATEN
from qcore_neuron.sdk import sdk
from qcore_neuron.stablehlo import faults, operations

os.environ.setdefault("PJRT_DEVICE", "CPU")
pytest.importorskip("torch_xla", reason="make test-neuron installs it")

FEATURES = frozenset({"e4m3fn"})
XLA = Device("xla-cpu", "neuron", "XLA on a CPU", "xla", "trn2", FEATURES, fast_dtype="bfloat16", simulated=True)
CPU = Device("cpu", "neuron", "torch on a CPU", "cpu", "trn2", FEATURES, fast_dtype="bfloat16", simulated=True)
KERNELS = [kernel for kernel, plugin in registry().kernels if plugin == "neuron"]
SCHEMES = tuple(dict.fromkeys((*row_schemes(), *PRESETS.values(), Scheme.parse("W8A16-e5m2-channel"))))
CASES = [
    (kernel, scheme) for kernel in KERNELS for scheme in claimed(kernel, SCHEMES) if unable(kernel, scheme, CPU) is None
]


def name(case: object) -> str:
    return case.name if isinstance(case, Kernel) else str(case)


@pytest.fixture(scope="module", autouse=True)
def nobody_elses_devices() -> None:
    assert sdk() is None, "torch-neuronx is here: its devices would run what is to run on the CPU"
    import torch_xla

    assert os.environ["PJRT_DEVICE"] == "CPU" and torch_xla.device().type == "xla"


def lowered(module: torch.nn.Module, *given: torch.Tensor) -> tuple[str, torch.Tensor, list[str]]:
    """The program of one call in StableHLO, its result, and torch's operators that were left to the CPU."""
    import torch_xla
    import torch_xla.core.xla_model as xla
    import torch_xla.debug.metrics as metrics

    placed, moved = module.to("xla"), [part.to("xla") for part in given]
    torch_xla.sync()
    metrics.clear_all()
    out = placed(*moved)
    text: str = xla.get_stablehlo([out])
    torch_xla.sync()
    found = out.cpu()
    return text, found, [counter for counter in metrics.counter_names() if counter.startswith("aten::")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=name)
def test_programs_are_within_what_the_compiler_takes(kernel: Kernel, scheme: Scheme, dtype: str) -> None:
    bench = Bench(kernel, scheme, dtype, "odd", CPU)
    tokens = torch.tensor([3, 0, 1, 3])
    x = tokens if kernel.op == "embedding" else bench.input(5)
    text, got, left_to_the_cpu = lowered(bench.packed, x)
    assert left_to_the_cpu == []
    assert faults(text, e4m3fn=True) == []
    expected = bench.weight[tokens] if kernel.op == "embedding" else bench.product(x)
    assert worst_error(got, expected) <= error_bound(kernel, scheme, dtype)
    uses_e4m3fn = any("f8E4M3FN" in operation.types for operation in operations(text))
    assert uses_e4m3fn == ("e4m3fn" in {feature for needed in kernel.features for feature in needed})
    assert bool(faults(text, e4m3fn=False)) == uses_e4m3fn


@pytest.mark.parametrize(("kernel", "scheme"), list(dict(reversed(CASES)).items()), ids=name)
def test_the_conformance_checks_on_xla(kernel: Kernel, scheme: Scheme) -> None:
    """All of `qcore verify`, in every batch size, shape and data type, for the first scheme of each kernel: each shape is compiled anew, which takes its time."""
    found = examine("neuron", XLA, kernel, scheme)
    assert not found.failures, found.failures[:3]
    assert found.cases >= 16


def test_shapes_are_static_and_compiled_once() -> None:
    import torch_xla
    import torch_xla.debug.metrics as metrics

    kernel = next(kernel for kernel in KERNELS if kernel.name == "neuron_integers")
    packed = Bench(kernel, Scheme.parse("W4A16-g128-asym"), "bfloat16", "odd", CPU).packed.to("xla")
    counts = []
    for seed in range(3):
        x = torch.randn(4, 384, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        packed(x.to("xla")).cpu()
        torch_xla.sync()
        counts.append((metrics.metric_data("CompileTime") or (0,))[0])
    assert counts[0] == counts[1] == counts[2] > 0


def test_every_operator_of_the_list_is_lowered_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no operator is on it that no kernel comes down to: the stand-in's list is what is proved here. What the stand-in itself asks of tensors, where another test has
    it watch kernels already, is none of theirs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(stand_in, "Chip", nullcontext)
    seen: set[str] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(str(func).split(".")[1])
            return func(*args, **(kwargs or {}))

    for kernel, scheme in CASES:
        bench = Bench(kernel, scheme, "bfloat16", "tiny", CPU)
        packed = bench.packed
        inputs = [torch.zeros(2, 3, dtype=torch.int64)] if kernel.op == "embedding" else [bench.input(3), bench.input()]
        if kernel.op == "linear":
            inputs += [bench.input(0), bench.input(2, 3), torch.stack([bench.input(3), bench.input(3)], -1)[..., 0]]
        with Seen():
            for x in inputs:
                packed(x)
    assert seen == ATEN


@pytest.mark.parametrize("path", goldens(), ids=lambda path: path.name)
def test_logits_of_real_checkpoints(path: Path) -> None:
    """Nothing of a layer is left to the CPU; the model's own rotary table is, and what asks tensors for numbers."""
    import torch_xla.debug.metrics as metrics

    metrics.clear_all()
    logits_agree(path, XLA)
    left = {counter for counter in metrics.counter_names() if counter.startswith("aten::")}
    assert left <= {"aten::_local_scalar_dense"}
