"""Quark's config: its types, what of them is read, and the scheme that a tensor's spec stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from qcore.checkpoint.settings import Settings
from qcore.elements import (
    Element,
    Float,
    Granularity,
    Group,
    Int,
    Level,
    PerChannel,
    PerTensor,
    PerToken,
    ScaleType,
    Tile,
)
from qcore.scheme import TensorScheme, Zero


@dataclass(frozen=True)
class Kind:
    """What a dtype's codes are, and the granularities that its scales may have."""

    element: Element
    schemes: tuple[str, ...]
    shared: bool = False
    """Scales are powers of two of a group (MX)."""


_WHOLE = ("per_tensor", "per_channel")
_GROUPS = (*_WHOLE, "per_group")
KINDS: dict[str, Kind] = {
    "fp8_e4m3": Kind(Float("e4m3fn"), (*_WHOLE, "per_block")),
    "fp8_e5m2": Kind(Float("e5m2"), (*_WHOLE, "per_block")),
    "int8": Kind(Int(8, signed=True), _GROUPS),
    "uint8": Kind(Int(8, signed=False), _GROUPS),
    "int4": Kind(Int(4, signed=True), _GROUPS),
    "uint4": Kind(Int(4, signed=False), _GROUPS),
    "fp4": Kind(Float("e2m1"), ("per_group",), shared=True),
    "fp6_e3m2": Kind(Float("e3m2"), ("per_group",), shared=True),
    "fp6_e2m3": Kind(Float("e2m3"), ("per_group",), shared=True),
}
_ROUNDINGS: dict[str | None, ScaleType] = {None: "e8m0", "even": "e8m0", "floor": "e8m0floor", "ceil": "e8m0ceil"}
"""How the exponents of inputs are found, by scale_calculation_mode."""


_OBSERVERS = (None, "PlaceholderObserver", "PerBlockMXObserver",
              *(f"Per{grain}MinMaxObserver" for grain in ("Tensor", "Channel", "Group")))  # fmt: skip
"""Those that take an input's scale from its largest magnitude."""


class Spec(Settings):
    """How one tensor is quantized."""

    dtype: str
    qscheme: str
    ch_axis: int | None = None
    group_size: int | None = Field(None, ge=1)
    symmetric: bool | None = True
    is_dynamic: bool = False
    scale_format: str | None = None
    scale_calculation_mode: str | None = None
    zero_point_type: str | None = "int32"
    block_size: tuple[int, int] | None = None
    is_scale_quant: bool = False
    observer_cls: str | None = None
    scale_type: str | None = None
    round_method: str | None = None

    @property
    def level(self) -> tuple[str, str, bool]:
        """What tells the two levels of a pair."""
        return self.dtype, self.qscheme, self.is_scale_quant

    def __str__(self) -> str:
        scales = f", scales in {self.scale_format}" if self.scale_format else ""
        return f"{self.dtype} {self.qscheme}, symmetric {self.symmetric}{scales}"


Specs = Spec | list[Spec] | None
"""Of one tensor; a list of two is a two-level scale."""


class Output(Settings):
    """How a layer's output is quantized: that of the projections of keys and values, for the cache."""

    dtype: str = ""
    qscheme: str = ""
    is_dynamic: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} {self.qscheme}" + (", dynamic" if self.is_dynamic else "")


class LayerSpec(Settings):
    """A layer's tensors."""

    weight: Specs = None
    input_tensors: Specs = None
    output_tensors: Output | list[Output] | None = None
    bias: Any = None

    @property
    def outputs(self) -> list[Output]:
        given = self.output_tensors
        return given if isinstance(given, list) else [given] if given else []


class Algorithm(Settings):
    """One of algo_config: what was done to the weights, and, of rotations, also what is to be done to inputs."""

    name: str = ""
    r3: bool | None = None
    r4: bool | None = None
    online_r1_rotation: bool | None = None

    @property
    def at_run_time(self) -> list[str]:
        """What of it a layer computes while it runs; offline rotations, as all else, are in the weights."""
        name = self.name.lower()
        stated = [*(part for part in ("r3", "r4") if getattr(self, part) or (name == "quarot" and getattr(self, part) is None)),
                  *(("online_r1_rotation",) if self.online_r1_rotation else ())]  # fmt: skip
        return [f"{name} {part}" for part in stated] + ([] if name in _FOLDED else [name or "unnamed"])


_FOLDED = frozenset(["awq", "autoround", "autosmoothquant", "gptaq", "gptq", "qronos", "quarot", "rotation", "smooth"])
"""Algorithms whose work is in the weights, once rotations of inputs are set aside. Others (svdquant) add terms to a layer."""


class Export(Settings):
    """How tensors were written."""

    pack_method: Literal["reorder", "order"] = "reorder"
    weight_format: str = "real_quantized"
    kv_cache_group: list[str] = Field(default_factory=list)


