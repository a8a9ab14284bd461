"""compressed-tensors' quantization config: groups of modules, and the arguments that say how a tensor is quantized.

Source: the compressed-tensors library (quantization/quant_config.py, quant_args.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, field_validator

from qcore.checkpoint.settings import Settings
from qcore.elements import Float, FloatFormat, Granularity, Group, Int, Level, PerChannel, PerTensor, PerToken, Tile
from qcore.method import is_embedding
from qcore.scheme import PRESETS, Scheme, TensorScheme, integer_weight

_FLOATS: dict[int, FloatFormat] = {4: "e2m1", 6: "e2m3", 8: "e4m3fn"}
_PLAIN_SCALES = (None, "torch.float16", "torch.bfloat16", "torch.float32")
_LAYOUTS: dict[str, tuple[type, int, str]] = {
    "nvfp4-pack-quantized": (Float, 4, "e4m3fn"),
    "mxfp4-pack-quantized": (Float, 4, "e8m0"),
    "mxfp6-pack-quantized": (Float, 6, "e8m0"),
    "mxfp8-quantized": (Float, 8, "e8m0"),
}
"""Layouts that go with one kind of scales: the weight's element, its bits, and the type of its scales."""


class Arguments(Settings):
    """QuantizationArgs: how one tensor is quantized."""

    num_bits: int = Field(8, ge=1, le=8)
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"] | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: str | bool | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None

    @field_validator("block_structure", mode="before")
    @classmethod
    def _legacy_blocks(cls, value: object) -> object:
        return value.split("x") if isinstance(value, str) else value

    def tensor_scheme(self, *, weight: bool) -> TensorScheme:
        """Raises ValueError where no scheme's words describe it."""
        if self.type == "float" and (self.num_bits not in _FLOATS or not self.symmetric):
            raise ValueError(f"{'' if self.symmetric else 'asymmetric '}{self.num_bits}-bit floats")
        if not weight and self.dynamic and self.scale_dtype in ("torch.float16", "torch.bfloat16"):
            raise ValueError(f"scales rounded to {self.scale_dtype} at run time")
        if not weight and self.dynamic and not self.symmetric and "float" in (self.zp_dtype or ""):
            raise ValueError(f"zero points in {self.zp_dtype} at run time")
        levels = self._levels()
        # Weights come to the normal form: asymmetric codes are unsigned.
        signed = self.symmetric or not weight
        element = Float(_FLOATS[self.num_bits]) if self.type == "float" else Int(self.num_bits, signed)
        ordered = self.actorder in ("group", "dynamic", True) and isinstance(levels[0].granularity, Group)
        return TensorScheme(element, levels, None if self.symmetric else "stored", ordered, dynamic=bool(self.dynamic))

    @property
    def stated_strategy(self) -> str:
        """The strategy, or what a group size alone means."""
        return self.strategy or {None: "tensor", -1: "channel"}.get(self.group_size, "group")

    def _levels(self) -> tuple[Level, ...]:
        strategy = self.stated_strategy
        size, floats = self.group_size or 0, self.type == "float" and self.num_bits < 8
        unsaid = ValueError(f"strategy {strategy} with group_size {self.group_size}, scale_dtype {self.scale_dtype}")
        if strategy == "tensor_group" and size > 0 and self.type == "float":
            if self.scale_dtype not in (None, "torch.float8_e4m3fn"):
                raise unsaid
            return Level(Group(size), "e4m3fn"), Level(PerTensor())
        # Before scale_dtype was a field, groups of 32 small floats were MX.
        mx_scales = ("torch.uint8", None) if floats else ("torch.uint8",)
        if strategy == "group" and size == 32 and self.type == "float" and self.scale_dtype in mx_scales:
            return (Level(Group(32), "e8m0"),)
        granularities: dict[str, Granularity | None] = {
            "tensor": PerTensor(),
            "channel": PerChannel(),
            "token": PerToken(),
            "group": Group(size) if size > 0 else None,
            "block": Tile(*self.block_structure) if self.block_structure and min(self.block_structure) > 0 else None,
        }
        granularity = granularities.get(strategy)
        if granularity is None or floats or self.scale_dtype not in _PLAIN_SCALES:
            raise unsaid
        return (Level(granularity),)


class Scope(Settings):
    """One of config_groups: which modules, and how."""

    targets: list[str]
    weights: Arguments | None = None
    input_activations: Arguments | None = None
    output_activations: Arguments | None = None
    format: str | None = None

    def runs_plain(self, status: str) -> bool:
        """Whether the library rounds a plain weight, or what goes in and out, while the model runs."""
        rounded = self.input_activations is not None and status != "compressed"
        return rounded or self.output_activations is not None or bool(self.weights and self.weights.dynamic)

    def scheme(self) -> Scheme:
        """Raises ValueError where no scheme's words describe it."""
        if self.output_activations is not None or self.weights is None:
            raise ValueError("output_activations" if self.weights else "no weights")
        weight, given = self.weights.tensor_scheme(weight=True), self.input_activations
        fits = _LAYOUTS.get(self.format or "")
        if fits and fits != (type(weight.element), weight.bits, weight.scales[0].type):
            raise ValueError(f"format {self.format} for {weight}")
        if given is None:
            return Scheme(weight)
        inputs = given.tensor_scheme(weight=False)
        if not inputs.dynamic and inputs.granularity != PerTensor():
            raise ValueError(f"input_activations with stored scales, strategy {given.strategy}")
        return Scheme(weight, inputs)


