"""qcore.quantize: a quantized checkpoint of an unquantized one, its layers made by what they see of a calibration text, block by block.

A block's weights come from the file, its layers are quantized for the inputs that they have behind the blocks before it as these are quantized, and its states go to the
next one. What is done is kept in a folder beside the output (qcore/calibration/work.py), so that a run can be stopped at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.calibration import ITERATIONS, SAMPLES, SEQLEN
from qcore.calibration.block import Block, Made
from qcore.calibration.blocks import Blocks, not_finite, unknown
from qcore.calibration.caching import Caching, check_cache
from qcore.calibration.engine import Engine, Local, engine_of
from qcore.calibration.given import opened
from qcore.calibration.mixing import mixable, mixed
from qcore.calibration.mixture import CalibratedMixture, chain_for_blocks
from qcore.calibration.parts import WINDOWS, passed
from qcore.calibration.states import States, StatesWriter
from qcore.calibration.texts import windows_of
from qcore.calibration.tuning import Tuning
from qcore.calibration.work import Work
from qcore.checkpoint.calibrated import Calibrated
from qcore.checkpoint.finite import all_finite
from qcore.checkpoint.in_flight import UNTOUCHED, chain_of, nothing_left, prepared
from qcore.checkpoint.kv_scales import calibrated_scheme
from qcore.checkpoint.open import Checkpoint
from qcore.checkpoint.writer import taken, writing
from qcore.convert import check_written, convert, writer_of
from qcore.elements import Float, Int, PerTensor
from qcore.method import quantizable
from qcore.model.memory import give_back, released_buffers
from qcore.refusal import Refusal, Refused
from qcore.tensor import TORCH_FLOATS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qcore.scheme import Scheme, TensorScheme


_LARGE = 4 << 20
"""Bytes of a buffer that is not kept for another: a layer's come in many sizes, and would leave holes."""


@dataclass(frozen=True)
class BlockDone:
    """Said of each block, the output layer as the last where it is quantized. number: of `blocks`, from 1. error: the mean of its layers'. bits: per weight of its layers, all that is stored of them."""

    number: int
    blocks: int
    error: float
    bits: float


@dataclass(frozen=True)
class Quantized:
    """paths: what was written, one of each format. errors: of each layer that was calibrated, the squared distance of its outputs in parts of the squared outputs. unseen: layers of
    experts that no token was sent to, which are rounded to nearest."""

    paths: tuple[Path, ...]
    errors: Mapping[str, float]
    unseen: tuple[str, ...] = ()


