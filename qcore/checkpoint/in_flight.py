"""Quantizing a weight while it is read: which layers, with which algorithm, and the layer that comes of it.

A request is written

    bitsandbytes:nf4     one of NAMED: what bitsandbytes does when it is asked to load in 4 or 8 bits
    W4A16-g128-sym       a scheme, by the first algorithm that makes it without calibration
    rtn:FP8_DYNAMIC      an algorithm's name and a scheme
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.algorithm import Algorithm
from qcore.checkpoint.source import TensorInfo
from qcore.discovery import registry
from qcore.method import ModulePlan, in_flight, is_embedding, is_router, quantizable
from qcore.refusal import Refusal, Refused
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.kv_scales import KvScales
    from qcore.checkpoint.open import Checkpoint
    from qcore.tensor import LayerTensors

UNTOUCHED = ("lm_head",)
"""Parts of the names of linear layers that stay as they are unless it is said otherwise, as bitsandbytes has it."""

NAMED: dict[str, tuple[str, str]] = {
    "bitsandbytes:nf4": ("bitsandbytes", "W4A16-nf4-flat64"),
    "bitsandbytes:fp4": ("bitsandbytes", "W4A16-fp4-flat64"),
    "bitsandbytes:nf4-double": ("bitsandbytes", "W4A16-nf4-flat64:dynamic8+flat16384"),
    "bitsandbytes:fp4-double": ("bitsandbytes", "W4A16-fp4-flat64:dynamic8+flat16384"),
    "bitsandbytes:int8": ("llm.int8", "W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0"),
}
"""Requests by name: the algorithm and the scheme."""


@dataclass(frozen=True)
class InFlight:
    """What is asked for: every unquantized linear layer that is no router and that none of `ignore` names, in this scheme; None leaves all as they are. kv_cache: None leaves it as it is declared."""

    algorithm: str
    scheme: Scheme | None
    ignore: tuple[str, ...] = UNTOUCHED
    kv_cache: TensorScheme | None = None

    @classmethod
    def parse(cls, how: str, ignore: Sequence[str] = UNTOUCHED) -> InFlight:
        """Raises Refused (bad-argument, bad-scheme, scheme-unsupported)."""
        rows = {row.name: row for row in registry().algorithms}
        head, _, tail = how.partition(":")
        name, text = NAMED.get(how) or ((head, tail) if set(head.split("+")) <= rows.keys() else ("", how))
        try:
            scheme = Scheme.parse(text)
        except Refused as error:
            fix = f"Write one of {', '.join(NAMED)}; a scheme such as W4A16-g128-sym; or one of {', '.join(rows)}, a colon and a scheme."  # fmt: skip
            raise Refused(replace(error.refusal, subject=how, fix=fix)) from error
        chain = chain_of(name) if name else []
        last = _algorithm(chain[-1:] or list(rows.values()), scheme, how, chain)
        return cls(name or last.name, scheme, tuple(ignore))

    def applied(self, plan: Mapping[str, ModulePlan]) -> dict[str, ModulePlan]:
        """The plan, with the layers that are quantized while they are read."""
        return {module: self._entry(module, entry) for module, entry in plan.items()}

    def layer(
        self, module: str, entry: ModulePlan, read: Callable[[], torch.Tensor], bias: torch.Tensor | None, info: TensorInfo
    ) -> LayerTensors:  # fmt: skip
        """A layer that the plan has quantized, as `made` has it."""
        return made(entry, read(), bias, info)

    def parameter(self, name: str) -> torch.Tensor | None:
        """One outside quantized layers, where it is not what the file has."""
        return None

    def kv_scales(self) -> dict[str, KvScales]:
        """Those of `kv_cache`, by attention module."""
        return {}

    def _entry(self, module: str, entry: ModulePlan) -> ModulePlan:
        if self.scheme is None or entry.scheme is not None or is_embedding(module):
            return entry
        if is_router(module):
            return replace(entry, reason=f"{entry.reason}; a mixture's router")
        if named := next((part for part in self.ignore if _names(part, module)), None):
            return replace(entry, reason=f"{entry.reason}; {named!r} is kept from being quantized while loading")
        return in_flight(self.algorithm, self.scheme, "quantized while loading, as asked", entry.shape)


def made(entry: ModulePlan, weight: torch.Tensor, bias: torch.Tensor | None, info: TensorInfo) -> LayerTensors:
    """The layer of a stored weight [N, K] that the plan has quantized in flight. Raises Refused (bad-shape, bad-content,
    shape-unsupported)."""
    from qcore.tensor import LayerTensors

    assert entry.scheme is not None
    return LayerTensors(chain_of(entry.algorithm)[-1].load()(quantizable(weight, info), entry.scheme), bias)


def chain_of(words: str) -> list[Algorithm]:
    """The algorithms of a name, or of several joined by +: all but the last prepare, and the last makes the weights. Raises Refused (bad-argument)."""
    rows = {row.name: row for row in registry().algorithms}
    names = words.split("+")
    if unknown := next((name for name in names if name not in rows), None):
        raise Refused(Refusal("bad-argument", "usage", "algorithm", "there is no algorithm of this name", f"found {unknown!r}",
                              f"Name one of {', '.join(rows)}, or several joined by +, the last of which makes the weights."))  # fmt: skip
    if idle := next((name for name in names[:-1] if not (rows[name].scaling or rows[name].preparation)), None):
        raise Refused(Refusal("bad-argument", "usage", "algorithm", "before + stands what prepares weights for another algorithm", f"found {idle!r}",
                              f"Name one of {', '.join(row.name for row in rows.values() if row.scaling or row.preparation)} there."))  # fmt: skip
    return [rows[name] for name in names]


def prepared(source: Checkpoint, chain: Sequence[Algorithm]) -> Checkpoint:
    """What the algorithms quantize. Raises Refused, as they do."""
    for algorithm in chain:
        if algorithm.preparation:
            source = algorithm.load_preparation()(source)
    return source


def nothing_left(path: str | Path, method: str, ignore: Sequence[str]) -> Refused:
    """For a checkpoint of which nothing is quantized that was asked for."""
    return Refused(Refusal("bad-argument", "usage", str(path), "no layer of it is left to be quantized",
                           f"found {method} and --ignore {', '.join(ignore)}",
                           "Name an unquantized checkpoint; qcore convert writes a quantized one anew."))  # fmt: skip


def _names(part: str, module: str) -> bool:
    """Whether a word of `ignore` is a part of the name, or after `re:` an expression that matches its beginning. Raises Refused (bad-argument)."""
    if not part.startswith("re:"):
        return part in module
    try:
        return re.match(part.removeprefix("re:"), module) is not None
    except re.error as error:
        raise Refused(Refusal("bad-argument", "usage", "ignore", "this is no regular expression", f"found {part!r}: {error}",
                              "Write re:EXPRESSION, or a part of the layers' names."))  from error  # fmt: skip


def _algorithm(rows: list[Algorithm], scheme: Scheme, how: str, chain: list[Algorithm]) -> Algorithm:
    """The first that makes the weight without looking at activations, which static input scales need too, as those of the chain that are joined to it may."""
    if scheme.input is not None and (not scheme.input.dynamic or len(scheme.input.scales) > 1):
        found = "static input scales"
    elif looking := next((row.name for row in chain if row.calibrated), ""):
        found = looking
    else:
        for row in rows:
            if not row.calibrated and row.accepts.refuse(Scheme(scheme.weight)) is None:
                return row
        found = str(scheme)
    raise Refused(Refusal("scheme-unsupported", "notimpl", how, "no algorithm makes it without calibration",
                          f"found {found}, expected what {', '.join(row.name for row in rows)} makes",
                          "Choose another scheme, or quantize the model beforehand."))  # fmt: skip
