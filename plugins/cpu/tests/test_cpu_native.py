"""The native library: instruction sets, torch's view of the operator, threads, and what happens where it is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from qcore.accuracy import worst_error
from qcore.scheme import Scheme
from qcore.testing.layers import random_layer
from qcore_cpu.kernels.native import NativeEmbedding, NativeLinear, NativeLinearInt8
from qcore_cpu.library import ISA_VARIABLE, Status, register, status

pytestmark = pytest.mark.skipif(not status().isa, reason=f"no native kernels here: {status().fault}")


@pytest.fixture(autouse=True, scope="module")
def _operators() -> None:
    """A test that names an operator may be a process's first."""
    register()


PROBE = """
import json, torch
from qcore.accuracy import worst_error
from qcore.scheme import Scheme
from qcore.testing.layers import random_layer
from qcore_cpu.kernels.native import NativeLinear, NativeLinearInt8
from qcore_cpu.library import status
worst = {}
for text in ("W4A16-g32-asym", "W3A16-g128-sym-actorder", "W8A16-channel-sym", "W4A16-nf4-g64", "W8A16-fp8-block128",
             "W4A16-gguf:q4_k", "W6A16-gguf:q6_k", "W2A16-gguf:iq2_xxs", "W8A8-int8-dyn"):
    layer = random_layer(Scheme.parse(text), 80, 512)
    for kernel in (NativeLinear, NativeLinearInt8)[: 1 if "A8" in text or "nf4" in text or "fp8" in text else 2]:
        packed = kernel.from_layer(layer, torch.bfloat16)
        for rows in (1, 3, 17):
            x = torch.randn(rows, 512).bfloat16()
            given = packed.rounded(x) if kernel is NativeLinearInt8 else x.float()
            if layer.weight.scheme.input is not None:
                from qcore.kernels.activations import quantize_input
                given = quantize_input(x.float(), layer.weight.scheme.input)
            error = worst_error(packed(x), given.double() @ layer.weight.dequantize().double().t())
            worst[f"{text} {kernel.__name__} {rows}"] = error
print(json.dumps({"isa": status().isa, "worst": worst}))
"""


def run(code: str, **variables: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("isa", status().available)
def test_every_instruction_set_of_this_processor(isa: str) -> None:
    found = json.loads(run(PROBE, **{ISA_VARIABLE: isa}))
    assert found["isa"] == isa and len(found["worst"]) == 45
    assert max(found["worst"].values()) < 0.01, found["worst"]


@pytest.mark.parametrize("kind", [NativeLinear, NativeLinearInt8])
def test_a_tied_layer_shares_what_its_embedding_has_packed(kind: type[NativeLinear]) -> None:
    layer, other = (random_layer(Scheme.parse("W4A16-gguf:q4_0"), 80, 512, seed=seed) for seed in (1, 2))
    dense = layer.weight.dequantize()
    embedding, tied = (of.from_layer(layer, torch.float32) for of in (NativeEmbedding, kind))
    alone, stranger = (kind.from_layer(of, torch.float32) for of in (layer, other))
    assert tied.packed.data_ptr() == embedding.packed.data_ptr()
    assert len({part.packed.data_ptr() for part in (tied, alone, stranger)}) == 3, "a second layer has its own"
    x = torch.randn(3, 512)
    assert torch.equal(tied(x), alone(x))
    assert torch.equal(embedding(torch.tensor([0, 7, 79])), dense[[0, 7, 79]])
    NativeEmbedding.from_layer(layer, torch.float32)
    assert kind.from_layer(other, torch.float32)(x).equal(stranger(x)), "it is of another weight"


def test_an_instruction_set_that_is_not_there_leaves_torchs_operators_and_it_is_said() -> None:
    code = "from qcore_cpu.plugin import qcore_report; print(qcore_report()['native kernels'])"
    said = run(code, **{ISA_VARIABLE: "sse9"})
    assert said.startswith("none (QCORE_CPU_ISA=sse9 is none of") and "torch's operators" in said
    chosen = """
from qcore.discovery import registry
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore_cpu.devices import cpu_device
request = LayerRequest("linear", Scheme.parse("W4A16-g32-sym"), (64, 64), "bfloat16")
selection = select(request, "x86_cpu", registry().kernels, cpu_device())
print(selection.kernel.name, [c.refusal.fact for c in selection.candidates if c.kernel.name == "native_linear"][0])
"""
    assert (
        "native_linear" not in (said := run(chosen, **{ISA_VARIABLE: "sse9"})).split()[0] and "native_kernels" in said
    )


def test_the_report_names_the_instruction_set() -> None:
    from qcore_cpu.plugin import qcore_report

    assert qcore_report()["native kernels"].startswith(status().isa)


def test_a_library_that_was_not_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcore_cpu.library.library_path", lambda: None)
    from qcore_cpu import library

    for cached in (library.load, library.status):
        cached.cache_clear()
    try:
        assert library.status() == Status("", (), "not built: no C++ compiler was there when the package was installed")
    finally:
        monkeypatch.undo()
        for cached in (library.load, library.status):
            cached.cache_clear()


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcore_cpu import library

    monkeypatch.setattr(library, "sources", lambda: "another digest")
    library.status.cache_clear()
    try:
        assert "other sources" in library.status().fault and not library.status().isa
    finally:
        monkeypatch.undo()
        library.status.cache_clear()


def small(scheme: str = "W4A16-g32-sym", rows: int = 48, columns: int = 96) -> NativeLinear:
    return NativeLinear.from_layer(random_layer(Scheme.parse(scheme), rows, columns), torch.bfloat16)


def test_torch_knows_the_operators_shapes() -> None:
    packed = small()
    x = torch.randn(2, 3, 96).bfloat16()
    torch.library.opcheck(
        torch.ops.qcore_cpu.linear.default, (x, packed.packed, 48), test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), packed(x))