def quantize(
    model: str | Path | Checkpoint | PreTrainedModel,
    scheme: str,
    algorithm: str = "",
    calibration: str | Sequence[str] | None = None,
    *,
    out: str | Path,
    format: str | Sequence[str] = "compressed-tensors",
    ignore: Sequence[str] = UNTOUCHED,
    samples: int = SAMPLES,
    seqlen: int = SEQLEN,
    iterations: int = ITERATIONS,
    target_bpw: float | None = None,
    engine: str = "local",
    kv_cache: str | None = None,
    resume: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overrides: Mapping[str, str] | None = None,
    done: Callable[[BlockDone], None] | None = None,
) -> Quantized:
    """Writes `model` in a scheme (none leaves its weights as they are) into the new folder `out`, or with several formats into one of its name for each inside of it.

    algorithm: its name; without one the first that makes the scheme, with a text of those that look at it. calibration: a text, or several; without one no layer is looked at, as
    `Checkpoint.quantized` has it. ignore: as there. samples, seqlen: windows of the text, and tokens of one. iterations: steps in which each block's roundings are learned, by
    algorithms that do. target_bpw: layers get schemes like the one that is named, of as many bits each as lose the least with so many bits per weight of all, scales and
    zero points among them. kv_cache: of qcore.checkpoint.kv_scales.CALIBRATED, one whose scales are found too. engine: what does the
    work, local (this process) or ray (its tasks, with the same result). resume: go on where a run with the same words was stopped; with whichever engine; else
    what it left is refused. tokenizer: of a model that is loaded already, where it did not come from a folder with one. done: called after each block. For the format gguf, which is written alone, the scheme is a mixture or a type of llama.cpp's, such as Q4_K_M, and
    tells which layers stay as they are; overrides: as for `save_gguf`.

    Raises Refused: unknown-format, bad-scheme, scheme-unsupported, bad-argument, output-exists, cannot-write, unknown-architecture, missing-package, engine-failed, and all that reading and
    converting give.
    """
    cache = calibrated_scheme(kv_cache)
    formats, out = [format] if isinstance(format, str) else list(format), Path(out)
    with released_buffers(_LARGE), opened(model, tokenizer, out, again=resume) as source:
        if calibration is None:
            if cache is not None:
                raise Refused(Refusal("bad-argument", "usage", "kv_cache", "scales of a kv cache are found by calibration",
                                      fix="Give a text to calibrate with, or leave it out."))  # fmt: skip
            made = source.quantized(f"{algorithm}:{scheme}" if algorithm else scheme, ignore)
            return Quantized(_written(made, formats, out, resume=False), {})
        running = engine_of(engine)
        source, asked = _asked(source, scheme, algorithm, ignore, formats, out, cache, overrides or {})
        schemes = mixable(source, asked, formats) if target_bpw is not None else ()
        if not (resume and len(formats) > 1) and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise taken(out)
        text = calibration if isinstance(calibration, str) else "\n\n".join(calibration)
        windows = windows_of(source, text, samples, seqlen)
        request = _request(source, asked, windows, iterations, target_bpw)
        with Work(asked.folder, request, resume=resume) as work, running as parts:
            blocks = Blocks(source)
            if target_bpw is not None:
                asked = mixed(source, blocks, asked, windows, schemes, target_bpw, work)
            _Run(source, blocks, asked, work, Tuning(iterations), parts).blocks_of(windows, done)
            errors, unseen = asked.errors(), asked.unseen()
            if isinstance(asked, CalibratedMixture):
                paths: tuple[Path, ...] = (asked.save(source, out),)
            else:
                paths = _written(source.overlaid(asked), formats, out, resume=resume)
            work.remove()
        return Quantized(paths, errors, unseen)


