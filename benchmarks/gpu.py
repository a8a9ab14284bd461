"""Kernels on a GPU beside the vendor's and other tools': python benchmarks/gpu.py [--shape NxK] [--json FILE] [FAMILY ...]

First the roofline: bytes copied, and 16-bit and fp8 products. Then, for every scheme of a family, each registered kernel that runs it here, torch's dense
bfloat16 layer, and the tools that are installed (bitsandbytes, torchao). Every time is the median of nine replays of a CUDA graph of calls; contenders take
turns, and weights are rotated through more memory than any cache holds. A cell names the goal that it missed.

Weights are some random rows, repeated: what they are takes no part in the time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcore.discovery import registry
from qcore.kernel import Kernel
from qcore.platform import Device
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.tensor import LayerTensors
from qcore.testing.layers import random_layer

SHAPES = ("4096x4096", "11008x4096", "4096x11008", "28672x8192")
"""N x K."""
BATCHES = (1, 16, 64, 512, 4096)
ROTATED = 256 << 20
"""Bytes that the copies of an 8-bit weight take at least."""
CALLS, REPLAYS = 20, 9
"""Of a graph for up to 64 rows of activations, a fifth for more; and of the graph."""
RANDOM_ROWS = 256
"""Of a weight at most; the others are their copies."""

Call = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Goal:
    """Of the selected kernel. as_dense: how many times as fast as dense bfloat16, 0: as the weight made dense. copied, multiplied: parts of the copy's bandwidth, and of the fp8
    products."""

    as_dense: float = 0
    copied: float = 0
    multiplied: float = 0


FAMILIES: Mapping[str, tuple[tuple[str, ...], Mapping[int, Goal]]] = {
    "int4": (
        ("W4A16-g128-sym", "W4A16-g128-asym", "W4A16-g32-sym"),
        {1: Goal(3.3, copied=0.8), 64: Goal(2), 4096: Goal(0.9)},
    ),
    "int8": (("W8A16-channel-sym",), {1: Goal(1.8, copied=0.8)}),
    "low-bits": (("W2A16-g64-asym", "W3A16-g128-sym"), {1: Goal(3.3)}),
    "w8a8": (("W8A8-int8-dyn",), {4096: Goal(1.5)}),
    "fp8": (("W8A8-fp8-dyn", "W8A8-fp8-block128"), {4096: Goal(1.6, multiplied=0.75)}),
    "small-floats": (("W8A16-fp8-channel", "W6A16-e3m2-g512", "W4A16-mxfp4", "W4A16-nvfp4"), {1: Goal(1.8)}),
    "codebooks": (("W4A16-nf4-g64",), {1: Goal(3)}),
    "gguf": (
        (
            "W4A16-gguf:q4_0",
            "W4A16-gguf:q4_k",
            "W6A16-gguf:q6_k",
            "W8A16-gguf:q8_0",
            "W4A16-gguf:iq4_xs",
            "W2A16-gguf:iq2_xs",
        ),
        {1: Goal(1.8)},
    ),
}
"""Schemes, and goals by rows of activations. At any others no kernel is to be slower than a weight that is made dense at the speed of a copy, and the dense
layer."""

KV = "kv"
"""The family of attention to kv caches, which have tokens in place of shapes: benchmarks/gpu_kv.py."""


def here() -> Device:
    """The first GPU that a plugin finds."""
    found = next((device for device in registry().devices() if device.torch_device.startswith("cuda")), None)
    if found is None:
        raise SystemExit("no GPU is found here; `qcore doctor` says why")
    return found


def kernels_of(scheme: Scheme, shape: tuple[int, int], device: Device) -> list[Kernel]:
    """All but the reference, the cheapest first: that one is selected."""
    request = LayerRequest("linear", scheme, shape, "bfloat16")
    accepted = [c.kernel for c in select(request, device.platform, registry().kernels, device).candidates if c.accepted]
    return [kernel for kernel in accepted if kernel.family != "reference"]


def tools(scheme: str, rows: int, columns: int) -> dict[str, torch.nn.Module]:
    """Layers of other tools that are installed, of random weights."""
    found: dict[str, torch.nn.Module] = {}
    if scheme == "W4A16-nf4-g64":
        try:
            import bitsandbytes
        except ImportError:
            print("bitsandbytes: not installed, and left out")
            return found
        layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        found["bitsandbytes"] = layer.to("cuda")
    configs = {"W4A16-g128-sym": "Int4WeightOnlyConfig", "W8A8-int8-dyn": "Int8DynamicActivationInt8WeightConfig",
               "W8A8-fp8-dyn": "Float8DynamicActivationFloat8WeightConfig"}  # fmt: skip
    if scheme in configs:
        try:
            from torchao import quantization
        except ImportError:
            print("torchao: not installed, and left out")
            return found
        dense = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16))
        try:
            quantization.quantize_(dense, getattr(quantization, configs[scheme])())
            dense(torch.zeros(1, columns, device="cuda", dtype=torch.bfloat16))
        except Exception as fault:  # what a tool does not do here is said, and left out
            print(f"torchao: {type(fault).__name__}: {fault}"[:200])
            return found
        found["torchao"] = dense
    return found


def wide_layer(scheme: Scheme, rows: int, columns: int, place: str) -> LayerTensors:
    """A layer [rows, columns]."""
    some = math.gcd(rows, RANDOM_ROWS)
    layer = random_layer(scheme, some, columns)
    times, weight = rows // some, layer.weight

    def repeated(part: torch.Tensor | None) -> torch.Tensor | None:
        if part is None or part.dim() < 2 or part.numel() == 1:
            return None if part is None else part.to(place)
        flat = part.shape[0] == 1  # scales of groups that are counted through the whole weight
        whole = part.to(place).view(torch.uint8).repeat((1, times) if flat else (times, 1))
        return whole.view(part.dtype)

    parts = {
        name: repeated(getattr(weight, name)) for name in ("codes", "zeros", "index", "table", "scale_table", "offset")
    }
    scales = tuple(repeated(scale) for scale in weight.scales)
    tensor = dataclasses.replace(weight, shape=(rows, columns), scales=scales, **parts)  # type: ignore[arg-type]
    return dataclasses.replace(layer, weight=tensor, input_scale=repeated(layer.input_scale))


def packed(kernel: Kernel, scheme: Scheme, rows: int, columns: int) -> torch.nn.Module:
    """The kernel's layer on the GPU; where its weight cannot be packed there, it is on the CPU."""
    try:
        return kernel.load().from_layer(wide_layer(scheme, rows, columns, "cuda"), torch.bfloat16).to("cuda")
    except RuntimeError as fault:
        print(f"{kernel.name} is packed on the CPU: {fault}"[:200])
        return kernel.load().from_layer(wide_layer(scheme, rows, columns, "cpu"), torch.bfloat16).to("cuda")