@pytest.mark.parametrize(
    ("x", "rows", "clue"),
    [
        (torch.zeros(2, 95), 48, "x has 95 columns"),
        (torch.zeros(2, 96), 47, "47 are wanted"),
        (torch.zeros(2, 96, dtype=torch.float64), 48, "takes float32, float16 and bfloat16"),
        (torch.zeros(2, 192)[:, ::2], 48, "rows of x must be contiguous"),
    ],
)
def test_wrong_calls_are_refused(x: torch.Tensor, rows: int, clue: str) -> None:
    with pytest.raises(RuntimeError, match=clue):
        torch.ops.qcore_cpu.linear(x, small().packed, rows)


@pytest.mark.parametrize(
    ("cut", "clue"),
    [(slice(0, 100), "no packed weight"), (slice(0, -64), "another size"), (slice(64, None), "no packed")],
)
def test_what_is_no_packed_weight_is_refused(cut: slice, clue: str) -> None:
    with pytest.raises(RuntimeError, match=clue):
        torch.ops.qcore_cpu.linear(torch.zeros(1, 96), small().packed[cut].clone(), 48)


@pytest.mark.parametrize("kernel", [NativeLinear, NativeLinearInt8])
def test_answers_are_the_same_bits_whatever_the_threads(kernel: type[NativeLinear]) -> None:
    packed = kernel.from_layer(random_layer(Scheme.parse("W4A16-g128-asym"), 400, 512), torch.float32)
    threads = torch.get_num_threads()
    try:
        for rows in (1, 5, 64):
            x = torch.randn(rows, 512)
            torch.set_num_threads(1)
            alone = packed(x)
            torch.set_num_threads(4)
            assert all(torch.equal(packed(x), alone) for _ in range(5))
    finally:
        torch.set_num_threads(threads)


def test_groups_that_a_row_does_not_fill() -> None:
    for scheme in ("W4A16-g128-asym", "W5A16-g16-sym", "W8A16-int8-g256-zfloat"):
        layer = random_layer(Scheme.parse(scheme), 19, 200)
        x = torch.randn(3, 200)
        expected = x.double() @ layer.weight.dequantize().double().t()
        assert worst_error(NativeLinear.from_layer(layer, torch.float32)(x), expected) < 1e-5


def test_codes_that_are_no_numbers_are_left_to_others() -> None:
    import qcore

    layer = random_layer(Scheme.parse("W8A16-fp8-channel"), 16, 32)
    layer.weight.codes.view(torch.uint8)[3, 5] = 0x7F
    with pytest.raises(qcore.Refused, match="contents-unsupported"):
        NativeLinear.from_layer(layer, torch.float32)


@pytest.mark.alone
def test_a_call_takes_microseconds() -> None:
    """What a call costs beside the product: a weight of 16 x 32 on one thread. On a slow host, as much as two additions of torch."""
    packed, x = small(rows=16, columns=32), torch.randn(1, 32).bfloat16()
    operator, weight = torch.ops.qcore_cpu.linear.default, packed.packed
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def microseconds(call: Callable[[], object]) -> float:
        spent = []
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(500):
                call()
            spent.append((time.perf_counter() - began) / 500 * 1e6)
        return sorted(spent)[10]

    try:
        with torch.inference_mode():
            microseconds(lambda: operator(x, weight, 16))
            ours, torchs = microseconds(lambda: operator(x, weight, 16)), microseconds(lambda: torch.add(x, x))
    finally:
        torch.set_num_threads(threads)
    assert ours < max(5, 2.5 * torchs), f"{ours:.1f} us; torch.add takes {torchs:.1f}"


def test_registering_twice_is_once() -> None:
    assert register() is register()


def test_weights_that_share_memory_do_not_overlap() -> None:
    from qcore_cpu.packed import _Room

    room = _Room()
    with torch.inference_mode():
        room.take(100).fill_(1)
    sizes = (1, 64, 65, 1000, room.SIZE // 2, room.SIZE // 2, 5000, room.SIZE, 3 * room.SIZE, 64)
    parts = [room.take(size) for size in sizes]
    for number, part in enumerate(parts):
        assert part.data_ptr() % 64 == 0
        part.fill_(number)
    assert all(int(part.min()) == int(part.max()) == number for number, part in enumerate(parts))
    assert [part.numel() for part in parts] == list(sizes)
