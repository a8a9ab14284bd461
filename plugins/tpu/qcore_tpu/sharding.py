"""A model over several chips, each with its part of every layer's outputs: a product is made of all columns of x and of the chip's own part of the weight, and XLA puts
the parts together where they meet. Where outputs do not come in as many equal parts as there are chips, each chip has them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

AXIS = "chips"
"""The one axis of a mesh."""

LARGE = 1 << 20
"""Bytes of a matrix that is parted as it comes to chips; others come to the first one, and go on as they are needed."""

BY_OUTPUT = frozenset({"codes", "scales", "zeros", "coarse", "coarse_zeros", "tail"})
"""Parts of a product (qcore_tpu.kernels.pallas) whose last dimension is the weight's outputs."""

_mesh: ContextVar[Any] = ContextVar("mesh", default=None)
_host: list[Any] = []


def on_all() -> None:
    """Makes torchax ready (qcore_tpu.runtime); from now on models come to lie on all chips of this process. Raises ImportError where torchax is not installed."""
    from qcore_tpu import runtime

    runtime.start()
    import jax
    import numpy as np
    from jax.sharding import Mesh

    _spread_as_they_come()
    _host[:] = [Mesh(np.array(jax.devices()), (AXIS,))]


def on_one() -> None:
    """The same, on the first chip."""
    from qcore_tpu import runtime

    runtime.start()
    _host.clear()


def current_mesh() -> Any:
    """jax's mesh of the chips that programs are made for; None where it is one chip."""
    return _mesh.get() or next(iter(_host), None)


@contextmanager
def over(mesh: Any) -> Iterator[None]:
    """Programs that are traced meanwhile are for this mesh."""
    before = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(before)


def mesh_of(topology: str) -> Any:
    """All chips of a topology, as libtpu names it (`v5e:2x2`)."""
    from qcore_tpu.ahead import prepare

    prepare()
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    return Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices), (AXIS,))


@cache
def _spread_as_they_come() -> None:
    """From now on large matrices that become torchax's are parted by their rows where models lie on several chips, one after the other: those that a model has dense would
    else all lie on the first chip until its decoder parts them (`placements`), and there still."""
    import jax
    import torchax
    from jax.sharding import NamedSharding

    environment: Any = torchax.default_env()
    convert = environment.t2j_copy

    def converted(tensors: Any) -> Any:
        found = convert(tensors)
        mesh = current_mesh()
        if mesh is None or not isinstance(found, jax.Array) or found.nbytes < LARGE:
            return found
        return jax.device_put(found, NamedSharding(mesh, rows_of(found.shape, mesh)))

    environment.t2j_copy = converted


def rows_of(shape: tuple[int, ...], mesh: Any) -> Any:
    """jax's specification of a matrix that is parted by its rows, if it has as many equal parts as there are chips; of all else that each chip has it all."""
    from jax.sharding import PartitionSpec

    return PartitionSpec(AXIS) if len(shape) == 2 and shape[0] % mesh.size == 0 else PartitionSpec()


def specs_of(parts: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """How a product's parts lie on the mesh: jax's specification of each."""
    from jax.sharding import PartitionSpec

    if parts["codes"].shape[-1] % mesh.size:
        return {name: PartitionSpec() for name in parts}
    return {
        name: PartitionSpec(*[None] * (part.ndim - 1), AXIS) if name in BY_OUTPUT else PartitionSpec()
        for name, part in parts.items()
    }


def spread(module: torch.nn.Module) -> None:
    """Has each chip of the current mesh keep its part of a product's buffers, which are torchax's."""
    import jax
    from jax.sharding import NamedSharding
    from torchax.interop import jax_view, torch_view

    buffers, mesh = jax_view(dict(module.named_buffers())), current_mesh()
    for name, spec in specs_of(buffers, mesh).items():
        module.register_buffer(name, torch_view(jax.device_put(buffers[name], NamedSharding(mesh, spec))))


def placements(weights: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """jax's placement of each of a model's weights, by their names: products' parts, and embeddings and matrices by their rows."""
    from jax.sharding import NamedSharding, PartitionSpec

    found, layers = {}, dict[str, dict[str, Any]]()
    for name, array in weights.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith(".packed"):
            layers.setdefault(module, {})[leaf] = array
        found[name] = rows_of(array.shape, mesh) if leaf == "weight" else PartitionSpec()
    for module, parts in layers.items():
        if "codes" in parts:
            found |= {f"{module}.{leaf}": spec for leaf, spec in specs_of(parts, mesh).items()}
    return {name: NamedSharding(mesh, spec) for name, spec in found.items()}


def heads_placement(heads: int, mesh: Any) -> Any:
    """Of keys and values [texts, heads, tokens, head_dim]."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(None, AXIS) if heads % mesh.size == 0 else PartitionSpec())