class QuarkConfig(Settings):
    """The keys that decide what the tensors mean."""

    global_quant_config: LayerSpec
    layer_quant_config: dict[str, LayerSpec] | None = None
    layer_type_quant_config: dict[str, LayerSpec] | None = None
    exclude: list[str] | None = None
    export: Export = Field(default_factory=Export)
    kv_cache_quant_config: dict[str, LayerSpec] | None = None
    softmax_quant_spec: Output | None = None
    algo_config: Algorithm | list[Algorithm] | None = None
    version: str | None = None

    @property
    def algorithms(self) -> list[Algorithm]:
        given = self.algo_config
        return given if isinstance(given, list) else [given] if given else []


def weight_scheme(specs: Specs) -> TensorScheme | None:
    """The scheme of a weight; None where the combination is not read."""
    if isinstance(specs, list):
        if [spec.level for spec in specs] == [("fp8_e4m3", "per_tensor", False), ("int4", "per_channel", False)]:
            return TensorScheme(Int(4, signed=True), (Level(PerChannel()), Level(PerTensor())))
        return _nvfp4(specs, inputs=False)
    if specs is None or (kind := KINDS.get(specs.dtype)) is None:
        return None
    axes = {"per_channel": (0, None), "per_group": (-1, 1, None)}
    grid, zero = _granularity(specs, PerChannel()), _zero(specs, kind)
    if not _fits(specs, kind) or grid is None or specs.ch_axis not in axes.get(specs.qscheme, (specs.ch_axis,)):
        return None
    element = Int(kind.element.bits, signed=zero is None) if isinstance(kind.element, Int) else kind.element
    return TensorScheme(element, (Level(grid, "e8m0" if kind.shared else "float"),), zero)


def input_scheme(specs: Specs) -> TensorScheme | None:
    """The scheme of an input; None where the combination is not read. Asymmetric codes are held as signed ones."""
    if isinstance(specs, list):
        return _nvfp4(specs, inputs=True)
    if specs is None or (kind := KINDS.get(specs.dtype)) is None:
        return None
    grid, zero = _granularity(specs, PerToken()), _zero(specs, kind)
    dynamic = specs.is_dynamic or kind.shared
    if not _fits(specs, kind) or grid is None or isinstance(grid, Tile) or (isinstance(grid, Group) and not dynamic):
        return None
    if zero and (kind.element.bits != 8 or isinstance(grid, Group)):
        return None
    if kind.shared and specs.scale_calculation_mode not in _ROUNDINGS:
        return None
    if not _plain_rounding(specs, kind, dynamic=dynamic):
        return None
    scale = _ROUNDINGS[specs.scale_calculation_mode] if kind.shared else "float"
    element = Int(kind.element.bits, signed=True) if isinstance(kind.element, Int) else kind.element
    return TensorScheme(element, (Level(grid, scale),), zero, dynamic=dynamic)


def _plain_rounding(spec: Spec, kind: Kind, *, dynamic: bool) -> bool:
    """Whether an input's codes and, at run time, its scale are found by the largest magnitude of each token, in float32."""
    if isinstance(kind.element, Int) and spec.round_method not in (None, "half_even"):
        return False
    if not dynamic:
        return True
    axes = {"per_channel": (1, None), "per_group": (-1, None)}
    return (
        spec.observer_cls in _OBSERVERS
        and spec.ch_axis in axes.get(spec.qscheme, (spec.ch_axis,))
        and (kind.shared or spec.scale_type in (None, "float", "float32"))
        and not (spec.symmetric is False and "float" in (spec.zero_point_type or ""))
    )


def _fits(spec: Spec, kind: Kind) -> bool:
    if spec.qscheme not in kind.schemes or (spec.scale_format == "e8m0") != kind.shared:
        return False
    return isinstance(kind.element, Int) or spec.symmetric is not False


def _zero(spec: Spec, kind: Kind) -> Zero | None:
    element = kind.element
    return "stored" if isinstance(element, Int) and (not element.signed or spec.symmetric is False) else None


def _nvfp4(specs: list[Spec], *, inputs: bool) -> TensorScheme | None:
    levels = [spec.level for spec in specs]
    if levels != [("fp4", "per_group", False), ("fp8_e4m3", "per_tensor", True)] or not specs[0].group_size:
        return None
    fine = Level(Group(specs[0].group_size), "e4m3fn")
    return TensorScheme(Float("e2m1"), (fine, Level(PerTensor())), dynamic=inputs)


def _granularity(spec: Spec, channel: Granularity) -> Granularity | None:
    block = spec.block_size
    known: dict[str, Granularity | None] = {
        "per_tensor": PerTensor(),
        "per_channel": channel,
        "per_group": Group(spec.group_size) if spec.group_size else None,
        "per_block": Tile(*block) if block and min(block) > 0 else None,
    }
    return known.get(spec.qscheme)
