"""Kernel: one way of running a layer on a device, as a row of facts.

A row says which schemes, shapes, dtypes and devices it takes, so that selection, `explain` and the matrix need neither
torch nor a vendor's SDK; the implementation is imported when the kernel is first chosen.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol

from qcore.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

Op = Literal["linear", "embedding", "experts", "kv_cache"]


@dataclass(frozen=True)
class Accepts:
    """A predicate over schemes, in the words of qcore.scheme; `*` and `?` match as in shell patterns.

    elements: `int4`, `uint?`, `fp8`, `gguf:*`. scales: the levels as printed (`g32`, `channel`, `g16:e4m3fn+tensor`).
    zeros: None, `stored`, `float`. inputs: the input's printed scheme; `none` where activations stay as they are.
    """

    elements: tuple[str, ...]
    scales: tuple[str, ...] = ("*",)
    zeros: tuple[str | None, ...] = (None,)
    ordered: bool = False
    inputs: tuple[str, ...] = ("none",)

    def refuse(self, scheme: Scheme) -> tuple[str, str] | None:
        """None, or what was found and what is taken."""
        weight, (element, levels, given) = scheme.weight, _words(scheme)
        for what, found, taken in (
            ("weights", element, self.elements),
            ("scales", levels, self.scales),
            ("inputs", given, self.inputs),
        ):
            if not any(fnmatchcase(found, pattern) for pattern in taken):
                return f"{what} {found}", f"{what} {' or '.join(taken)}"
        if weight.zero not in self.zeros:
            return f"zero points {weight.zero}", f"zero points {' or '.join(map(str, self.zeros))}"
        if weight.ordered and not self.ordered:
            return "act-order groups", "groups in column order"
        return None


@lru_cache(maxsize=1024)
def _words(scheme: Scheme) -> tuple[str, str, str]:
    """Element, scales and input of a scheme, as Accepts has them."""
    words = str(scheme.weight).split("-")
    return words[0], words[1] if scheme.weight.scales else "none", str(scheme.input) if scheme.input else "none"


@dataclass(frozen=True)
class Kernel:
    """One row.

    family: the matrix's kernel family (`reference`, `torch`, ...). platforms: column identifiers, or `*`: every platform
    whose devices run torch's own operators. architectures: those of the platforms' that it runs on, as shell patterns.
    dtypes: activation dtypes that it computes in. quantizes_input: it rounds activations to 8 bits although the scheme
    keeps them. features: alternatives, each a set of device features that suffices; empty needs none. requires:
    distributions and their least version, `a|b` where either will do. multiples: (rows, columns) that the weight's shape must be multiples of.
    ragged: it takes weights whose last group or tile is not whole.
    cost: a rough rank, about the time of decoding one token relative to a dense bfloat16 layer; the least is chosen.
    note: one sentence on what it does, shown by `explain`. implementation: `module:object`, a `LayerKernel`.
    compiles: its programs can be compiled where the device is not, and run on the CPU: the implementation's `programs(scheme, dtype, target)` lists
    them (qcore.testing.compiled).
    experts: it can hold a mixture's experts as one, so that one launch multiplies all their rows: the implementation is a
    qcore.kernels.stacking.StackableLinear. For experts it costs less than others.
    optional: its packages are asked for even where its device is not here, so that it is not named there unless they are installed; for kernels that a
    plugin does without, and that are taken only where they turn out to be quicker.
    sources: files beside Python's that decide what it computes, as patterns in the implementation's package (`native/*`).
    """

    name: str
    family: str
    op: Op
    platforms: tuple[str, ...]
    accepts: Accepts
    dtypes: tuple[str, ...]
    cost: float
    implementation: str
    note: str = ""
    quantizes_input: bool = False
    features: tuple[frozenset[str], ...] = ()
    requires: tuple[tuple[str, str], ...] = ()
    multiples: tuple[int, int] = (1, 1)
    ragged: bool = False
    architectures: tuple[str, ...] = ("*",)
    sources: tuple[str, ...] = ()
    compiles: bool = False
    experts: bool = False
    optional: bool = False

    def runs_on(self, architecture: str) -> bool:
        """Whether it runs on this one of its platforms' architectures."""
        return any(fnmatchcase(architecture, pattern) for pattern in self.architectures)

    def load(self) -> type[LayerKernel]:
        """Imports the implementation."""
        module, _, name = self.implementation.partition(":")
        implementation: type[LayerKernel] = getattr(importlib.import_module(module), name)
        return implementation


class LayerKernel(Protocol):
    """What an implementation is: a torch.nn.Module class that holds one prepacked weight.

    Its tensors are buffers, so that the model moves and counts them like any other. A linear maps [..., M, K] to [..., M, N]
    in the activations' dtype; QuantizedLinear around it adds bias and input multiplier, and makes a row of a vector. An embedding maps
    integer indices [...] to [..., K]. A kv cache maps states [..., heads, head_dim] to what attention sees of them
    (qcore.kernels.kv_cache); its weight [heads, head_dim] stands for one token; where it has `attends` and `attention`, models
    attend to its rows as they are (qcore.model.attention.RowAttention). Where the row's `quantizes_input` is set, `rounded(x)`
    gives the float32 values that an input x [..., K] stands for once the kernel has rounded it.
    """

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> torch.nn.Module:
        """Repacks the canonical layout into the kernel's, row block by row block: it must not hold the weight dense."""
        ...
