"""What programs are made for: the generations of TPUs that run them, as facts.

Source: jax's own table (jax/_src/pallas/mosaic/tpu_info.py of jax 0.10) for kinds, vector memory and the types that a matrix unit multiplies; topologies by libtpu.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """topology: libtpu's name of the smallest one. kind: as a device says it. int8, fp8: the matrix unit multiplies int8 x int8, e4m3 x e4m3. memory: bytes of
    a core's vector memory."""

    architecture: str
    topology: str
    kind: str
    int8: bool
    fp8: bool
    memory: int


CHIPS: tuple[Chip, ...] = (
    Chip("v4", "v4:2x2x1", "TPU v4", False, False, 16 << 20),
    Chip("v5e", "v5e:2x2", "TPU v5 lite", True, False, 128 << 20),
    Chip("v5p", "v5p:2x2x1", "TPU v5", True, False, 64 << 20),
    Chip("v6e", "v6e:2x2", "TPU v6 lite", True, False, 128 << 20),
    Chip("v7x", "tpu7x:2x2x1", "TPU7x", False, True, 64 << 20),
)
"""v6e has other 8-bit floats (e5m2 and e4m3b11fnuz), v7x no int8."""

STAND_IN = "v5e"
"""What a CPU plays."""

_target: ContextVar[str] = ContextVar("target", default="")
_host: list[Chip] = []


def chip(architecture: str) -> Chip:
    """The row of an architecture."""
    return next(row for row in CHIPS if row.architecture == architecture)


def current() -> Chip:
    """That which programs are made for here: a target, if one is set; else this host's; where there is none, what a CPU plays."""
    if architecture := _target.get():
        return chip(architecture)
    if _host:
        return _host[0]
    import jax

    return _of_kind(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else chip(STAND_IN)


def found(kind: str) -> None:
    """This host's chips are of this kind, and torch-xla has them, so that jax cannot be asked."""
    _host[:] = [_of_kind(kind)]


def _of_kind(kind: str) -> Chip:
    return next((row for row in CHIPS if row.kind == kind), CHIPS[0])  # of one that is not known the least is asked


@contextmanager
def made_for(architecture: str) -> Iterator[None]:
    """Programs that are traced meanwhile are for this architecture."""
    before = _target.set(architecture)
    try:
        yield
    finally:
        _target.reset(before)
