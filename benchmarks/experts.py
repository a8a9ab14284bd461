"""A mixture's experts on a GPU, held as one beside one by one: python benchmarks/experts.py [--model NAME] [--kernel NAME] [SCHEME ...]

For each number of tokens: milliseconds of the whole experts module one by one, held as one, and held as one in a CUDA graph, and in what part of that time the
chosen experts' weights could be read once. All but the graph's times are the host's, which waits where experts run one by one. Tokens choose at random.

Before that, both are compared: the greatest difference, in parts of the answers' standard deviation. Experts have the same weight, but for
a factor where a kernel holds scales as floats.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from gpu import here, limits, packed, seconds

from qcore.discovery import registry
from qcore.kernel import Kernel
from qcore.model.experts import Layout, Part, QuantizedExperts
from qcore.model.linear import QuantizedLinear
from qcore.platform import Device
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select

TOKENS = (1, 4, 16, 64, 256, 2048)
SCHEMES = ("W4A16-g128-sym", "W4A16-mxfp4", "W8A8-fp8-block128", "W8A8-int8-dyn", "W4A16-gguf:q4_k")
REPEATS = 9


@dataclass(frozen=True)
class Model:
    """Experts, those that a token chooses, and features of a token and within an expert."""

    experts: int
    chosen: int
    hidden: int
    inner: int


MODELS = {"qwen3-30b-a3b": Model(128, 8, 2048, 768), "mixtral-8x7b": Model(8, 2, 4096, 14336)}


class Formula(torch.nn.Module):
    """How gate and up meet in these models."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        for name in layout.stacks:
            self.register_parameter(name, None)

    def _apply_gate(self, joined: torch.Tensor) -> torch.Tensor:
        gate, up = joined.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


def kernel_of(scheme: Scheme, shape: tuple[int, int], device: Device, name: str | None) -> Kernel:
    """The one that experts run on."""
    request = LayerRequest("linear", scheme, shape, "bfloat16", kernel=name, expert=True)
    found = select(request, device.platform, registry().kernels, device)
    if found.kernel is None:
        raise SystemExit(str(found.refusal))
    return found.kernel


def modules_of(model: Model, scheme: Scheme, device: Device, name: str | None) -> tuple[str, list[QuantizedExperts]]:
    """The kernel, and the experts one by one and held as one."""
    layout, made = Layout(model.experts, model.hidden, model.inner, True, False, False, False), []
    shapes: dict[Part, tuple[int, int]] = {part: layout.shape(part) for part in ("gate_up", "down")}
    kernels = {part: kernel_of(scheme, shape, device, name) for part, shape in shapes.items()}
    first = {part: packed(kernels[part], scheme, *shape) for part, shape in shapes.items()}
    for stacked in (False, True):
        parts: dict[Part, list[torch.nn.Module]] = {}
        for part, shape in shapes.items():
            parts[part] = []
            for expert in range(model.experts):
                own = copy.deepcopy(first[part])
                for scales in ("scales", "weight.scales", "coarse"):
                    held = dict(own.named_buffers()).get(scales)
                    if held is not None and held.dtype in (torch.float16, torch.bfloat16, torch.float32):
                        held.mul_(1 + expert % 7 / 8)
                parts[part].append(QuantizedLinear(scheme, shape, kernels[part], own))
        made.append(QuantizedExperts(parts, Formula(layout), layout, stacked=stacked))
    return " and ".join(dict.fromkeys(kernel.name for kernel in kernels.values())), made


def waited(call: Callable[[], object]) -> float:
    """Seconds of a call, that of the host's clock, when all is done; the median."""
    times = []
    for _ in range(REPEATS + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


@torch.inference_mode()
def measure(model: Model, scheme: str, device: Device, name: str | None, bandwidth: float) -> None:
    kernel, (apart, held) = modules_of(model, Scheme.parse(scheme), device, name)
    nbytes = sum(part.nbytes for part in held.buffers()) / model.experts
    print(f"\n{scheme} on {kernel}: {model.experts * nbytes / 2**20:,.0f} MiB")
    print(
        f"{'tokens':>6}  {'difference':>10}  {'one by one':>12}  {'as one':>12}  {'in a graph':>12}  of the copy's bandwidth"
    )
    for tokens in TOKENS:
        hidden = torch.randn(tokens, model.hidden, device="cuda", dtype=torch.bfloat16)
        weights, chosen = torch.randn(tokens, model.experts, device="cuda").softmax(-1).topk(model.chosen)
        calls = [partial(module, hidden, chosen, weights) for module in (apart, held)]
        expected, got = (call().float() for call in calls)
        worst = float((got - expected).abs().max() / expected.std())
        times = [waited(call) for call in calls]
        (graph,) = seconds([lambda _, call=calls[1]: call()], 4)  # type: ignore[misc]
        least = int(chosen.unique().numel()) * nbytes / (bandwidth / 2)  # a copy reads and writes
        cells = "  ".join(f"{each * 1e3:9.3f} ms" for each in (*times, graph))
        print(f"{tokens:6}  {worst:10.2g}  {cells}  {least / graph:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--kernel", help="the one to run experts on")
    given = parser.parse_args()
    device, bandwidth = here(), limits()["bytes"]
    print(
        f"{device.name}, {bandwidth / 1e9:,.0f} GB/s read and written by a copy; {given.model}: {MODELS[given.model]}"
    )
    for scheme in given.schemes:
        measure(MODELS[given.model], scheme, device, given.kernel, bandwidth)


if __name__ == "__main__":
    main()
