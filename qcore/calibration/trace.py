"""What ran in a block on a text, in order: its modules that have a weight, what each was given, and what it gave."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qcore.calibration.blocks import Blocks


@dataclass(frozen=True)
class Ran:
    module: torch.nn.Module
    given: torch.Tensor
    gave: torch.Tensor


class Trace:
    """Of one block, which has its weights. states: [1, tokens, hidden], what it is given. output: alike, what it makes of them."""

    def __init__(self, blocks: Blocks, number: int, states: torch.Tensor) -> None:
        self.ran: list[Ran] = []
        with ExitStack() as hooks:
            for module in blocks.modules(number):
                if module._parameters.get("weight") is not None:
                    hooks.enter_context(module.register_forward_hook(self._add))
            self.output = blocks.run(number, states)

    def of(self, module: torch.nn.Module) -> Ran | None:
        """Its first call."""
        return next((ran for ran in self.ran if ran.module is module), None)

    def readers(self, given: torch.Tensor) -> list[torch.nn.Linear]:
        """All linear layers that were given this very tensor."""
        return [ran.module for ran in self.ran if ran.given is given and isinstance(ran.module, torch.nn.Linear)]

    def _add(self, module: torch.nn.Module, given: tuple[Any, ...], gave: Any) -> None:
        if isinstance(gave, torch.Tensor) and given and isinstance(given[0], torch.Tensor):
            self.ran.append(Ran(module, given[0], gave))
