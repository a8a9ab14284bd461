"""Choosing a kernel for a layer: the choice and, for every candidate, why it was taken or not."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qcore.elements import FlatGroup, Group, Tile
from qcore.kernel import Kernel, Op
from qcore.platform import Device
from qcore.refusal import Kind, Refusal, Refused
from qcore.scheme import Scheme

_APART = 0.12
"""What it costs more that experts run one by one: a launch for each of them, before which the host learns which were chosen."""


@dataclass(frozen=True)
class LayerRequest:
    """One layer to be run: scheme, weight shape [N, K], activation dtype ("bfloat16"), and what the user allows.

    exact: activations must not be quantized beyond what the scheme says. kernel: only this one, by name. expert: it is one
    of a mixture's experts.
    """

    op: Op
    scheme: Scheme
    shape: tuple[int, int]
    dtype: str
    exact: bool = True
    kernel: str | None = None
    expert: bool = False


@dataclass(frozen=True)
class Candidate:
    """One kernel that was considered; refusal is None when it could run the layer."""

    kernel: Kernel
    plugin: str
    refusal: Refusal | None

    @property
    def accepted(self) -> bool:
        return self.refusal is None


@dataclass(frozen=True)
class Selection:
    """The kernel (None where no candidate was accepted: then `refusal` says so) and the trace, accepted ones first."""

    kernel: Kernel | None
    candidates: tuple[Candidate, ...]
    refusal: Refusal | None


def exact_activations(activations: str) -> bool:
    """Whether `activations` (exact or int8) keeps kernels from rounding them. Raises Refused (bad-argument)."""
    if activations not in ("exact", "int8"):
        raise Refused(Refusal("bad-argument", "usage", "activations", "this is no way to treat activations",
                              f"found {activations!r}", "Use exact or int8."))  # fmt: skip
    return activations == "exact"


def select(
    request: LayerRequest, platform: str, kernels: Iterable[tuple[Kernel, str]], device: Device | None = None
) -> Selection:
    """The cheapest kernel that takes the layer on the platform; experts one by one cost more than held as one.

    device: the one it will run on, if it is known; without it a kernel that needs device features or packages is taken on trust, but for optional ones.
    """
    candidates = [
        Candidate(kernel, plugin, _refuse(kernel, request, platform, device))
        for kernel, plugin in kernels
        if kernel.op == request.op
    ]
    apart = _APART if request.expert else 0.0
    candidates.sort(key=lambda c: (not c.accepted, c.kernel.cost + apart * (not c.kernel.experts), c.kernel.name))
    if candidates and candidates[0].accepted:
        return Selection(candidates[0].kernel, tuple(candidates), None)
    return Selection(None, tuple(candidates), _no_kernel(request, platform, candidates))


def _refuse(kernel: Kernel, request: LayerRequest, platform: str, device: Device | None) -> Refusal | None:
    """Why the kernel does not take the layer; the first reason that no change of the request would lift comes first."""

    def no(code: str, kind: Kind, reason: str, fact: str, fix: str) -> Refusal:
        return Refusal(code, kind, kernel.name, reason, fact, fix)

    if "*" not in kernel.platforms and platform not in kernel.platforms:
        return no("wrong-platform", "never", "it does not run on this platform",
                  f"found {platform}, expected {' or '.join(kernel.platforms)}",
                  "Choose a kernel of this platform's own plugin.")  # fmt: skip
    if device is not None and kernel.features and not any(need <= device.features for need in kernel.features):
        wanted = " or ".join("+".join(sorted(need)) for need in kernel.features)
        return no("wrong-device", "never", "the device lacks what it needs",
                  f"{device.name} has no {wanted}", "Another kernel takes this layer here; nothing to do.")  # fmt: skip
    if device is not None and not kernel.runs_on(device.architecture):
        return no("wrong-device", "never", "it does not run on this architecture",
                  f"found {device.architecture or 'unknown'}, expected {' or '.join(kernel.architectures)}",
                  "Another kernel takes this layer here; nothing to do.")  # fmt: skip
    if mismatch := kernel.accepts.refuse(request.scheme):
        return no("scheme-unsupported", "notimpl", "it does not take this scheme",
                  f"found {mismatch[0]}, expected {mismatch[1]}",
                  "Quantize to a scheme that it takes, or use another kernel.")  # fmt: skip
    rows, columns = request.shape
    if rows % kernel.multiples[0] or columns % kernel.multiples[1]:
        return no("shape-unsupported", "notimpl", "it does not take this shape",
                  f"found {rows} x {columns}, expected multiples of {kernel.multiples[0]} x {kernel.multiples[1]}",
                  "Another kernel takes this layer.")  # fmt: skip
    if not kernel.ragged and (cut := _ragged(request)):
        return no("shape-unsupported", "notimpl", "it does not take groups or tiles of different sizes",
                  f"found {f'{rows} x {columns}' if cut.startswith('t') else columns}, expected whole {cut}",
                  "Another kernel takes this layer.")  # fmt: skip
    if request.dtype not in kernel.dtypes:
        return no("dtype-unsupported", "notimpl", "it does not compute in this data type",
                  f"found {request.dtype}, expected {' or '.join(kernel.dtypes)}",
                  f"Load the model with --dtype {kernel.dtypes[0]}.")  # fmt: skip
    if request.exact and kernel.quantizes_input and request.scheme.input is None:
        return no("inexact", "usage", "it would round activations to 8 bits", "activations must stay exact",
                  "Allow it with --activations int8.")  # fmt: skip
    if (device is not None or kernel.optional) and (missing := missing_requirement(kernel.requires)):
        return no("missing-requirement", "missing-dep", "a package that it needs is absent or too old", missing,
                  f"pip install '{missing.partition(', ')[0]}'")  # fmt: skip
    if request.kernel is not None and kernel.name != request.kernel:
        return no("not-chosen", "usage", "another kernel was asked for by name", f"--kernel {request.kernel}",
                  "Leave --kernel out to let qcore choose.")  # fmt: skip
    return None


def _ragged(request: LayerRequest) -> str:
    """The level of scales whose last group or tile is not whole, or whose flat groups cross row ends; or an empty string."""
    rows, columns = request.shape
    finest = request.scheme.weight.granularity
    if isinstance(finest, FlatGroup) and columns % finest.size:
        return f"rows of flat groups of {finest.size}"
    for level in request.scheme.weight.scales:
        grid = level.granularity
        if isinstance(grid, Group) and columns % grid.size:
            return f"groups of {grid.size}"
        if isinstance(grid, Tile) and (rows % grid.rows or columns % grid.cols):
            return f"tiles of {grid.rows} x {grid.cols}"
    return ""


def _no_kernel(request: LayerRequest, platform: str, candidates: Sequence[Candidate]) -> Refusal:
    nearest = min(candidates, key=lambda c: _LIFTABLE.index(c.refusal.code) if c.refusal else 0, default=None)
    fix = "Install the plugin of this platform, or convert the checkpoint to a scheme that it runs."
    if nearest and nearest.refusal and nearest.refusal.code != "wrong-platform":
        fix = f"Nearest: {nearest.kernel.name}. {nearest.refusal.reason.capitalize()}: {nearest.refusal.fact}. {nearest.refusal.fix}"
    return Refusal("no-kernel", "notimpl", f"{request.op} {request.scheme} on {platform}", "no kernel takes this layer",
                   f"{len(candidates)} candidates, none accepted", fix)  # fmt: skip


_LIFTABLE = ("not-chosen", "inexact", "missing-requirement", "dtype-unsupported", "shape-unsupported",
             "scheme-unsupported", "wrong-device", "wrong-platform")  # fmt: skip
"""Reasons, from the easiest to lift to the hardest."""


def missing_requirement(requires: Iterable[tuple[str, str]]) -> str:
    """The first unmet requirement as `name>=version, found ...`, or an empty string."""
    for names, least in requires:
        found = [version for name in names.split("|") if (version := _version(name))]
        if not any(_numbers(version) >= _numbers(least) for version in found):
            return f"{names.partition('|')[0]}>={least}, found {' and '.join(found) or 'none'}"
    return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
