"""Mixtures of experts: transformers' modules that hold their experts stacked, and what replaces them.

    gate_up_proj  [E, 2 I, H], or [E, H, 2 I] where transposed; rows [gate; up], or gate, up, gate, ... where interleaved
    down_proj     [E, H, I], or [E, I, H]
    ..._bias      [E, 2 I] and [E, H]
    up_proj       instead of gate_up_proj where there is no gate

Source: transformers.integrations.moe.use_experts_implementation, whose attributes say which of these a module is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from qcore.model.linear import StackedLinear

Part = Literal["gate", "up", "gate_up", "down"]


@dataclass(frozen=True)
class Layout:
    """How a module stacks its experts: `count` of them, from H = `hidden` to I = `inner` features and back."""

    count: int
    hidden: int
    inner: int
    gated: bool
    interleaved: bool
    transposed: bool
    biased: bool

    @classmethod
    def of(cls, module: Any) -> Layout | None:
        """The layout of transformers' module; None where it is no such module."""
        down = getattr(module, "down_proj", None)
        if not isinstance(down, torch.nn.Parameter) or down.dim() != 3 or not hasattr(module, "is_transposed"):
            return None
        if getattr(module, "has_post_expert_norm", False):
            return None
        count, hidden, inner = down.transpose(1, 2).shape if module.is_transposed else down.shape
        return cls(count, hidden, inner, module.has_gate, not module.is_concatenated, module.is_transposed,
                   module.has_bias)  # fmt: skip

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the module's parameters."""
        weights = ("gate_up_proj" if self.gated else "up_proj", "down_proj")
        return weights + tuple(f"{name}_bias" for name in weights if self.biased)

    def stack(self, part: Part, *, bias: bool = False) -> str:
        """The parameter that holds a part."""
        return self.stacks[(2 if bias else 0) + (part == "down")]

    def shape(self, part: Part) -> tuple[int, int]:
        """[N, K] of one expert's part."""
        if part == "down":
            return self.hidden, self.inner
        return self.inner * (2 if part == "gate_up" else 1), self.hidden

    def view(self, module: Any, part: Part, *, bias: bool = False) -> torch.Tensor:
        """A part [E, N, K] of the module's parameters, or its bias [E, N]; shares their memory."""
        stack: torch.Tensor = getattr(module, self.stack(part, bias=bias))
        rows = stack if bias else stack.transpose(1, 2) if self.transposed else stack
        if part not in ("gate", "up") or not self.gated:
            return rows
        if self.interleaved:
            return rows[:, part == "up" :: 2]
        return rows[:, self.inner :] if part == "up" else rows[:, : self.inner]


class QuantizedExperts(torch.nn.Module):
    """Replaces a transformers experts module; each expert's weights are linear layers of their own, or those of a part are held as one.

    parts: the experts' layers, E of each part; gate and up may come joined as gate_up, in the module's order of rows. stacked: they
    are held as one (StackedLinear, for which they must be stackable): one launch multiplies all rows of a part, and the host waits for nothing.
    formula: the replaced module without its parameters, which has the activation function and how gate and up meet.
    """

    def __init__(
        self, parts: dict[Part, list[torch.nn.Module]], formula: Any, layout: Layout, *, stacked: bool = False
    ) -> None:
        super().__init__()
        self.stacked = stacked
        hold: Any = StackedLinear if stacked else torch.nn.ModuleList
        self.parts = torch.nn.ModuleDict({part: hold(layers) for part, layers in parts.items()})
        self.layout = layout
        for name in layout.stacks:
            delattr(formula, name)
        self.formula = formula

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, H]; chosen int [T, k], each token's experts; weights [T, k] of their answers -> [T, H]."""
        if self.stacked:
            return self._all(hidden, chosen, weights)
        out = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for expert in chosen.unique().tolist():
            tokens, place = torch.where(chosen == expert)  # a token chooses an expert once: no index repeats
            answer = self._answer(partial(self._one, expert), hidden[tokens])
            out.index_add_(0, tokens, (answer * weights[tokens, place, None]).to(out.dtype))
        return out.to(hidden.dtype)

    def _one(self, expert: int, part: Part, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.parts[part][expert](x)  # type: ignore[index]
        return out

    def _all(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """A row for each token and expert of its, in the experts' order; answers are added in the order in which a token chose them."""
        experts, order = chosen.flatten().sort(stable=True)
        experts = experts.to(torch.int32)
        rows = self._answer(lambda part, x: self.parts[part](x, experts), hidden[order // chosen.shape[1]])
        answers = torch.empty_like(rows).index_copy_(0, order, rows).view(*chosen.shape, rows.shape[-1])
        weighted, wide = answers * weights[..., None], torch.promote_types(hidden.dtype, torch.float32)
        return weighted.sum(1, dtype=wide).to(hidden.dtype)

    def _answer(self, run: Callable[[Part, torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """What experts make of their rows. run: a part's layers on rows."""
        if not self.layout.gated:
            return run("down", self.formula.act_fn(run("up", x)))
        if "gate_up" in self.parts:
            joined = run("gate_up", x)
        else:
            pair = run("gate", x), run("up", x)
            joined = torch.stack(pair, -1).flatten(-2) if self.layout.interleaved else torch.cat(pair, -1)
        return run("down", self.formula._apply_gate(joined))
