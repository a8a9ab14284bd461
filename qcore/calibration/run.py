"""qcore.quantize: a quantized checkpoint of an unquantized one, its layers made by what they see of a calibration text, block by block.

A block's weights come from the file, its layers are quantized for the inputs that they have behind the blocks before it as these are quantized, and its states go to the
next one. What is done is kept in a folder beside the output (qcore/calibration/work.py), so that a run can be stopped at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.algorithms.seen import Seen
from qcore.calibration import SAMPLES, SEQLEN
from qcore.calibration.blocks import Blocks, unknown
from qcore.calibration.experts import portions, shared
from qcore.calibration.states import StatesWriter, read_states
from qcore.calibration.texts import windows_of
from qcore.calibration.watching import Watching
from qcore.calibration.work import Work
from qcore.checkpoint.calibrated import Calibrated
from qcore.checkpoint.finite import all_finite
from qcore.checkpoint.in_flight import UNTOUCHED, nothing_left
from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.checkpoint.writer import taken, writing
from qcore.convert import check_written, convert
from qcore.discovery import registry
from qcore.elements import Float, Group, Int, PerChannel, PerTensor
from qcore.method import is_expert, quantizable
from qcore.model.memory import give_back
from qcore.refusal import Refusal, Refused, bad_file
from qcore.tensor import TORCH_FLOATS, LayerTensors, QuantizedTensor

if TYPE_CHECKING:
    import torch

    from qcore.scheme import Scheme


@dataclass(frozen=True)
class BlockDone:
    """Said of each block. number: of `blocks`, from 1. error: the mean of its layers'."""

    number: int
    blocks: int
    error: float


@dataclass(frozen=True)
class Quantized:
    """paths: what was written, one of each format. errors: of each layer that was calibrated, the squared distance of its outputs in parts of the squared outputs. unseen: layers of
    experts that no token was sent to, which are rounded to nearest."""

    paths: tuple[Path, ...]
    errors: Mapping[str, float]
    unseen: tuple[str, ...] = ()


def quantize(
    model: str | Path | Checkpoint,
    scheme: str,
    algorithm: str = "",
    calibration: str | Sequence[str] | None = None,
    *,
    out: str | Path,
    format: str | Sequence[str] = "compressed-tensors",
    ignore: Sequence[str] = UNTOUCHED,
    samples: int = SAMPLES,
    seqlen: int = SEQLEN,
    resume: bool = False,
    done: Callable[[BlockDone], None] | None = None,
) -> Quantized:
    """Writes `model` in a scheme into the new folder `out`, or with several formats into one of its name for each inside of it.

    algorithm: its name; without one the first that makes the scheme, with a text of those that look at it. calibration: a text, or several; without one no layer is looked at, as
    `Checkpoint.quantized` has it. ignore: as there. samples, seqlen: windows of the text, and tokens of one. resume: go on where a run with the same words was stopped; else what
    it left is refused. done: called after each block.

    Raises Refused: unknown-format, bad-scheme, scheme-unsupported, bad-argument, output-exists, cannot-write, unknown-architecture, and all that reading and converting give.
    """
    source = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    formats, out = [format] if isinstance(format, str) else list(format), Path(out)
    if calibration is None:
        made = source.quantized(f"{algorithm}:{scheme}" if algorithm else scheme, ignore)
        return Quantized(_written(made, formats, out, resume=False), {})
    asked = Calibrated.wanted(scheme, algorithm, ignore, out.with_name(f"{out.name}.work"))
    _check_inputs(asked.scheme)
    made = source.overlaid(asked)
    for name in formats:
        check_written(made, name)
    if not (resume and len(formats) > 1) and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise taken(out)
    text = calibration if isinstance(calibration, str) else "\n\n".join(calibration)
    windows = windows_of(source, text, samples, seqlen)
    with Work(asked.folder, _request(source, asked, windows), resume=resume) as work:
        _Run(source, asked, work).blocks_of(windows, done)
        errors, unseen = asked.errors(), asked.unseen()
        paths = _written(made, formats, out, resume=resume)
        work.remove()
    return Quantized(paths, errors, unseen)


