"""A block's layers, quantized for what they see: once while the block is as it was, and those that end it once more behind all others as these are quantized.

What ends a block then makes up for the errors of the whole of it: its weights are aimed at the outputs that it had, by least squares (as GPTAQ does for each layer, arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from qcore.algorithms.scaling import input_scale
from qcore.algorithms.seen import Lack, Seen, aimed
from qcore.calibration.ending import ending, second_look
from qcore.calibration.folding import Folding, scale, tied
from qcore.calibration.trace import Trace
from qcore.calibration.watching import Watching
from qcore.elements import Group, PerChannel, PerTensor
from qcore.tensor import LayerTensors, QuantizedTensor

if TYPE_CHECKING:
    from qcore.algorithm import Algorithm
    from qcore.calibration.blocks import Blocks
    from qcore.scheme import Scheme

Texts = Callable[[], Iterable[torch.Tensor]]
"""The states that a block is given, of all windows, one after the other: [1, tokens, hidden] each."""


@dataclass
class Made:
    """Of one block. layers: quantized. errors: of each, the squared distance of its outputs in parts of the squared outputs. changed: other parameters that are new, by the checkpoint's names."""

    layers: dict[str, LayerTensors] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)


class Block:
    """One that has its weights. schemes: of the layers that are to be quantized, by the checkpoint's names. algorithms: all scale, and the last makes the weights."""

    def __init__(self, blocks: Blocks, number: int, schemes: Mapping[str, Scheme], algorithms: list[Algorithm]) -> None:
        self.blocks, self.number, self.schemes, self.algorithms = blocks, number, schemes, algorithms
        self.layers = {module: layer for module, layer in blocks.linears(number).items() if module in schemes}
        self.quantize = algorithms[-1].load_calibrated()
        self.made = Made()

    def quantized(self, texts: Texts) -> Made:
        """Its layers have the quantized weights from now on. Raises ValueError with a layer's name where its inputs are not finite, KeyError where it has none."""
        seen = self._seen(texts)
        states = next(iter(texts()))
        trace = Trace(self.blocks, self.number, states)
        self._scale(seen, Folding(self.blocks, self.number, states, trace))
        last = ending(trace, self.layers) if self.algorithms[-1].calibrated else []
        own = {module: layer.weight.data for module, layer in self.layers.items()}
        self._quantize({module: seen[module] for module in self.layers if module not in last}, {})
        if last:
            seen.clear()
            self._quantize(*second_look(self.blocks, self.number, texts(), own, last))
        return self.made

    def _seen(self, texts: Texts) -> dict[str, Seen]:
        with Watching(self.layers) as watching:
            for states in texts():
                self.blocks.run(self.number, states)
        return watching.seen()

    def _quantize(self, seen: Mapping[str, Seen], lacks: Mapping[str, Lack]) -> None:
        """Those that have one input and one scheme whose scales are of single rows as one, in the time of one."""
        together: dict[tuple[object, ...], list[str]] = {}
        for module, own in seen.items():
            scheme = self.schemes[module]
            by_rows = isinstance(scheme.weight.scales[0].granularity, Group | PerChannel)
            together.setdefault((id(own), scheme, "" if by_rows else module), []).append(module)
        for modules in together.values():
            own, scheme = seen[modules[0]], self.schemes[modules[0]]
            weights = [self.layers[module].weight.data for module in modules]
            wanted = [aimed(weight, own, lacks.get(module)) for module, weight in zip(modules, weights, strict=True)]
            packed = self.quantize(torch.cat(wanted) if len(wanted) > 1 else wanted[0], scheme, own)
            ends = accumulate(map(len, weights))
            for module, weight, end in zip(modules, weights, ends, strict=True):
                self._keep(module, packed.rows(end - len(weight), end), own, lacks.get(module))

    def _keep(self, module: str, packed: QuantizedTensor, seen: Seen, lack: Lack | None) -> None:
        layer, dense = self.layers[module], packed.dequantize()
        self.made.errors[module] = seen.error(layer.weight.data, dense, lack)
        given = self.schemes[module].input
        scales = given is not None and isinstance(given.scales[-1].granularity, PerTensor)  # also that above NVFP4's
        top = input_scale(given, float(seen.largest.amax())) if given is not None and scales else None
        self.made.layers[module] = LayerTensors(packed, input_scale=top)
        layer.weight.data = dense

    def _scale(self, seen: dict[str, Seen], folding: Folding) -> None:
        """Columns of layers, by what the algorithms find, where that can be folded into what is before; `seen` is of the new columns then."""
        scalings = [algorithm.load_scaling() for algorithm in self.algorithms if algorithm.scaling]
        names = {id(layer): name for name, layer in self.layers.items()}
        left = dict(self.layers) if scalings else {}
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