def _asked(
    source: Checkpoint, scheme: str, algorithm: str, ignore: Sequence[str], formats: Sequence[str], out: Path,
    cache: TensorScheme | None, overrides: Mapping[str, str],
) -> tuple[Checkpoint, Calibrated]:  # fmt: skip
    """What is quantized, and what the run is to make of it. Raises Refused for what the formats do not hold."""
    folder = out.with_name(f"{out.name}.work")
    if "gguf" not in formats:
        asked = Calibrated.wanted(scheme, algorithm, ignore, folder, cache)
        source = prepared(source, chain_of(asked.algorithm)) if asked.algorithm else source
        _check_inputs(asked.scheme)
        for name in formats:
            check_written(source.overlaid(asked), name)
        return source, asked
    if len(formats) > 1:
        raise Refused(Refusal("bad-argument", "usage", "format", "GGUF's mixtures are no scheme of other formats",
                              f"found {', '.join(formats)}", "Write the GGUF file in a run of its own."))  # fmt: skip
    if cache is not None:
        writer_of("gguf")[0].encode_kv_cache(cache, {})  # refuses
    chain = chain_for_blocks(algorithm)
    source = prepared(source, chain)
    mixture = CalibratedMixture.of(source, scheme, "+".join(row.name for row in chain), overrides, folder)
    if out.exists():
        raise taken(out)
    return source, mixture


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

    def __init__(
        self, source: Checkpoint, blocks: Blocks, asked: Calibrated, work: Work, tuning: Tuning, engine: Engine
    ) -> None:
        self.source, self.blocks, self.work, self.tuning, self.engine = source, blocks, work, tuning, engine
        self.algorithms = chain_of(asked.algorithm) if asked.algorithm else []
        self.plan = asked.targets(source.layers)
        self.kv_cache = asked.kv_cache
        if self.kv_cache is not None:
            check_cache(blocks, self.kv_cache)
        if asked.scheme is not None and not self.plan:
            raise nothing_left(source.path, source.method, asked.ignore)
        known = {module: number for number in range(len(blocks) + 1) for module in blocks.linears(number)}
        if outside := sorted(self.plan.keys() - known.keys()):
            raise unknown(source, f"{outside[0]}, which is in no decoder block; ignore it")
        self.count = len(blocks) + any(known[module] == len(blocks) for module in self.plan)

    def blocks_of(self, windows: torch.Tensor, done: Callable[[BlockDone], None] | None) -> None:
        """All that are not done yet, for windows of tokens."""
        import torch

        torch.set_num_threads(torch.get_num_threads())  # MKL uses fewer than it may until it is told how many
        with torch.no_grad():
            if self.work.done == 0:
                self._write(0, len(windows), self.blocks.first(windows))
            else:
                for _ in self.blocks.first(windows[:1]):
                    pass  # what else blocks are given is known then
            for number in range(self.work.done, self.count):
                made = self._block(number, len(windows))
                if done is not None:
                    done(BlockDone(number + 1, self.count, made.error, made.bits))

    def _block(self, number: int, samples: int) -> Made:
        self.blocks.fill(number)
        layers = self.blocks.linears(number)
        schemes = {module: entry.scheme for module, entry in self.plan.items() if module in layers and entry.scheme}
        for module in schemes:
            quantizable(layers[module].weight.data, self.source.stored[f"{module}.weight"])
        states = States(self.work.states(number))
        made = Made()
        if schemes:
            block = Block(self.blocks, number, schemes, self.algorithms, self.work, self.tuning, self.engine)
            made = block.quantized(states)
        cached = self.kv_cache if number < len(self.blocks) else None
        engine = self.engine if cached is None else Local()  # what is cached is seen in this process
        with Caching(self.blocks, number, cached) as caching:
            own = {module: layers[module] for module in schemes}
            outputs = engine.map(passed, states.parts(WINDOWS), (self.blocks.alone(number), own))
            if number + 1 < self.count:
                self._write(number + 1, samples, outputs)
            elif cached is not None:
                for _ in outputs:
                    pass  # what it caches is seen
        made.kv_scales = caching.scales()
        self.work.keep(number, made)
        self.blocks.clear(number)
        give_back()
        return made

    def _write(self, number: int, samples: int, states: Iterator[torch.Tensor]) -> None:
        """What a block is given, onto the disk. Raises Refused (bad-content) where it is not finite."""
        first = next(states)
        with StatesWriter(self.work.states(number), (samples, *first.shape[1:])) as writer:
            for part in chain((first,), states):
                if not all_finite(part):
                    raise not_finite(self.source, f"{self.blocks.prefix}.{number}")
                writer.add(part[0])


def _check_inputs(scheme: Scheme | None) -> None:
    """Raises Refused (scheme-unsupported) where inputs have stored scales that calibration does not find."""
    given = None if scheme is None else scheme.input
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


def _request(
    source: Checkpoint, asked: Calibrated, windows: torch.Tensor, iterations: int, target_bpw: float | None
) -> dict[str, Any]:
    """All that decides the result."""
    files = sorted({info.file for info in source.files.source.tensors.values()})
    return {
        "qcore": __version__, "model": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "config": hashlib.sha256(json.dumps(source.config, sort_keys=True, default=str).encode()).hexdigest(),
        **asked.said(),
        "calibration": hashlib.sha256(windows.numpy().tobytes()).hexdigest(), "windows": list(windows.shape),
        "iterations": iterations, "target_bpw": target_bpw,
    }  # fmt: skip
