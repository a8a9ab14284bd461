"""The conformance suite itself: what it must catch, and what declarations do."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from qcore.accuracy import BOUNDS, bit_class, error_bound, worst_error
from qcore.discovery import registry
from qcore.kernel import Accepts
from qcore.kernels.reference import ReferenceLinear
from qcore.kernels.stacking import StackableLinear
from qcore.platform import Device
from qcore.scheme import Scheme
from qcore.tensor import LayerTensors
from qcore.testing import suite
from qcore.testing.capabilities import Capabilities
from qcore.testing.cases import GROUPS, catalogue, claimed, row_schemes
from qcore.testing.checks import BATCHES, CHECKS, Bench
from qcore.testing.verify import Question, examine, records, verifiable
from sim import Sim, columns_of, kernel, sim_registry

HERE = Device("cpu", "x86_cpu", "this host", "cpu")
REFERENCE = next(kernel for kernel, _ in registry().kernels if kernel.name == "reference_linear")
INT4 = Scheme.parse("W4A16-g32-sym")


class Wrong(ReferenceLinear):
    """A kernel with one fault, told by a class attribute."""

    fault = ""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> "Wrong":
        if cls.fault == "raises":
            raise KeyError("scales")
        return cls(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fault == "empty" and not x.numel():
            raise RuntimeError("no rows")
        if self.fault == "contiguous" and not x.is_contiguous():
            x = x.reshape(-1).as_strided(x.shape, (x.shape[-1], 1)) * 1.1
        if self.fault == "writes":
            x *= 2
        if self.fault == "sequences" and x.dim() > 2:
            x = x.flatten(0, -2)
        out = super().forward(x)
        if self.fault == "last channel":
            out[..., -1] = 0
        if self.fault == "seventeenth row" and x.dim() > 1 and x.shape[0] > 16:
            out[16:] = 0
        if self.fault == "dtype":
            return out.float()
        if self.fault == "one percent":
            return out * 1.03
        return out


class WrongExperts(StackableLinear):
    """A kernel that holds experts as one, with one fault, told by a class attribute."""

    fault = ""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> "WrongExperts":
        return cls(layer.weight.dequantize(dtype))

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        weight = self.get_buffer("weight")
        if self.fault == "neighbour":
            experts = (experts + 1).clamp(max=len(weight) - 1)
        out = torch.einsum("mk,mnk->mn", x.float(), weight[experts].float())
        if self.fault == "first block":
            out[64:] = 0
        return out.to(x.dtype)


@pytest.mark.parametrize("fault", ["neighbour", "first block", ""])
def test_a_fault_of_experts_is_found(fault: str) -> None:
    tried, broken = bench(""), type("Broken", (WrongExperts,), {"fault": fault})
    object.__setattr__(tried.kernel, "load", lambda: broken)
    if not fault:
        assert 0 < CHECKS["stacked_experts"](tried) < tried.bound
        return
    with pytest.raises(AssertionError, match="experts"):
        CHECKS["stacked_experts"](tried)


def bench(fault: str, *, size: str = "odd", scheme: Scheme = INT4, dtype: str = "bfloat16", **row: object) -> Bench:
    broken = type("Broken", (Wrong,), {"fault": fault})
    facts = {"family": "sim", "dtypes": ("bfloat16",), "ragged": True, **row}
    made = replace(kernel("broken", "x86_cpu"), **facts)  # type: ignore[arg-type]
    object.__setattr__(made, "load", lambda: broken)
    return Bench(made, scheme, dtype, size, HERE)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("last channel", "numbers"),
        ("seventeenth row", "numbers"),
        ("one percent", "numbers"),
        ("dtype", "numbers"),
        ("raises", "numbers"),
        ("sequences", "leading_dimensions"),
        ("contiguous", "strided_input"),
        ("writes", "strided_input"),
        ("empty", "empty_input"),
    ],
)
def test_a_fault_is_found_by_its_check(fault: str, check: str) -> None:
    with pytest.raises((AssertionError, KeyError, RuntimeError)):
        CHECKS[check](bench(fault))
    for other in CHECKS.keys() - {check, "stacked_experts"}:  # and the right kernel passes all
        CHECKS[other](bench(""))


def test_a_dense_weight_is_found() -> None:
    heavy = bench("", size="large")
    heavy.packed.register_buffer("dense", heavy.weight)
    with pytest.raises(AssertionError, match="bytes"):
        CHECKS["packed_size"](heavy)


def test_every_check_has_its_capability() -> None:
    for name in CHECKS:
        assert getattr(Capabilities("cpu"), name) is True and getattr(Capabilities, name).__doc__


class Modest(Capabilities):
    """A vendor that declares what it cannot do."""

    def __init__(self, missing: str = "", failures: Mapping[str, str] | None = None) -> None:
        super().__init__("cpu")
        self.missing, self.failures = missing, failures or {}

    @property
    def empty_input(self) -> bool:
        return self.missing != "empty_input"

    @property
    def known_failures(self) -> Mapping[str, str]:
        return self.failures


def test_what_is_declared_missing_must_fail() -> None:
    suite._expect(Modest("empty_input"), bench("empty"), "empty_input")
    with pytest.raises(AssertionError, match="take the declaration back"):
        suite._expect(Modest("empty_input"), bench(""), "empty_input")
    with pytest.raises(AssertionError, match="no rows"):
        suite._expect(Modest(), bench("empty"), "empty_input")


def test_a_known_failure_must_fail_too() -> None:
    known = {"broken W4A16-g32-* numbers": "the last channel is wrong, fixed in the next driver"}
    suite._expect(Modest(failures=known), bench("last channel"), "numbers")
    with pytest.raises(AssertionError, match="take the declaration back"):
        suite._expect(Modest(failures=known), bench(""), "numbers")
    with pytest.raises(AssertionError, match="error"):
        suite._expect(Modest(failures=known), bench("last channel", scheme=Scheme.parse("W8A16-g32-sym")), "numbers")


def test_batches_and_catalogue_are_as_broad_as_promised() -> None:
    assert set(range(1, 18)) | {512} == set(BATCHES)
    assert len(catalogue()) > 300 and set(row_schemes()) <= set(catalogue())
    texts = {str(scheme) for scheme in catalogue()}
    assert {f"W4A16-g{size}-sym" for size in GROUPS} <= texts and "W4A16-g128-sym-actorder" in texts
    assert claimed(replace(REFERENCE, accepts=Accepts(("gguf:q4_k",))), catalogue()) == [
        Scheme.parse("W4A16-gguf:q4_k")
    ]


def test_errors_are_measured_as_stated() -> None:
    expected = torch.tensor([[3.0, -4.0], [0.0, 5.0]], dtype=torch.float64)
    assert worst_error(expected.float(), expected) == 0
    size = float(expected.square().mean().sqrt())
    assert worst_error(expected + torch.tensor([0.0, 0.1]), expected) == pytest.approx(0.1 / (4 + size))
    assert worst_error(expected * float("nan"), expected) == float("inf")
    zeros = torch.zeros(2)
    assert worst_error(zeros, zeros) == 0 and worst_error(zeros + 1, zeros) == float("inf")
    assert worst_error(torch.zeros(0), torch.zeros(0)) == 0


def test_every_kernel_and_scheme_has_a_bound() -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        for scheme in catalogue():
            assert error_bound(REFERENCE, scheme, dtype) == BOUNDS[bit_class(REFERENCE, scheme)][dtype] > 0
    assert bit_class(replace(REFERENCE, quantizes_input=True), INT4) == "8-bit inputs"
    assert bit_class(replace(REFERENCE, quantizes_input=True), Scheme.parse("W8A8-int8-dyn")) == "8-bit inputs"


def test_verify_asks_equal_devices_once_and_grades_simulated_ones_so() -> None:
    twins = [Device(f"cuda:{i}", "hopper", "a simulated H200", "cpu", simulated=True) for i in range(8)]
    sim = Sim("cuda", columns_of("cuda"), [replace(REFERENCE, name="any", platforms=("hopper",))], devices=twins)
    plugins = sim_registry(sim)
    ((plugin, device, row),) = verifiable(plugins, Question("cuda", kernel="any"), plugins.devices())
    finding = examine(plugin.name, device, row, INT4)
    assert not finding.failures and 0 < finding.error < finding.bound and finding.cases > 10
    assert records([replace(finding, scheme=Scheme.parse("W4A16-g128-sym"))])[0].grade == "simulated"
    assert records([replace(finding, failures=("wrong",))]) == []