def captured(call: Call, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for number in range(3):
            call(number)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number)
    return graph


def seconds(calls: Sequence[Call], count: int = CALLS) -> list[float]:
    """Of one call of each. count: calls of a graph."""
    graphs, times = [captured(call, count) for call in calls], [list[float]() for _ in calls]
    for _ in range(REPLAYS):
        for graph, own in zip(graphs, times, strict=True):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            own.append(began.elapsed_time(ended) / count / 1e3)
    return [statistics.median(own) for own in times]


def rotating(modules: Sequence[torch.nn.Module], x: torch.Tensor) -> Call:
    return lambda number: modules[number % len(modules)](x)


def limits() -> dict[str, float]:
    """Bytes read and written by a copy, and 16-bit operations, a second."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other, side = torch.empty_like(big), 8192
    left = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    calls: list[Call] = [lambda _: other.copy_(big), lambda _: left @ left]
    if torch.cuda.get_device_capability() >= (8, 9):
        small, one = left.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        calls.append(lambda _: torch._scaled_mm(small, small.t(), one, one, out_dtype=torch.bfloat16))
    copied, *multiplied = seconds(calls, 4)
    return {"bytes": 2 * big.nbytes / copied} | dict(
        zip(("flops", "fp8"), (2 * side**3 / each for each in multiplied), strict=False)
    )


def measured(scheme: str, shape: tuple[int, int], device: Device) -> Iterator[dict[str, Any]]:
    """A row for each number of rows of activations: bytes of each contender's weight and its seconds."""
    rows, columns = shape
    copies = max(1, ROTATED // (rows * columns))
    modules: dict[str, torch.nn.Module] = {}
    for kernel in kernels_of(Scheme.parse(scheme), shape, device):
        modules[kernel.name] = packed(kernel, Scheme.parse(scheme), rows, columns)
    modules["dense"] = torch.nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16)
    modules |= tools(scheme, rows, columns)
    every = {name: [module, *(copy.deepcopy(module) for _ in range(copies - 1))] for name, module in modules.items()}
    held = {
        name: sum(part.numel() * part.element_size() for part in module.state_dict().values())
        for name, module in modules.items()
    }
    for batch in BATCHES:
        x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
        times = seconds([rotating(own, x) for own in every.values()], CALLS if batch <= 64 else CALLS // 5)
        yield {
            "scheme": scheme,
            "shape": shape,
            "m": batch,
            "seconds": dict(zip(every, times, strict=True)),
            "bytes": held,
        }


def line(row: Mapping[str, Any], goal: Goal, roof: Mapping[str, float]) -> str:
    """One row as it stands in a table: the selected kernel's speed, then every other contender's."""
    times, dense = row["seconds"], row["seconds"]["dense"]
    chosen = next(iter(times))
    outputs, columns = row["shape"]
    copied = row["bytes"][chosen] / times[chosen] / roof["bytes"]
    multiplied = 2 * row["m"] * outputs * columns / times[chosen] / roof.get("fp8", roof["flops"])
    made = dense + (row["bytes"][chosen] + row["bytes"]["dense"]) / roof["bytes"]
    missed = [f"{what} {wanted:.2f}" for what, got, wanted in
              (("speed", dense / times[chosen], goal.as_dense or dense / made), ("copy", copied, goal.copied), ("peak", multiplied, goal.multiplied))
              if got < wanted]  # fmt: skip
    others = ", ".join(f"{name} {dense / time:.2f}" for name, time in times.items() if name not in (chosen, "dense"))
    cells = [str(row["m"]), f"{chosen} {times[chosen] * 1e6:.1f} us", f"{dense / times[chosen]:.2f} x dense", f"{copied:.0%} of a copy",
             f"{multiplied:.0%} of the peak", others or "-", " ".join(missed) and f"goal missed: {', '.join(missed)}"]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


@torch.inference_mode()
def main(families: Sequence[str], shapes: Sequence[str], file: str | None) -> None:
    device, roof, kept = here(), limits(), []
    print(f"{device.name} ({device.architecture}), torch {torch.__version__}: {roof['bytes'] / 1e12:.2f} TB/s copied, "
          f"{roof['flops'] / 1e12:.0f} TFLOPS in bfloat16, {roof.get('fp8', 0) / 1e12:.0f} in fp8")  # fmt: skip
    for family in families or (*FAMILIES, KV):
        if family == KV:
            from gpu_kv import TEXTS, TOKENS, table

            kept += table(TEXTS, TOKENS, roof["bytes"])
            continue
        schemes, goals = FAMILIES[family]
        for scheme in schemes:
            for text in shapes:
                rows, _, columns = text.partition("x")
                print(
                    f"\n{family}: {scheme}, {text}\n\n| M | selected | speed | memory | products | others, times dense | |\n|"
                    + "---|" * 7
                )
                for row in measured(scheme, (int(rows), int(columns)), device):
                    kept.append(row)
                    print(line(row, goals.get(row["m"], Goal()), roof), flush=True)
                torch.cuda.empty_cache()
    if file:
        Path(file).write_text(json.dumps({"device": device.name, "limits": roof, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join((*FAMILIES, KV)))
    parser.add_argument("--shape", action="append")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    if unknown := set(given.families) - {*FAMILIES, KV}:
        parser.error(f"no family is called {' or '.join(sorted(unknown))}")
    main(given.families, given.shape or SHAPES, given.json)
