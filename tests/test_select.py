"""Selection: the cheapest kernel that takes the layer, and a reason from every other."""

from dataclasses import replace

import pytest

from qcore.kernel import Accepts, Kernel
from qcore.platform import Device
from qcore.refusal import CODES
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select

INT4 = Accepts(("int4",), ("g32", "g128"))
HOST = Device("sim:0", "hopper", "a simulated device", "cpu", features=frozenset({"fp8", "wgmma"}))
FAST = Kernel("fast", "sim", "linear", ("hopper",), INT4, ("bfloat16",), 0.2, "x:y", multiples=(16, 64))
SLOW = Kernel(
    "slow",
    "sim",
    "linear",
    ("*",),
    Accepts(("*",), zeros=(None, "stored"), ordered=True),
    ("bfloat16", "float32"),
    9.0,
    "x:y",
)
ROUGH = Kernel("rough", "sim", "linear", ("hopper",), INT4, ("bfloat16",), 0.1, "x:y", quantizes_input=True)
NEEDY = Kernel("needy", "sim", "linear", ("hopper",), INT4, ("bfloat16",), 0.1, "x:y", features=(frozenset({"tmem"}),))
ABSENT = Kernel(
    "absent", "sim", "linear", ("hopper",), INT4, ("bfloat16",), 0.1, "x:y", requires=(("no-such-dist", "3.1"),)
)
EMBED = Kernel("embed", "sim", "embedding", ("*",), Accepts(("*",)), ("bfloat16",), 0.1, "x:y")
ALL = [(kernel, "sim") for kernel in (SLOW, ABSENT, EMBED, NEEDY, ROUGH, FAST)]


def request(
    scheme: str = "W4A16-g128-sym", shape: tuple[int, int] = (64, 128), dtype: str = "bfloat16", **rest: object
) -> LayerRequest:
    return LayerRequest("linear", Scheme.parse(scheme), shape, dtype, **rest)  # type: ignore[arg-type]


def reasons(asked: LayerRequest, platform: str = "hopper") -> dict[str, str | None]:
    trace = select(asked, platform, ALL, HOST).candidates
    return {c.kernel.name: c.refusal.code if c.refusal else None for c in trace}


def test_the_cheapest_wins_and_every_candidate_is_traced() -> None:
    selection = select(request(), "hopper", ALL, HOST)
    assert selection.kernel is FAST and selection.refusal is None
    assert [c.kernel.name for c in selection.candidates] == ["fast", "slow", "absent", "needy", "rough"]
    assert reasons(request()) == {
        "fast": None,
        "slow": None,
        "absent": "missing-requirement",
        "needy": "wrong-device",
        "rough": "inexact",
    }


def test_either_of_two_packages_will_do() -> None:
    there = replace(FAST, name="there", requires=(("no-such-dist|torch", "2.0"),))
    old = replace(FAST, name="old", requires=(("no-such-dist|torch", "99"),))
    found = {
        c.kernel.name: c.refusal for c in select(request(), "hopper", [(there, "sim"), (old, "sim")], HOST).candidates
    }
    assert found["there"] is None
    refusal = found["old"]
    assert (
        refusal is not None and refusal.code == "missing-requirement" and "no-such-dist>=99, found 2." in refusal.fact
    )


@pytest.mark.parametrize(
    ("asked", "platform", "code"),
    [
        (request(), "ada", "wrong-platform"),
        (request("W4A16-g64-sym"), "hopper", "scheme-unsupported"),
        (request("W4A16-g128-asym"), "hopper", "scheme-unsupported"),
        (request("W4A16-g128-sym-actorder"), "hopper", "scheme-unsupported"),
        (request("W8A8-int8-dyn"), "hopper", "scheme-unsupported"),
        (request(shape=(65, 128)), "hopper", "shape-unsupported"),
        (request(shape=(64, 100)), "hopper", "shape-unsupported"),
        (request(dtype="float32"), "hopper", "dtype-unsupported"),
        (request(kernel="slow"), "hopper", "not-chosen"),
    ],
)
def test_each_refusal_has_its_code_and_a_fix(asked: LayerRequest, platform: str, code: str) -> None:
    assert reasons(asked, platform)["fast"] == code
    for candidate in select(asked, platform, ALL, HOST).candidates:
        if candidate.refusal:
            assert candidate.refusal.code in CODES
            assert candidate.refusal.reason and candidate.refusal.fact and candidate.refusal.fix


@pytest.mark.parametrize(("architecture", "taken"), [("sm_86", True), ("sm_80", True), ("sm_90", False), ("", False)])
def test_a_kernel_may_name_the_architectures_that_it_needs(architecture: str, taken: bool) -> None:
    newer = replace(FAST, name="newer", architectures=("sm_8?",))
    found = select(request(), "hopper", [(newer, "sim")], replace(HOST, architecture=architecture))
    assert (found.kernel is not None) == taken
    if not taken:
        refusal = found.candidates[0].refusal
        assert refusal is not None and refusal.code == "wrong-device" and "sm_8?" in refusal.fact


@pytest.mark.parametrize(
    ("scheme", "shape", "whole"),
    [
        ("W4A16-g128-sym", (64, 128), True),
        ("W4A16-g128-sym", (64, 192), False),
        ("W8A8-fp8-block128", (128, 256), True),
        ("W8A8-fp8-block128", (192, 256), False),
        ("W8A8-fp8-block128", (128, 192), False),
    ],
)
def test_ragged_groups_go_only_to_kernels_that_take_them(scheme: str, shape: tuple[int, int], whole: bool) -> None:
    accepts = Accepts(("*",), inputs=("*",))
    strict = replace(FAST, name="strict", accepts=accepts)
    ragged = replace(strict, name="ragged", ragged=True, cost=5.0)
    found = select(request(scheme, shape), "hopper", [(strict, "sim"), (ragged, "sim")], HOST)
    assert found.kernel is (strict if whole else ragged)


def test_int8_activations_are_taken_only_when_allowed() -> None:
    assert select(request(exact=False), "hopper", ALL, HOST).kernel is ROUGH


def test_without_a_device_its_features_and_packages_are_taken_on_trust() -> None:
    assert select(request(), "hopper", ALL).kernel is ABSENT
    assert select(request(), "hopper", [(NEEDY, "sim"), (FAST, "sim")]).kernel is NEEDY


def test_no_kernel_names_the_nearest() -> None:
    selection = select(request("W4A16-nf4-g64"), "hopper", [(FAST, "sim"), (NEEDY, "sim")], HOST)
    assert selection.kernel is None and selection.refusal is not None
    assert selection.refusal.code == "no-kernel" and "fast" in selection.refusal.fix
