"""jax's functions in torch-xla's graphs: each is lowered by jax, once for each shape, and becomes a node of the graph of torch's operators, which XLA compiles whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from qcore_tpu import chips

_Typed = tuple[tuple[int, ...], str]


@cache
def start() -> None:
    """Makes torch know the device `xla`, in this process. jax runs nothing there: it is kept from taking the chips, which torch-xla has. Raises ImportError where torch-xla is
    not installed."""
    import torch_xla
    from torch_xla.core.xla_model import xla_device_hw, xla_device_kind

    device = torch_xla.device()
    if xla_device_hw(device) == "TPU":
        chips.found(xla_device_kind(device))
    try:
        import jax
    except ImportError:  # then the core's portable kernels run
        return
    jax.config.update("jax_platforms", "cpu")


def start_on_cpu() -> None:
    """The same, on the host's CPU."""
    import os

    os.environ.setdefault("PJRT_DEVICE", "CPU")
    start()


def call(
    function: Callable[..., Any], x: torch.Tensor, parts: Mapping[str, torch.Tensor], **static: Any
) -> torch.Tensor:
    """function(x, parts, **static), a function of jax's, of tensors on `xla`. static: what can be hashed."""
    from torch_xla.core.xla_model import xla_device_hw

    platform = "tpu" if xla_device_hw(x.device) == "TPU" else "cpu"
    typed = tuple((name, _typed(part)) for name, part in parts.items())
    node = _node(function, _typed(x), typed, tuple(static.items()), platform)
    made: torch.Tensor = node([x, *parts.values()])[0]
    return made


@cache
def _node(
    function: Callable[..., Any],
    x: _Typed,
    parts: tuple[tuple[str, _Typed], ...],
    static: tuple[tuple[str, Any], ...],
    platform: str,
) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """Takes x and the parts."""
    import jax
    from torch_xla.core.xla_builder import computation_from_module_proto, xla_computation_as_func

    made = exported(function, x, dict(parts), dict(static), platform)
    traced = jax.jit(made.call, keep_unused=True).trace(*made.in_avals)
    hlo: Any = traced.lower(lowering_platforms=(platform,)).compiler_ir("hlo")
    name = f"qcore::{getattr(function, '__name__', 'function')}"
    node: Callable[[list[torch.Tensor]], list[torch.Tensor]] = xla_computation_as_func(
        computation_from_module_proto(name, hlo.as_serialized_hlo_module_proto()), name
    )
    return node


def exported(
    function: Callable[..., Any], x: _Typed, parts: Mapping[str, _Typed], static: Mapping[str, Any], platform: str
) -> Any:
    """function(x, parts, **static) of arrays of these shapes and types, as jax exports it: torch-xla 2.9 comes with an older compiler (libtpu 0.0.21) than jax 0.7.1 lowers
    Pallas for otherwise."""
    import jax
    from jax import export

    def flat(x: jax.Array, *given: jax.Array) -> jax.Array:
        found: jax.Array = function(x, dict(zip(parts, given, strict=True)), **static)
        return found

    given = [jax.ShapeDtypeStruct(*typed) for typed in (x, *parts.values())]
    return export.export(jax.jit(flat, keep_unused=True), platforms=[platform])(*given)


def _typed(tensor: torch.Tensor) -> _Typed:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