class Preset(Settings):
    """The short form of a config group: a preset's name and its targets."""

    name: str
    targets: list[str]
    format: str | None = None

    def scheme(self) -> Scheme:
        """Raises ValueError where there is no such preset."""
        name = self.name.upper()
        if name in PRESETS:
            return PRESETS[name]
        if name == "MXFP4XFP8":
            return replace(PRESETS["MXFP4"], input=PRESETS["FP8_BLOCK"].input)
        bits = re.fullmatch(r"W([2-8])A(4|8|16)", name)
        if bits is None or int(bits[1]) > int(bits[2]):
            raise ValueError(f"preset {self.name}")
        weight = integer_weight(int(bits[1]), Group(128), symmetric=True)
        if bits[2] == "16":
            return Scheme(weight)
        return Scheme(weight, TensorScheme(Int(int(bits[2]), signed=True), (Level(PerToken()),), dynamic=True))


class Application(Settings):
    """Where a rotation stands."""

    location: str


class Rotation(Settings):
    """TransformScheme: one rotation, wherever it is applied."""

    apply: list[Application] = Field(default_factory=list)


class Rotations(Settings):
    """TransformConfig."""

    config_groups: dict[str, Rotation]

    @property
    def online(self) -> list[str]:
        """The rotations of activations. Those of weights are in the numbers that are stored."""
        return [f"{name} of {use.location}" for name, group in self.config_groups.items() for use in group.apply
                if use.location not in ("weight_input", "weight_output")]  # fmt: skip


class CompressedConfig(Settings):
    config_groups: dict[str, Scope | list[str]] = Field(default_factory=dict)
    format: str = "dense"
    quantization_status: str = "compressed"
    ignore: list[str] | None = None
    kv_cache_scheme: Arguments | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: Rotations | None = None
    moe_sparsity_config: dict[str, Any] | None = None
    attention_input_activations: Any = None
    fp8_dtype_flavor: str | None = None
    dequantize: bool = False
    run_compressed: bool | None = None
    version: str = ""

    @field_validator("transform_config", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return value or None

    def as_run(self, scheme: Scheme) -> Scheme:
        """The scheme as transformers runs it: without rounded inputs where it multiplies the weights out while it loads.

        Raises ValueError for the older word `run_compressed: false`, under which its releases differ.
        """
        if scheme.input is None or self.dequantize:
            return Scheme(scheme.weight)
        if self.run_compressed is False:
            raise ValueError("run_compressed false, under which tools round inputs or not")
        return scheme

    @property
    def omits_order(self) -> bool:
        """Whether the writer left out a weight_g_idx that nobody calibrated; of those that state a version, up to 0.11."""
        return re.match(r"0\.([0-9]|1[01])\b", self.version) is not None

    @cached_property
    def groups(self) -> dict[str, Scope | Preset]:
        """config_groups by name."""
        return {name: entry if isinstance(entry, Scope) else Preset(name=name, targets=entry)
                for name, entry in self.config_groups.items()}  # fmt: skip

    @cached_property
    def _targets(self) -> list[tuple[str, str]]:
        """Targets and the groups that they are of, in the order in which the library tries them, which is not that of the
        config: names, then regular expressions, each by the alphabet. Of two groups with one target the last has it."""
        last = {target: name for name, group in self.groups.items() for target in group.targets}
        return sorted(last.items(), key=lambda item: ("re:" in item[0], item[0]))

    def scope(self, module: str, matches: Callable[[str, str], bool]) -> tuple[Scope | Preset | None, str]:
        """The module's group and its name; or None and why. `ignore` wins, then names, then the module's class.

        matches: whether a regular expression (without its `re:`) matches a name.
        """

        def hit(pattern: str) -> bool:
            return matches(pattern[3:], module) if pattern.startswith("re:") else pattern == module

        own_class = _class_of(module)
        for pattern in self.ignore or ():
            if pattern == own_class or hit(pattern):
                return None, f"in the ignore list as {pattern!r}"
        by_name = (name for target, name in self._targets if hit(target))
        by_class = (name for target, name in self._targets if target == own_class)
        found = next(by_name, None) or next(by_class, None)
        return (
            (None, "no config group targets it") if found is None else (self.groups[found], f"config group {found!r}")
        )


def _class_of(module: str) -> str:
    """The class that a target may name; headers do not tell it, names do."""
    return "Embedding" if is_embedding(module) else "Linear"
