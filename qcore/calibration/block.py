"""A block's layers, quantized for what they see of all windows: columns scaled first where an algorithm does so, roundings learned last where one does that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from qcore.algorithms.auto_round import Rounding
from qcore.algorithms.scaling import input_scale
from qcore.algorithms.seen import Seen
from qcore.calibration.folding import Folding, scale, tied
from qcore.calibration.states import States, StatesWriter
from qcore.calibration.trace import Trace
from qcore.calibration.tuning import Tuning, tune
from qcore.calibration.watching import Watching
from qcore.elements import Group, PerChannel, PerTensor
from qcore.tensor import LayerTensors, QuantizedTensor

if TYPE_CHECKING:
    from qcore.algorithm import Algorithm
    from qcore.calibration.blocks import Blocks
    from qcore.calibration.work import Work
    from qcore.checkpoint.kv_scales import KvScales
    from qcore.scheme import Scheme


@dataclass
class Made:
    """Of one block. layers: quantized. errors: of each, the squared distance of its outputs in parts of the squared outputs. changed: other parameters that are new, by the checkpoint's names. kv_scales: of what its attention modules cache, where that is asked for."""

    layers: dict[str, LayerTensors] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    kv_scales: dict[str, KvScales] = field(default_factory=dict)


class Block:
    """One that has its weights. work: the folder that what blocks gave can wait in. schemes: of the layers that are to be quantized, by the checkpoint's names. algorithms: all scale, and the last makes the weights."""

    def __init__(
        self,
        blocks: Blocks,
        number: int,
        schemes: Mapping[str, Scheme],
        algorithms: list[Algorithm],
        work: Work,
        tuning: Tuning,
    ) -> None:
        self.blocks, self.number, self.schemes, self.algorithms, self.work = blocks, number, schemes, algorithms, work
        self.layers = {module: layer for module, layer in blocks.linears(number).items() if module in schemes}
        self.quantize = algorithms[-1].load_calibrated()
        self.tuning, self.made = tuning, Made()

    def quantized(self, states: States) -> Made:
        """Its layers have the quantized weights from now on. states: what it is given of all windows."""
        seen = self._seen(states)
        if any(algorithm.scaling for algorithm in self.algorithms):
            self._scale(seen, Folding(self.blocks, self.number, states[0], Trace(self.blocks, self.number, states[0])))
        own = {module: layer.weight.data for module, layer in self.layers.items()}
        wanted = self._wanted(states) if self.algorithms[-1].tuned else None
        self._quantize(seen)
        if wanted is not None:
            self._tune(own, seen, states, wanted)
        return self.made

    def _wanted(self, states: States) -> States:
        """What it gives as it is."""
        path = self.work.wanted(self.number)
        with StatesWriter(path, states.shape) as writer:
            for part in states:
                writer.add(self.blocks.run(self.number, part)[0])
        return States(path)

    def _tune(self, own: Mapping[str, torch.Tensor], seen: Mapping[str, Seen], states: States, wanted: States) -> None:
        roundings = {
            module: Rounding(own[module], layer.weight, seen[module]) for module, layer in self.made.layers.items()
        }
        if not tune(self.blocks, self.number, roundings, states, wanted, self.tuning):
            return
        for module, rounding in roundings.items():
            packed = rounding.quantized()
            self.made.layers[module] = replace(self.made.layers[module], weight=packed)
            self.made.errors[module] = seen[module].error(own[module], packed.dequantize())

    def _seen(self, states: States) -> dict[str, Seen]:
        with Watching(self.layers) as watching:
            for part in states:
                self.blocks.run(self.number, part)
        return watching.seen()

    def _quantize(self, seen: Mapping[str, Seen]) -> None:
        """Those that have one input and one scheme whose scales are of single rows as one, in the time of one."""
        together: dict[tuple[object, ...], list[str]] = {}
        for module, own in seen.items():
            scheme = self.schemes[module]
            by_rows = isinstance(scheme.weight.scales[0].granularity, Group | PerChannel)
            together.setdefault((id(own), scheme, "" if by_rows else module), []).append(module)
        for modules in together.values():
            own, scheme = seen[modules[0]], self.schemes[modules[0]]
            weights = [self.layers[module].weight.data for module in modules]
            packed = self.quantize(torch.cat(weights) if len(weights) > 1 else weights[0], scheme, own)
            ends = accumulate(map(len, weights))
            for module, weight, end in zip(modules, weights, ends, strict=True):
                self._keep(module, packed.rows(end - len(weight), end), own)

    def _keep(self, module: str, packed: QuantizedTensor, seen: Seen) -> None:
        layer, dense = self.layers[module], packed.dequantize()
        self.made.errors[module] = seen.error(layer.weight.data, dense)
        given = self.schemes[module].input
        scales = given is not None and isinstance(given.scales[-1].granularity, PerTensor)  # also that above NVFP4's
        top = input_scale(given, float(seen.largest.amax())) if given is not None and scales else None
        self.made.layers[module] = LayerTensors(packed, input_scale=top)
        layer.weight.data = dense

    def _scale(self, seen: dict[str, Seen], folding: Folding) -> None:
        """Columns of layers, by what the algorithms find, where that can be folded into what is before; `seen` is of the new columns then."""
        scalings = [algorithm.load_scaling() for algorithm in self.algorithms if algorithm.scaling]
        names = {id(layer): name for name, layer in self.layers.items()}
        left = dict(self.layers)
        while left:
            module, layer = left.popitem()
            ran = folding.trace.of(layer)
            readers = folding.trace.readers(ran.given) if ran else []
            for reader in readers:
                left.pop(names.get(id(reader), ""), None)
            fold = folding.find(readers) if readers else None
            if fold is None:
                continue
            own = seen[module]
            for scaling in scalings:
                found = scaling(torch.cat([reader.weight.data for reader in readers]), self.schemes[module], own)
                own = own.divided(scale(fold, readers, tied(fold, found), self.blocks.dtype_of(fold.before)))
            for reader in readers:
                if name := names.get(id(reader)):
                    seen[name] = own
                else:
                    self._changed(reader, "weight")
            self._changed(fold.before, "bias")
            if id(fold.before) not in names:
                self._changed(fold.before, "weight")

    def _changed(self, module: torch.nn.Module, part: str) -> None:
        if (parameter := module._parameters.get(part)) is not None:
            self.made.changed |= self.blocks.stored(parameter)
