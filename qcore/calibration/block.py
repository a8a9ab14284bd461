"""A block's layers, quantized for what they see of all windows: columns scaled first where an algorithm does so, roundings learned last where one does that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import torch

from qcore.algorithms.auto_round import Rounding
from qcore.algorithms.scaling import Rounds, input_scale
from qcore.algorithms.seen import Seen
from qcore.calibration.blocks import not_finite, unknown
from qcore.calibration.engine import Engine, Local
from qcore.calibration.experts import portions, shared
from qcore.calibration.folding import Folding, scale, tied
from qcore.calibration.parts import WINDOWS, OneInput, Packed, packed, ran, watched
from qcore.calibration.states import States, StatesWriter
from qcore.calibration.trace import Trace
from qcore.calibration.tuning import Tuning, held_out, tune
from qcore.checkpoint.finite import all_finite
from qcore.elements import Group, PerChannel, PerTensor
from qcore.kernels.activations import quantize_input
from qcore.method import is_expert
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

    @property
    def error(self) -> float:
        """The mean of the layers'."""
        return sum(self.errors.values()) / max(len(self.errors), 1)

    @property
    def bits(self) -> float:
        """Per weight of the layers, all that is stored of them."""
        weights = [layer.weight for layer in self.layers.values()]
        return sum(8 * weight.nbytes for weight in weights) / max(
            sum(weight.shape[0] * weight.shape[1] for weight in weights), 1
        )


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
        engine: Engine,
    ) -> None:
        self.blocks, self.number, self.schemes, self.algorithms, self.work = blocks, number, schemes, algorithms, work
        self.layers = {module: layer for module, layer in blocks.linears(number).items() if module in schemes}
        self.quantize = algorithms[-1].load_calibrated()
        self.tuning, self.made = tuning, Made()
        self.engine = engine if number < len(blocks) else Local()  # what is behind the last block is of the whole model
        self.tuned = algorithms[-1].tuned and number < len(blocks)  # logits of all windows are too many to keep
        self._packed: dict[str, QuantizedTensor] = {}
        self._tops: dict[str, torch.Tensor] = {}
        self._roundings: dict[str, Rounding] = {}
        self._before: dict[str, tuple[torch.Tensor, Seen]] = {}
        """Of layers whose roundings are learned: what they were, and saw."""

    def quantized(self, states: States) -> Made:
        """Its layers have the quantized weights from now on. states: what it is given of all windows. Raises Refused (unknown-architecture, bad-content)."""
        wanted = self._wanted(states) if self.tuned else None
        for portion in portions(self.layers):
            seen = self._seen(portion, states)
            if any(algorithm.scaling for algorithm in self.algorithms):
                trace = Trace(self.blocks, self.number, states[0])
                self._scale(portion, seen, Folding(self.blocks, self.number, states[0], trace))
            self._quantize(portion, seen)
        if wanted is not None and tune(self.blocks, self.number, self._roundings, states, wanted, self.tuning):
            for module, (weight, own) in self._before.items():
                self._packed[module] = self._roundings[module].quantized()
                if own.rows:
                    self.made.errors[module] = own.error(weight, self._packed[module].dequantize())
        for module, top in shared(self._tops).items():
            scale = _input_scale(self.schemes[module], float(top))
            self.made.layers[module] = LayerTensors(self._packed[module], input_scale=scale)
        return self.made

    def _wanted(self, states: States) -> States:
        """What it gives as it is."""
        path = self.work.wanted(self.number)
        with StatesWriter(path, states.shape) as writer:
            for part in self.engine.map(ran, states.parts(WINDOWS), self.blocks.alone(self.number)):
                writer.add(part[0])
        return States(path)

    def _seen(self, layers: Mapping[str, torch.nn.Linear], states: States) -> dict[str, Seen]:
        """What each layer sees of all samples; those that have one input see it once."""
        held = held_out(len(states)) if self.tuned else range(0)
        parts = self.engine.map(
            watched, states.parts(WINDOWS, held), (self.blocks.alone(self.number), self.layers, layers)
        )
        sums = next(parts)
        for more in parts:
            sums.join(more)
        seen = sums.seen()
        for module, own in seen.items():
            if not own.rows and not is_expert(module):
                raise unknown(self.blocks.checkpoint, f"{module}, which no text reaches")
        alike = {id(own): (module, own.sums.panels) for module, own in seen.items()}
        if broken := next((module for module, panels in alike.values() if not all(map(all_finite, panels))), ""):
            raise not_finite(self.blocks.checkpoint, broken)
        return seen

    def _together(self, layers: Mapping[str, torch.nn.Linear], seen: Mapping[str, Seen]) -> list[list[str]]:
        """Layers that have one input and one scheme whose scales are of single rows: they are quantized as one, in the time of one."""
        found: dict[tuple[object, ...], list[str]] = {}
        for module in layers:
            scheme = self.schemes[module]
            by_rows = all(isinstance(level.granularity, Group | PerChannel) for level in scheme.weight.scales[:1])
            found.setdefault((id(seen[module]), scheme, "" if by_rows else module), []).append(module)
        return list(found.values())

    def _quantize(self, layers: Mapping[str, torch.nn.Linear], seen: dict[str, Seen]) -> None:
        """Takes what was seen of a layer out of `seen` once the layer is done."""
        together = self._together(layers, seen)
        groups = (
            self._as_one([layers[module] for module in modules], self.schemes[modules[0]], seen[modules[0]])
            for modules in together
        )
        made = self.engine.map(packed, groups, self.quantize)
        for module in chain.from_iterable(together):
            self._keep(module, next(made), seen.pop(module))

    def _as_one(self, layers: list[torch.nn.Linear], scheme: Scheme, seen: Seen) -> OneInput:
        """Several have parts of one weight from now on."""
        rows = [layer.out_features for layer in layers]
        if len(layers) == 1:
            return OneInput(layers[0].weight.data, rows, scheme, seen)
        whole = torch.cat([layer.weight.data for layer in layers])
        for layer, own in zip(layers, whole.split(rows), strict=True):
            layer.weight.data = own
        return OneInput(whole, rows, scheme, seen)

    def _keep(self, module: str, packed: Packed, seen: Seen) -> None:
        layer, weight = self.layers[module], packed.weight
        if packed.error is not None:
            self.made.errors[module] = packed.error
        if self.tuned:
            self._roundings[module] = Rounding(layer.weight.data, weight, seen.steadied())
            self._before[module] = (layer.weight.data, seen)
            layer.weight.data = packed.dense
        else:
            layer.weight.data.copy_(packed.dense)  # in the room of what is no more needed
        self._packed[module], self._tops[module] = weight, seen.largest.amax()

    def _scale(self, layers: Mapping[str, torch.nn.Linear], seen: dict[str, Seen], folding: Folding) -> None:
        """Columns of layers, by what the algorithms find, where that can be folded into what is before; `seen` is of the new columns then."""
        scalings = [algorithm.load_scaling() for algorithm in self.algorithms if algorithm.scaling]
        names = {id(layer): name for name, layer in layers.items()}
        left = dict(layers)
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
                found = scaling(
                    torch.cat([reader.weight.data for reader in readers]),
                    self.schemes[module],
                    own,
                    _rounds(self.schemes[module]),
                )
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


def _input_scale(scheme: Scheme, largest: float) -> torch.Tensor | None:
    """Where a scheme has inputs under one stored scale, or such a scale above others, as NVFP4; a single one of run time is not stored."""
    given = scheme.input
    if given is None or not isinstance(given.scales[-1].granularity, PerTensor):
        return None
    if given.dynamic and len(given.scales) == 1:
        return None
    return input_scale(given, largest)


def _rounds(scheme: Scheme) -> Rounds | None:
    given = scheme.input
    return None if given is None else lambda x, largest: quantize_input(x, given, _input_scale(scheme, largest))
