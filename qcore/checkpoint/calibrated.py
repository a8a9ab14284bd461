"""A checkpoint's layers as a calibrated run has made them, read from the run's folder (qcore/calibration/work.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.in_flight import InFlight, chain_of
from qcore.checkpoint.kv_scales import KvScales, Side
from qcore.checkpoint.safetensors import SafetensorsSource
from qcore.discovery import registry
from qcore.method import ModulePlan
from qcore.refusal import Refusal, Refused
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.source import TensorInfo
    from qcore.tensor import LayerTensors

UNQUANTIZED = "none"
"""The scheme of layers that stay as they are."""


@dataclass(frozen=True)
class Calibrated(InFlight):
    """folder: the run's, which is there as long as layers are read. mixed: schemes of layers that have one of their own."""

    folder: Path = Path()
    mixed: Mapping[str, Scheme] = field(default_factory=dict)

    @classmethod
    def wanted(
        cls, scheme: str, algorithm: str, ignore: Sequence[str], folder: Path, kv_cache: TensorScheme | None = None
    ) -> Calibrated:
        """Of a scheme's words and an algorithm's name; without one, of the first that makes its weights, those that are calibrated first. The scheme none is for a kv cache alone.
        Raises Refused (bad-argument, bad-scheme, scheme-unsupported)."""
        if scheme == UNQUANTIZED:
            if algorithm or kv_cache is None:
                raise Refused(Refusal("bad-argument", "usage", "scheme", "none leaves all weights as they are",
                                      f"found the algorithm {algorithm}" if algorithm else "found no kv cache to calibrate",
                                      "Choose a scheme, or none with a kv cache, such as fp8, and without an algorithm."))  # fmt: skip
            return cls("", None, tuple(ignore), folder=folder, kv_cache=kv_cache)
        parsed = Scheme.parse(scheme)
        rows = sorted(registry().algorithms, key=lambda row: not row.calibrated or bool(row.scaling))
        chains = [chain_of(algorithm)] if algorithm else [[row] for row in rows]
        refused = ("", "")
        for chain in chains:
            reasons = chain[-1].accepts.refuse(Scheme(parsed.weight))
            if reasons is None:
                return cls("+".join(row.name for row in chain), parsed, tuple(ignore), folder=folder, kv_cache=kv_cache)
            refused = reasons
        raise Refused(Refusal("scheme-unsupported", "notimpl", scheme, "the algorithm does not make weights of this scheme",
                              f"found {refused[0]}, expected {refused[1]}", "Choose another scheme or algorithm."))  # fmt: skip

    def said(self) -> dict[str, Any]:
        """What decides the result, in JSON's types."""
        return {
            "scheme": str(self.scheme),
            "kv_cache": str(self.kv_cache),
            "algorithm": self.algorithm,
            "ignore": list(self.ignore),
        }

    @cached_property
    def _made(self) -> dict[str, tuple[SafetensorsSource, dict[str, Any]]]:
        """By module, the file that has it, and its facts."""
        found = {}
        for path in sorted(self.folder.glob("block-*.safetensors")):
            source = SafetensorsSource.open(path)
            for module, facts in json.loads(source.metadata["layers"]).items():
                found[module] = (source, facts)
        return found

    @cached_property
    def _changed(self) -> dict[str, SafetensorsSource]:
        """By name, the file that has a parameter."""
        sources = map(SafetensorsSource.open, sorted(self.folder.glob("block-*.safetensors")))
        return {name: source for source in sources for name in json.loads(source.metadata["changed"])}

    def kv_scales(self) -> dict[str, KvScales]:
        """Those that the blocks' files hold."""
        sources = map(SafetensorsSource.open, sorted(self.folder.glob("block-*.safetensors")))
        return {
            attention: KvScales(_side(source, f"{attention}.k_scale"), _side(source, f"{attention}.v_scale"))
            for source in sources
            for attention in json.loads(source.metadata["kv_scales"])
        }

    def parameter(self, name: str) -> torch.Tensor | None:
        return self._changed[name].read(name) if name in self._changed else None

    def targets(self, plan: Mapping[str, ModulePlan]) -> dict[str, ModulePlan]:
        """The layers of a checkpoint's plan that a run is to make."""
        applied = self.applied(plan)
        return {
            module: applied[module]
            for module, entry in plan.items()
            if entry.scheme is None and applied[module].algorithm
        }

    def errors(self) -> dict[str, float]:
        """Of each layer that is made, the squared distance of its outputs in parts of the squared outputs."""
        return {module: facts["error"] for module, (_, facts) in self._made.items() if facts["error"] is not None}

    def unseen(self) -> tuple[str, ...]:
        """Layers that are made without anything known of their inputs."""
        return tuple(module for module, (_, facts) in self._made.items() if facts["error"] is None)

    def layer(
        self, module: str, entry: ModulePlan, read: Callable[[], torch.Tensor], bias: torch.Tensor | None, info: TensorInfo
    ) -> LayerTensors:  # fmt: skip
        from qcore.tensor import LayerTensors, QuantizedTensor

        if module not in self._made:  # the checkpoint asks for it itself
            return super().layer(module, entry, read, bias, info)
        source, facts = self._made[module]
        scheme = Scheme.parse(facts["scheme"])
        names = ("codes", "zeros", "index", "table", "input_scale")
        parts = {name: source.read(f"{module}.{name}") for name in names if f"{module}.{name}" in source.tensors}
        scales = tuple(source.read(f"{module}.scales.{level}") for level in range(len(scheme.weight.scales)))
        input_scale = parts.pop("input_scale", None)
        weight = QuantizedTensor(
            scheme,
            tuple(facts["shape"]),
            parts["codes"],
            scales,
            parts.get("zeros"),
            parts.get("index"),
            parts.get("table"),
        )
        return LayerTensors(weight, bias, input_scale)

    def _entry(self, module: str, entry: ModulePlan) -> ModulePlan:
        found = super()._entry(module, entry)
        if not found.algorithm:
            return found
        return replace(found, scheme=self.mixed.get(module, found.scheme), reason=f"made by {self.algorithm}")


def _side(source: SafetensorsSource, name: str) -> Side:
    return Side(source.read(name), None, name)
