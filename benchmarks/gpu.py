"""Times this plugin's linear kernels on a GPU against torch's dense bfloat16 layer: python benchmarks/gpu.py [KERNEL:SCHEME ...]

Every time is the median of nine replays of a CUDA graph of twenty calls; kernels take turns, and weights are rotated through more
memory than any cache holds.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Sequence

import torch

from qcore.discovery import registry
from qcore.scheme import Scheme
from qcore.testing.layers import random_layer

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""N x K."""
BATCHES = (1, 16, 64, 512, 4096)
KERNELS = ("cuda_int4pack:W4A16-g128-sym", "cublas_int8:W8A8-int8-dyn", "cublas_fp8:W8A8-fp8-dyn")
ROTATED = 256 << 20
"""Bytes that the copies of an 8-bit weight take at least."""
CALLS, REPLAYS = 20, 9

Call = Callable[[int], torch.Tensor]


def layers(wanted: str, rows: int, columns: int, copies: int) -> list[torch.nn.Module]:
    """The same layer of KERNEL:SCHEME several times over, on the GPU."""
    kernel, _, scheme = wanted.partition(":")
    row = next(known for known, _ in registry().kernels if known.name == kernel)
    one = row.load().from_layer(random_layer(Scheme.parse(scheme), rows, columns), torch.bfloat16).cuda()
    return [copy.deepcopy(one) for _ in range(copies)]


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A graph of CALLS calls."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for number in range(3):
            call(number)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            call(number)
    return graph


def microseconds(calls: Sequence[Call]) -> list[float]:
    """Of one call of each."""
    graphs, times = [captured(call) for call in calls], [list[float]() for _ in calls]
    for _ in range(REPLAYS):
        for graph, own in zip(graphs, times, strict=True):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            own.append(began.elapsed_time(ended) / CALLS * 1e3)
    return [statistics.median(own) for own in times]


def rotating(modules: Sequence[torch.nn.Module], x: torch.Tensor) -> Call:
    return lambda number: modules[number % len(modules)](x)


@torch.inference_mode()
def main(kernels: Sequence[str]) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; us a call (speed relative to bfloat16)")
    for rows, columns in SHAPES:
        copies = max(1, ROTATED // (rows * columns))
        dense = [torch.nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        found: dict[str, Sequence[torch.nn.Module]] = {"bfloat16": dense}
        found |= {kernel: layers(kernel, rows, columns, copies) for kernel in kernels}
        for batch in BATCHES:
            x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
            times = microseconds([rotating(modules, x) for modules in found.values()])
            shown = "  ".join(
                f"{name} {time:.1f} ({times[0] / time:.2f})" for name, time in zip(found, times, strict=True)
            )
            print(f"{rows} x {columns}, M = {batch}: {shown}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or KERNELS)
