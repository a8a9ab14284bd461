"""What of a model reads its residual stream and what writes to it, found by running it: a decoder block of each kind, with random weights.

The stream is rotated by R: embeddings become E R, norms lose their gains, layers behind them take these over and read R's inverse, layers that add to the stream write R.
The values of each attention head are rotated as well, and back in the layer behind them (R1 and R2 of SpinQuant, arXiv 2405.16406; QuaRot, arXiv 2404.00456).

Roles are told by which tensor a module is given; that they are right, and that nothing else matters to the model, is tried: the block's model must give the same logits
when its weights are rotated. Random weights have gains and biases that a checkpoint's may lack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from qcore.checkpoint.open import Checkpoint
from qcore.checkpoint.rotated import Change
from qcore.model.places import Places
from qcore.model.roles import NotRotated, Roles, recorded
from qcore.model.skeleton import decoder_blocks, skeleton
from qcore.refusal import Refusal, Refused

_TOKENS = 16
"""Of the text that is read, and rows of the embedding: as many as there are tokens."""
_APART = 1e-3
"""Of the largest logit: more than rounding makes of the same model."""


@dataclass(frozen=True)
class Parameter:
    """Of the model, for a tensor of a checkpoint: its name, the tensor's shape, and what becomes of it."""

    name: str
    shape: tuple[int, ...]
    change: Change | None


class Stream:
    """A model without its weights, and what becomes of each where the hidden states are rotated.

    Raises Refused: unknown-architecture, and what making the model gives.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model: Any = skeleton(checkpoint, torch.float32)
        self.places = Places(self.model)
        self._shapes = {name: tuple(part.shape) for name, part in self.model.state_dict().items()}
        head, found = self.model.get_output_embeddings(), decoder_blocks(self.model)
        try:
            if found is None or head is None:
                raise NotRotated(f"no list of decoder blocks and a head in {type(self.model).__name__}")
            self.prefix, self.blocks = found
            self._changes: dict[str, Change] = {}
            for numbers in self._kinds():
                own = self._changes_of(numbers[0])
                for number in numbers:
                    self._changes |= {
                        self._at(name, number): replace(change, gain=self._at(change.gain, number))
                        for name, change in own.items()
                    }
        except NotRotated as error:
            raise not_rotated(checkpoint, str(error)) from error

    def parameter(self, name: str) -> Parameter | None:
        """Of a checkpoint's tensor; None where the model has no such one."""
        place = self.places.parameter(name)
        if isinstance(place, str):
            held = self._shapes.get(place)
            return None if held is None else Parameter(place, held, self._changes.get(place))
        layout = self.places.experts[place.module]
        stack = f"{place.module}.{layout.stack(place.part, bias=place.bias)}"
        change, (rows, columns) = self._changes.get(stack), layout.shape(place.part)
        if place.expert is not None:  # in a file of its own order
            return Parameter(
                stack, (rows,) if place.bias else (rows, columns), change and replace(change, transposed=False)
            )
        matrix = (rows,) if place.bias else (columns, rows) if layout.transposed else (rows, columns)
        return Parameter(stack, (layout.count, *matrix), change)

    @property
    def tied(self) -> tuple[str, str] | None:
        """The names of the head's weight and of the embedding's, where they are one."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        names = {id(module): f"{name}.weight" for name, module in self.model.named_modules()}
        return (names[id(head)], names[id(embedding)]) if head.weight is embedding.weight else None

    def _kinds(self) -> list[list[int]]:
        """The numbers of blocks that are made alike."""
        found: dict[object, list[int]] = {}
        for number, block in enumerate(self.blocks):
            modules = tuple((name, type(part)) for name, part in block.named_modules())
            shapes = tuple((name, tuple(part.shape)) for name, part in block.named_parameters())
            found.setdefault((modules, shapes), []).append(number)
        return list(found.values())

    def _at(self, name: str, number: int) -> str:
        """The name of a parameter of the only block, as that of another one."""
        own = f"{self.prefix}.0."
        return f"{self.prefix}.{number}.{name.removeprefix(own)}" if name.startswith(own) else name

    def _changes_of(self, number: int) -> dict[str, Change]:
        """Of a block, named as the first, and of all outside of the blocks."""
        with torch.no_grad(), self._alone(self.blocks[number]):
            self._fill()
            with recorded(self.model) as calls:
                before = self._logits()
            roles = Roles(self.model, calls)
            for heads in (True, False):
                found = roles.changes(heads=heads)
                self._fill()
                self._apply(found)
                if float((self._logits() - before).abs().max()) <= _APART * float(before.abs().max()):
                    return found
        raise NotRotated(f"other logits behind {self.prefix}.{number} when its hidden states are rotated")

    def _logits(self) -> torch.Tensor:
        """Of a text of all tokens that there are."""
        try:
            found: torch.Tensor = self.model(input_ids=torch.arange(_TOKENS)[None], use_cache=False).logits
        except Exception as error:  # a model that needs more than tokens, or its other blocks
            raise NotRotated(f"{type(error).__name__}: {error}") from error
        return found

    @contextmanager
    def _alone(self, block: torch.nn.Module) -> Iterator[None]:
        """The model has this block and no other; its parameters are without memory again behind it."""
        place, _, leaf = self.prefix.rpartition(".")
        holder, embedding = self.model.get_submodule(place), self.model.get_input_embeddings()
        setattr(holder, leaf, torch.nn.ModuleList([block]))
        kept = [(part, name, held) for part in self.model.modules() for name, held in part._parameters.items()]
        padding, embedding.padding_idx = embedding.padding_idx, None  # it may be a row that is not there
        try:
            yield
        finally:
            embedding.padding_idx = padding
            for part, name, held in kept:
                part._parameters[name] = held
            setattr(holder, leaf, self.blocks)

    def _fill(self) -> None:
        """Random parameters, the same each time: matrices whose products are of one size, a head and an embedding of a few tokens' rows."""
        drawn = torch.Generator().manual_seed(0)
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        for module in self.model.modules():
            for name, old in module._parameters.items():
                if old is None:
                    continue
                shape = (_TOKENS, *old.shape[1:]) if module in (head, embedding) else tuple(old.shape)
                values = torch.randn(shape, generator=drawn)
                if len(shape) == 1:
                    values = 0.5 + 0.3 * values
                elif module is embedding:
                    values += 0.5  # so that their mean is not 0
                else:
                    values /= math.sqrt(shape[-1])
                module._parameters[name] = torch.nn.Parameter(values, requires_grad=False)

    def _apply(self, changes: Mapping[str, Change]) -> None:
        gains = {change.gain: self.model.get_parameter(change.gain).data for change in changes.values() if change.gain}
        for name, change in changes.items():
            held = self.model.get_parameter(name)
            held.data = change.of(held.data, gains.get(change.gain))


def not_rotated(checkpoint: Checkpoint, found: str) -> Refused:
    return Refused(
        Refusal("unknown-architecture", "notimpl", str(checkpoint.path), "the hidden states of models of this kind are not rotated",
                f"found {found}", "Quantize it without hadamard.")
    )  # fmt: skip
