"""A GGUF mixture whose blocks' layers are made by a calibrated run; all else of the file, such as the embedding, is encoded as without calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.calibrated import Calibrated
from qcore.checkpoint.in_flight import chain_of
from qcore.discovery import registry
from qcore.elements import Block
from qcore.gguf.contents import in_order
from qcore.gguf.make import Mixture
from qcore.gguf.origins import Origin
from qcore.method import ModulePlan, in_flight
from qcore.refusal import Refusal, Refused
from qcore.scheme import Scheme, weight_only

if TYPE_CHECKING:
    import torch

    from qcore.algorithm import Algorithm
    from qcore.checkpoint.open import Checkpoint


@dataclass(frozen=True, kw_only=True)
class CalibratedMixture(Calibrated):
    """mixed: schemes of all layers that the run makes; scheme: one of these. origins: of each tensor that is made of such layers."""

    mixture: Mixture
    origins: Mapping[str, tuple[Origin, ...]]

    @classmethod
    def of(
        cls, source: Checkpoint, type: str, algorithm: str, overrides: Mapping[str, str], folder: Path
    ) -> CalibratedMixture:
        """Reads headers, configs and the tokenizer only. type, overrides: as for `save_gguf`. algorithm: as `chain_for_blocks` has it, joined. Raises Refused: bad-argument,
        not-representable, unknown-architecture, and all that reading gives."""
        mixture = Mixture.of(source, type, overrides, guided=True)
        origins = dict(_origins(source, mixture))
        schemes: dict[str, Scheme] = {}
        for tensor, own in origins.items():
            scheme = weight_only(Block(mixture.types[tensor]))
            for origin in own:
                if schemes.setdefault(origin.module, scheme) != scheme:
                    raise Refused(Refusal("not-representable", "notimpl", origin.name, "a matrix of which the file has two parts is calibrated in one type",
                                          f"found {schemes[origin.module]} and {scheme}", "Name the same type for both parts."))  # fmt: skip
        if not schemes:
            raise Refused(Refusal("bad-argument", "usage", type, "no layer of the model is stored in blocks that calibration could make",
                                  f"found {source.path}", "Name an unquantized checkpoint and a mixture of block types, or leave --calibration out."))  # fmt: skip
        scheme = next(iter(schemes.values()))
        return cls(algorithm=algorithm, scheme=scheme, ignore=(), folder=folder, mixed=schemes, mixture=mixture, origins=origins)  # fmt: skip

    def said(self) -> dict[str, Any]:
        return {"mixture": self.mixture.recipe.name, "types": dict(self.mixture.types), "algorithm": self.algorithm}

    def save(self, source: Checkpoint, out: Path) -> Path:
        """The file, once the run has made all layers. Raises Refused: output-exists, cannot-write."""
        made, contents = source.overlaid(self), self.mixture.contents
        places = {place.tensor: place for place in contents.parameters.values()}

        def read(tensor: str) -> Iterator[torch.Tensor]:
            if tensor not in self.origins:
                yield from self.mixture.encoded(tensor)
            for origin in self.origins.get(tensor, ()):
                yield in_order(made.layer(origin.module).weight.codes[origin.rows], places[tensor])

        return self.mixture.write(out, read, {}, None)

    def _entry(self, module: str, entry: ModulePlan) -> ModulePlan:
        if module not in self.mixed:
            return entry
        return in_flight(self.algorithm, self.mixed[module], f"made by {self.algorithm}", entry.shape)


def _origins(source: Checkpoint, mixture: Mixture) -> Iterator[tuple[str, tuple[Origin, ...]]]:
    """The tensors in block types, of those that decoder blocks have, that are made of unquantized layers."""
    names = {place.tensor: name for name, place in mixture.contents.parameters.items()}
    plain = {module for module, entry in source.layers.items() if entry.scheme is None}
    for tensor, kind in mixture.types.items():
        if not tensor.startswith("blk.") or kind not in BLOCK_TYPES:
            continue
        own = mixture.contents.origins.get(tensor) or (Origin(names[tensor]),)  # a GGUF checkpoint has the names alone
        if all(origin.part == "weight" and not origin.stacked and origin.module in plain for origin in own):
            yield tensor, own


def chain_for_blocks(words: str) -> list[Algorithm]:
    """The algorithms of a name, or of several joined by +; without one, gptq. Raises Refused (bad-argument) for those that do not make blocks by what layers see, or scale columns
    on the way: GGUF's other tensors are those of the checkpoint."""
    blocks = weight_only(Block("q4_0"))
    known = [row.name for row in registry().algorithms if row.calibrated and row.accepts.refuse(blocks) is None]
    chain = chain_of(words or known[0])
    if chain[-1].name not in known or any(row.scaling for row in chain):
        raise Refused(Refusal("bad-argument", "usage", "algorithm", "the algorithm does not make GGUF's blocks by what layers see of a text",
                              f"found {words!r}", f"Name one of: {', '.join(known)}."))  # fmt: skip
    return chain
