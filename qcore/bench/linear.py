"""Timing one linear layer: contenders take turns, weights come from memory and not from a cache, and medians are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qcore.bench.contenders import Contender, Product, dense, of_registry
from qcore.bench.tools import of_tools
from qcore.discovery import registry
from qcore.kernels.activations import quantize_input
from qcore.pages import promote_pages
from qcore.refusal import Refusal, Refused
from qcore.testing.layers import random_layer

if TYPE_CHECKING:
    from qcore.platform import Device
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

MOST_COPIES = 80


@dataclass(frozen=True)
class Question:
    """What is measured. cold: bytes of copies of a weight that calls go round, so that no cache holds the next one. rounds: turns of
    each contender; a turn is one call for each copy, or few where calls are long."""

    schemes: tuple[Scheme, ...]
    batches: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    exact: bool = True
    peers: bool = False
    cold: int = 640 << 20
    rounds: int = 5


def measure(question: Question, device: Device) -> Iterator[dict[str, Any]]:
    """A row for each scheme, shape and batch. Raises Refused (no-kernel) where nothing but the reference takes a scheme."""
    for scheme in question.schemes:
        for rows, columns in question.shapes:
            layer = random_layer(scheme, rows, columns)
            own = of_registry(layer, registry().kernels, device, question.dtype, question.exact)
            if not own:
                raise Refused(Refusal("no-kernel", "notimpl", f"linear {scheme} on {device.platform}", "only the reference takes this layer",
                                      f"in {question.dtype}", "`qcore explain` shows why other kernels do not."))  # fmt: skip
            others: list[Contender] = []
            if question.peers:
                others = [dense(layer, torch.float32), *own[1:], *of_tools(layer, question.exact)]
            runs = [_Run(contender, question.cold) for contender in (own[0], dense(layer, torch.bfloat16), *others)]
            promote_pages(wait=True)
            for run in runs:  # pages that lay untouched while the others were made come slowly in some virtual machines
                run.turn(torch.zeros(1, columns), len(run.copies))
            for batch in question.batches:
                yield _row(layer, scheme, batch, runs, question.rounds)


def limits(device: Device, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """What torch's own operators reach on the device: bytes read (GB/s), int8 and bfloat16 products (10^12 operations/s)."""
    memory = torch.ones(64 << 20, dtype=torch.float32)
    read = _best(memory.sum)
    side = 512
    wide, whole = torch.randn(side, side).to(dtype), torch.randint(-128, 127, (side, side), dtype=torch.int8)
    return {
        "read_gbps": round(memory.nbytes / read / 1e9, 2),
        "int8_tops": round(2 * side**3 / _best(lambda: torch._int_mm(whole, whole)) / 1e12, 3),
        "bf16_tflops": round(2 * side**3 / _best(lambda: wide @ wide) / 1e12, 3),
    }


class _Run:
    """A contender's copies, and the times of its calls."""

    def __init__(self, contender: Contender, cold: int) -> None:
        self.contender = contender
        copies = max(1, min(MOST_COPIES, -(-cold // contender.nbytes)))
        self.copies: list[Product] = [contender.make() for _ in range(copies)]
        self.next = 0
        self.forget()

    def forget(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def turn(self, x: torch.Tensor, calls: int) -> None:
        given = x.to(self.contender.dtype)
        for _ in range(calls):
            product = self.copies[self.next]
            self.next = (self.next + 1) % len(self.copies)
            cpu, wall = time.process_time(), time.perf_counter()
            product(given)
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.process_time() - cpu)

    def times(self) -> tuple[float, float]:
        """Median seconds of a call: wall, and of all threads together."""
        return _median(self.wall), sum(self.cpu) / len(self.cpu)


@torch.inference_mode()
def _row(layer: LayerTensors, scheme: Scheme, batch: int, runs: list[_Run], rounds: int) -> dict[str, Any]:
    rows, columns = layer.weight.shape
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1)).to(runs[0].contender.dtype)
    given = (
        x.float()
        if scheme.input is None
        else quantize_input(x.float(), scheme.input, layer.input_scale, layer.input_zero)
    )
    expected = given.double() @ layer.weight.dequantize().double().t()
    errors = [_relative(run.copies[0](x.to(run.contender.dtype)), expected) for run in runs]
    for run in runs:
        run.forget()
        run.turn(x, 1)
        run.forget()
    for _ in range(rounds):
        for run in runs:
            run.turn(x, max(1, min(len(run.copies), 16 // max(1, batch // 16))))
    (seconds, cpu), (baseline, _) = runs[0].times(), runs[1].times()
    nbytes = runs[0].contender.nbytes
    peers = {
        run.contender.name: {"seconds": run.times()[0], "cpu_seconds": run.times()[1], "relative_error": error}
        for run, error in zip(runs[1:], errors[1:], strict=True)
    }
    return {
        "scheme": str(scheme), "m": batch, "n": rows, "k": columns, "kernel": runs[0].contender.name,
        "seconds": seconds, "cpu_seconds": cpu, "gbps": nbytes / seconds / 1e9,
        "tops": 2 * batch * rows * columns / seconds / 1e12, "vs_bf16": baseline / seconds,
        "relative_error": errors[0], "peers": peers,
    }  # fmt: skip


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _best(call: Callable[[], object]) -> float:
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return min(spent)
