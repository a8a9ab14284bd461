"""Compiling for TPUs on a host without one: libtpu compiles for a topology that it is told of, and says what the program needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from qcore.platform import Target

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
"""Without these libtpu looks for the machine that it is on, and for its neighbours."""

Typed = tuple[tuple[int, ...], str]
"""Shape and type of an array."""


def prepare() -> None:
    """Makes libtpu usable on this host; before jax is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@cache
def placed(topology: str) -> Any:
    """jax's placement on the first chip of a topology."""
    prepare()
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    return SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])


def compiled(function: Callable[..., Any], target: Target, x: Typed, parts: Mapping[str, Typed], **static: Any) -> Any:
    """function(x, parts) as libtpu makes it, one of jax's compiled programs. Raises whatever the compiler does not take."""
    place = placed(str(target.name))
    import jax

    def shaped(typed: Typed) -> Any:
        return jax.ShapeDtypeStruct(*typed, sharding=place)

    lowered = jax.jit(partial(function, **static), out_shardings=place).lower(
        shaped(x), {name: shaped(part) for name, part in parts.items()}
    )
    return lowered.compile()


def footprint(program: Any) -> dict[str, int]:
    """What libtpu says of a compiled program: the bytes that it moves between the chip's memory and the core, by its own count and, of Pallas's programs, by what their grid reads
    and writes; those of its arguments and its result; operations; and the memory that it and its code need besides."""
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return {
        "bytes moved": int(cost["bytes accessed"]),
        "bytes needed": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "flops": int(cost.get("flops", 0)),
        "temporary bytes": memory.temp_size_in_bytes,
        "bytes of code": memory.generated_code_size_in_bytes,
    }
