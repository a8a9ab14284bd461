"""A model of which one block has its weights at a time: embeddings first, then decoder blocks one after the other, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from qcore.calibration.experts import Unstacked
from qcore.checkpoint.kv_scales import spelled
from qcore.model.places import Places, Slot
from qcore.model.skeleton import decoder_blocks, skeleton
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    from qcore.checkpoint.open import Checkpoint


class Blocks:
    """Numbers are those of decoder blocks, from 0; the one behind the last is all that is in none, the output layer among it.

    Raises Refused: what making the model gives, and unknown-architecture where it has no blocks in a row, or experts stacked otherwise than the model has them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model: Any = skeleton(checkpoint, torch.float32)
        found = decoder_blocks(self.model)
        if found is None:
            raise unknown(checkpoint, f"no list of decoder blocks in {type(self.model).__name__}")
        self.prefix, self.blocks = found
        places = Unstacked(self.model, Places(self.model), checkpoint)
        self._reads = _reads(places, checkpoint)
        self.named = {str(places.parameter(name)): name for name in checkpoint.parameters}
        """The checkpoint's names of the model's unquantized parameters."""
        self._places = {module: places.parameter(f"{module}.weight") for module in checkpoint.layers}
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def linears(self, number: int) -> dict[str, torch.nn.Linear]:
        """The linear layers of a block, by the checkpoint's names of them."""
        own = {module: str(place) for module, place in self._places.items() if self._belongs(str(place), number)}
        found = {module: self.model.get_submodule(place.rpartition(".")[0]) for module, place in own.items()}
        return {module: layer for module, layer in found.items() if isinstance(layer, torch.nn.Linear)}

    def modules(self, number: int) -> list[torch.nn.Module]:
        return [module for name, module in self.model.named_modules() if self._belongs(f"{name}.", number)]

    def fill(self, number: int) -> None:
        """A block has its weights from now on."""
        self._fill(lambda name: self._belongs(name, number))

    def clear(self, number: int) -> None:
        """Its weights are gone again."""
        _clear(self.blocks[number] if number < len(self) else self.model)

    def first(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the first block is given of each window of tokens [windows, tokens]: [1, tokens, hidden]. Once it has been asked for one, `run` knows what else blocks are given."""
        head = self.model.get_output_embeddings()
        heads = {name for name, module in self.model.named_modules() if module is head and head is not None}
        outside = {name for name in self.model.state_dict() if not name.startswith(f"{self.prefix}.")}
        table = self._table()
        self._fill(lambda name: name in outside and name != table and name.rpartition(".")[0] not in heads)
        holder, leaf = self.model.get_submodule(self.prefix.rpartition(".")[0]), self.prefix.rpartition(".")[2]
        kept = getattr(holder, leaf)
        try:
            with self._rows(table, windows.unique()):
                for number, window in enumerate(windows):
                    calls = self._recorded(holder, leaf, window)
                    if number == 0:
                        self._calls = calls
                    elif number == 1 and not all(map(_same, (c[1] for c in calls), (c[1] for c in self._calls))):
                        raise self._unknown("blocks that are given more of a text than its states")
                    yield self._states
        finally:
            setattr(holder, leaf, kept)
            _clear(self.model)

    def stored(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """A parameter as the checkpoint would hold it: its name there, and its values in the dtype of the file."""
        name = self.named[next(name for name, own in self.model.named_parameters() if own is parameter)]
        return {name: parameter.detach().to(self.checkpoint.parameter(name).dtype)}

    def dtype_of(self, module: torch.nn.Module) -> torch.dtype:
        """That the checkpoint holds a module's weight in."""
        place = next(name for name, own in self.model.named_modules() if own is module)
        dtype: torch.dtype = self.checkpoint.parameter(self.named[f"{place}.weight"]).dtype
        return dtype

    def run(self, number: int, states: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """What the block makes of [1, tokens, hidden]; logits, what is behind the last one. weights: in place of its linear layers', by the checkpoint's names."""
        others = {str(self._places[module]): weight for module, weight in (weights or {}).items()}
        if number == len(self):
            return self._behind(states, others)
        start = len(f"{self.prefix}.{number}.")
        others = {place[start:]: weight for place, weight in others.items()}
        return _Alone(self.blocks[number], *self._calls[number]).run(states, others)

    def alone(self, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """`run` of a block, as it is from now on, without the model: another process can be sent it. Of what is behind the last one, only this process."""
        if number == len(self):
            return partial(self.run, number)
        return _Alone(self.blocks[number], *self._calls[number]).run

    def _behind(self, states: torch.Tensor, others: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits [1, tokens, vocabulary] of what the last block gives: the model, with passing blocks, of which the last gives these states."""
        holder, leaf = self.model.get_submodule(self.prefix.rpartition(".")[0]), self.prefix.rpartition(".")[2]
        kept = getattr(holder, leaf)
        try:
            passing = [_Passing(block, as_tuple=self._as_tuple) for block in self.blocks]
            passing[-1].instead = states
            setattr(holder, leaf, torch.nn.ModuleList(passing))
            given = {"input_ids": torch.zeros(1, states.shape[1], dtype=torch.long), "use_cache": False}
            found: torch.Tensor = torch.func.functional_call(self.model, others, (), given).logits
        finally:
            setattr(holder, leaf, kept)
        return found

    def _belongs(self, name: str, number: int) -> bool:
        """Whether a tensor, or a module with a point behind its name, is a block's, or of none for the number behind the last."""
        if number == len(self):
            return not name.startswith(f"{self.prefix}.")
        return name.startswith(f"{self.prefix}.{number}.")

    def _table(self) -> str:
        """The input embeddings' name, where some of their rows can be read alone."""
        module = self.model.get_input_embeddings()
        name = next((f"{place}.weight" for place, own in self.model.named_modules() if own is module), "")
        info = self.checkpoint.parameters.get(self.named.get(name, ""))
        plain = isinstance(module, torch.nn.Embedding) and info is not None and info.shape == tuple(module.weight.shape)
        return name if plain else ""

    @contextmanager
    def _rows(self, table: str, tokens: torch.Tensor) -> Iterator[None]:
        """In it the embeddings have rows for these tokens alone, in ascending order: a vocabulary's may be larger than any block."""
        if not table:
            yield
            return
        module = self.model.get_input_embeddings()
        start, found = 0, []
        for piece in self.checkpoint.pieces(self.named[table]):
            own = tokens[(tokens >= start) & (tokens < start + len(piece))] - start
            found.append(piece[own].to(torch.float32))
            start += len(piece)
        kept = module.weight, module.padding_idx
        module.weight, module.padding_idx = torch.nn.Parameter(torch.cat(found), requires_grad=False), None
        hook = module.register_forward_pre_hook(lambda _, given: (torch.searchsorted(tokens, given[0]), *given[1:]))
        try:
            yield
        finally:
            hook.remove()
            module.weight, module.padding_idx = kept

    def _recorded(self, holder: Any, leaf: str, window: torch.Tensor) -> list[Any]:
        """What each block is given beside the states, for a window [tokens]."""
        for whole in (False, True):
            passing = [_Passing(block, as_tuple=whole) for block in self.blocks]
            setattr(holder, leaf, torch.nn.ModuleList(passing))
            try:
                self.model.base_model(input_ids=window[None], use_cache=False)
            except RuntimeError:  # it takes blocks' results apart in the other way
                continue
            states = [one.given[0] for one in passing]
            if all(part.shape == states[0].shape for part in states):
                self._states: torch.Tensor = states[0]
                self._as_tuple = whole
                return [(one.given[1], one.given[2]) for one in passing]
        raise self._unknown("blocks whose results are no hidden states")

    def _fill(self, wanted: Callable[[str], bool]) -> None:
        for name, old in {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}.items():
            if not wanted(name) or not (old.is_meta or name in self._reads):
                continue
            if name not in self._reads:
                raise bad_file("missing-tensor", "the model needs a tensor that the checkpoint does not hold",
                               file=self.checkpoint.path, tensor=name)  # fmt: skip
            values = self._reads[name]()
            if tuple(values.shape) != tuple(old.shape):
                raise bad_file("bad-shape", "the tensor is not of the model's size", file=self.checkpoint.path, tensor=name,
                               field="shape", found=list(values.shape), expected=list(old.shape))  # fmt: skip
            place, _, leaf = name.rpartition(".")
            parent = self.model.get_submodule(place)
            values = values.to(torch.float32) if values.is_floating_point() else values
            if leaf in parent._parameters:
                setattr(parent, leaf, torch.nn.Parameter(values, requires_grad=False))
            else:
                parent._buffers[leaf] = values

    def _unknown(self, what: str) -> Refused:
        return unknown(self.checkpoint, what)


@dataclass(frozen=True)
class _Alone:
    """A block without its model. args, named: what it is given beside states."""

    block: torch.nn.Module
    args: tuple[Any, ...]
    named: Mapping[str, Any]

    def run(self, states: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """What it makes of [1, tokens, hidden]. weights: in place of its own, by their names in it."""
        if weights:
            out = torch.func.functional_call(self.block, dict(weights), (states, *self.args), dict(self.named))
        else:
            out = self.block(states, *self.args, **self.named)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found


class _Passing(torch.nn.Module):
    """In the place of a block: gives back the states that it is given, or others instead, and keeps what else it is given."""

    def __init__(self, block: torch.nn.Module, *, as_tuple: bool) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no submodule, so that nothing of it is looked for here
        self.as_tuple = as_tuple
        self.instead: torch.Tensor | None = None
        self.given: tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, states: torch.Tensor, *args: Any, **named: Any) -> Any:
        self.given = (states, args, named)
        states = states if self.instead is None else self.instead
        return (states,) if self.as_tuple else states


def unknown(checkpoint: Checkpoint, what: str) -> Refused:
    return Refused(
        Refusal("unknown-architecture", "notimpl", str(checkpoint.path), "models of this kind are not calibrated",
                f"found {what}", "Choose an algorithm without calibration, such as rtn.")
    )  # fmt: skip


def not_finite(checkpoint: Checkpoint, where: str) -> Refused:
    return bad_file("bad-content", "what the model gives a part of it is not finite", file=checkpoint.path, tensor=where, field="input",
                    found="NaN or infinity", expected="finite numbers",
                    fix="Check that the model reads the text sensibly before it is quantized.")  # fmt: skip


def _reads(places: Unstacked, checkpoint: Checkpoint) -> Mapping[str, Callable[[], torch.Tensor]]:
    """How to read each tensor of the model, by its name."""
    found: dict[str, Callable[[], torch.Tensor]] = {}

    def add(place: str | Slot, read: Callable[[], torch.Tensor]) -> None:
        if isinstance(place, Slot):
            raise unknown(checkpoint, f"{place.part} of all experts in {place.module} as one tensor")
        found[place] = read

    for name in checkpoint.parameters:
        if not spelled(name):
            add(places.parameter(name), lambda name=name: checkpoint.parameter(name))  # type: ignore[misc]
    for module, entry in checkpoint.layers.items():
        if entry.scheme is not None:
            add(places.parameter(f"{module}.weight"), lambda module=module: checkpoint.dequantize(module))  # type: ignore[misc]
            add(places.parameter(f"{module}.bias"), lambda module=module: _bias(checkpoint, module))  # type: ignore[misc]
    return found


def _bias(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    found = checkpoint.layer(module).bias
    if found is None:
        raise bad_file("missing-tensor", "the model needs a tensor that the checkpoint does not hold", file=checkpoint.path,
                       tensor=f"{module}.bias")  # fmt: skip
    return found


def _clear(module: torch.nn.Module) -> None:
    """Parameters without memory; buffers, which are computed, stay."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                part._parameters[name] = torch.nn.Parameter(old.to("meta"), requires_grad=False)


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two texts give a block the same."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return type(ours) is type(theirs)