def _written(made: Checkpoint, formats: Sequence[str], out: Path, *, resume: bool) -> tuple[Path, ...]:
    """resume: a format that is there already is whole."""
    if len(formats) == 1:
        return (convert(made, formats[0], out),)
    with writing(out):
        out.mkdir(exist_ok=True)
    places = {name: out / name.replace(":", "-") for name in formats}
    return tuple(place if resume and place.exists() else convert(made, name, place) for name, place in places.items())


class _Run:
    """The blocks of one run, each read, watched, quantized and kept."""

    def __init__(self, source: Checkpoint, asked: Calibrated, work: Work) -> None:
        self.source, self.work = source, work
        self.blocks = Blocks(source)
        self.algorithm = next(row for row in registry().algorithms if row.name == asked.algorithm)
        self.plan = asked.targets(source.layers)
        inside = {module for number in range(len(self.blocks)) for module in self.blocks.linears(number)}
        if not self.plan:
            raise nothing_left(source.path, source.method, asked.ignore)
        if outside := sorted(self.plan.keys() - inside):
            raise unknown(source, f"{outside[0]}, which is in no decoder block; ignore it")

    def blocks_of(self, windows: torch.Tensor, done: Callable[[BlockDone], None] | None) -> None:
        """All that are not done yet, for windows of tokens."""
        import torch

        with torch.no_grad():
            if self.work.done == 0:
                self._write(0, len(windows), self.blocks.first(windows))
            else:
                for _ in self.blocks.first(windows[:1]):
                    pass  # what else blocks are given is known then
            for number in range(self.work.done, len(self.blocks)):
                error = self._block(number, len(windows))
                if done is not None:
                    done(BlockDone(number + 1, len(self.blocks), error))

    def _block(self, number: int, samples: int) -> float:
        """Its mean error."""
        self.blocks.fill(number)
        layers = {module: layer for module, layer in self.blocks.linears(number).items() if module in self.plan}
        for module, layer in layers.items():
            quantizable(layer.weight.data, self.source.stored[f"{module}.weight"])
        weights: dict[str, QuantizedTensor] = {}
        tops: dict[str, torch.Tensor] = {}
        errors: dict[str, float] = {}
        for portion in portions(layers):
            seen = self._seen(number, portion)
            for together in self._together(portion, seen):
                packed, own = self._quantized(together, portion, seen), seen[together[0]]
                for module, weight in zip(together, packed, strict=True):
                    dense = weight.dequantize()
                    if own.rows:
                        errors[module] = own.error(layers[module].weight.data, dense)
                    weights[module], tops[module] = weight, own.largest.amax()
                    layers[module].weight.data = dense
                    del seen[module]
                give_back()
        made = {
            module: LayerTensors(weights[module], input_scale=_input_scale(self._scheme(module), top))
            for module, top in shared(tops).items()
        }
        if number + 1 < len(self.blocks):
            states = (self.blocks.run(number, part) for part in read_states(self.work.states(number)))
            self._write(number + 1, samples, states)
        self.work.keep(number, made, errors)
        self.blocks.clear(number)
        give_back()
        return sum(errors.values()) / max(len(errors), 1)

    def _together(self, layers: Mapping[str, torch.nn.Linear], seen: Mapping[str, Seen]) -> list[list[str]]:
        """Layers that have one input and one scheme whose scales are of single rows: they are quantized as one, in the time of one."""
        found: dict[tuple[object, ...], list[str]] = {}
        for module in layers:
            scheme = self._scheme(module)
            by_rows = all(isinstance(level.granularity, Group | PerChannel) for level in scheme.weight.scales)
            found.setdefault((id(seen[module]), scheme, "" if by_rows else module), []).append(module)
        return list(found.values())

    def _quantized(
        self, modules: list[str], layers: Mapping[str, torch.nn.Linear], seen: Mapping[str, Seen]
    ) -> list[QuantizedTensor]:
        """The layers' weights."""
        import torch

        weights = [layers[module].weight.data for module in modules]
        whole = torch.cat(weights) if len(weights) > 1 else weights[0]
        packed = self.algorithm.load_calibrated()(whole, self._scheme(modules[0]), seen[modules[0]].steadied())
        ends = list(accumulate(len(weight) for weight in weights))
        return [packed.rows(end - len(weight), end) for end, weight in zip(ends, weights, strict=True)]

    def _scheme(self, module: str) -> Scheme:
        scheme = self.plan[module].scheme
        assert scheme is not None
        return scheme

    def _seen(self, number: int, layers: Mapping[str, torch.nn.Linear]) -> dict[str, Seen]:
        """What each layer sees of all samples; those that have one input see it once."""
        with Watching(layers) as watching:
            for states in read_states(self.work.states(number)):
                self.blocks.run(number, states)
        seen = watching.seen()
        for module, own in seen.items():
            if not own.rows and not is_expert(module):
                raise unknown(self.source, f"{module}, which no text reaches")
        grams = {id(own): (module, own.gram) for module, own in seen.items()}
        if broken := next((module for module, gram in grams.values() if not all_finite(gram)), ""):
            raise self._not_finite(broken)
        return seen

    def _write(self, number: int, samples: int, states: Iterator[torch.Tensor]) -> None:
        """What a block is given, onto the disk. Raises Refused (bad-content) where it is not finite."""
        first = next(states)
        with StatesWriter(self.work.states(number), (samples, *first.shape[1:])) as writer:
            for part in chain((first,), states):
                if not all_finite(part):
                    raise self._not_finite(f"{self.blocks.prefix}.{number}")
                writer.add(part[0])

    def _not_finite(self, where: str) -> Refused:
        return bad_file("bad-content", "what the model gives a part of it is not finite", file=self.source.path, tensor=where, field="input",
                        found="NaN or infinity", expected="finite numbers",
                        fix="Check that the model reads the text sensibly before it is quantized.")  # fmt: skip


def _check_inputs(scheme: Scheme) -> None:
    """Raises Refused (scheme-unsupported) where inputs have stored scales that `_input_scale` does not find."""
    given = scheme.input
    if given is None or given.dynamic:
        return
    one = len(given.scales) == 1 and isinstance(given.granularity, PerTensor) and given.zero is None
    element = given.element
    if not (
        one
        and (
            (isinstance(element, Int) and element.signed)
            or (isinstance(element, Float) and element.format in TORCH_FLOATS)
        )
    ):
        raise Refused(Refusal("scheme-unsupported", "notimpl", str(scheme), "scales of such inputs are not found by calibration",
                              f"found {given}, expected signed integers or 8-bit floats under one scale", "Choose another scheme, or one whose inputs have scales of run time."))  # fmt: skip


def _input_scale(scheme: Scheme, largest: torch.Tensor) -> torch.Tensor | None:
    """[1] float32, where a scheme has inputs under one stored scale: their largest magnitude [] becomes the largest number."""
    given = scheme.input
    if given is None or given.dynamic:
        return None
    import torch

    if isinstance(given.element, Float):
        top = float(torch.finfo(TORCH_FLOATS[given.element.format]).max)
    else:
        top = float((1 << given.bits - 1) - 1)
    return (largest / top).clamp(min=torch.finfo(torch.float32).tiny).reshape(1)


def _request(source: Checkpoint, asked: Calibrated, windows: torch.Tensor) -> dict[str, Any]:
    """All that decides the result."""
    files = sorted({info.file for info in source.files.source.tensors.values()})
    return {
        "model": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "config": hashlib.sha256(json.dumps(source.config, sort_keys=True, default=str).encode()).hexdigest(),
        "scheme": str(asked.scheme), "algorithm": asked.algorithm, "ignore": list(asked.ignore),
        "calibration": hashlib.sha256(windows.numpy().tobytes()).hexdigest(), "windows": list(windows.shape),
    }  # fmt: skip
