"""AWQ as AutoAWQ, AutoRound and GPTQModel write it: 4-bit codes with a zero point for each group.

    gemm   qweight int32 [K, N / 8]    eight output channels a word, nibble i being channel _ORDER[i]
           qzeros  int32 [G, N / 8]    zero points, packed alike and stored as they are
           scales  f16   [G, N]
    gemv   qweight int32 [N, K / 8]    eight input channels a word, in order
           qzeros  int32 [N, Z]        zero points along the groups, in order; Z is padded
           scales  f16   [N, 8 Z]

w[n, k] = (q - z[g(k), n]) * s[g(k), n], and q - 8 where there are no zero points. AWQ never reorders input channels; the
scales that it searches are folded into the layer before. Read from AutoAWQ's layers; docs/formats.md has the details.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import AliasChoices, Field, field_validator

from qcore.checkpoint.settings import Settings, check
from qcore.elements import Granularity, Group, PerChannel
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, finite, require_tensor
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output channel, of a word's eight, that each nibble holds from the lowest on (AutoAWQ's packing_utils)."""
_PLACES = tuple(_ORDER.index(channel) for channel in range(8))
_LAYOUTS = ("gemm", "gemv")
_CHANNELS = 1024
"""Output channels repacked at a time."""


class AwqConfig(Settings):
    """The keys that decide what the tensors mean, in the spellings of config.json and of the older side file."""

    bits: int = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(ge=-1, validation_alias=AliasChoices("group_size", "q_group_size"))
    zero_point: bool = True
    version: str = Field("gemm", validation_alias=AliasChoices("version", "checkpoint_format", "format"))
    modules_to_not_convert: list[str] | None = None

    @field_validator("version")
    @classmethod
    def _lower(cls, version: str) -> str:
        return version.lower()

    def scheme(self) -> Scheme:
        grid: Granularity = Group(self.group_size) if self.group_size > 0 else PerChannel()
        return Scheme(integer_weight(4, grid, symmetric=not self.zero_point))


class Awq(Method):
    name = "awq"
    quant_methods = ("awq",)
    variants = _LAYOUTS
    side_files = ("quant_config.json",)
    parts = frozenset({"qweight", "qzeros", "scales", "bias"})

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).version

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config, tensors = self._config(files), files.source.tensors
        quantized = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        if not quantized:
            raise bad_file("missing-tensor", "the config says AWQ, but no tensor is named *.qweight", file=files.path)
        plan = {
            module: ModulePlan(self._scheme(files, module), "quantization_config", self._check_shapes(files, module))
            for module in quantized
        }
        for module, entry in dense_modules(tensors, "").items():
            named = next((skip for skip in config.modules_to_not_convert or () if skip in module), None)
            reason = f"modules_to_not_convert names {named!r}" if named else "stored unquantized"
            plan.setdefault(module, ModulePlan(None, reason, entry.shape))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.tensor import LayerTensors, QuantizedTensor

        rows, columns = self._check_shapes(files, module)
        scheme, read = self._scheme(files, module), files.source.read
        if self._config(files).version == "gemm":
            codes = _pack_rows(read(f"{module}.qweight"), rows)
            scales = read(f"{module}.scales").t().contiguous()
        else:
            codes = _bytes(read(f"{module}.qweight"))
            scales = read(f"{module}.scales")[:, : self._groups(files, columns)].contiguous()
        zeros = self._zeros(files, module, columns) if scheme.weight.zero else None
        finite(files, f"{module}.scales", scales)
        bias = f"{module}.bias"
        weight = QuantizedTensor(scheme, (rows, columns), codes, (scales,), zeros)
        return LayerTensors(weight, read(bias) if bias in files.source.tensors else None)

    def _config(self, files: CheckpointFiles) -> AwqConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> AwqConfig:
        assert files.quantization is not None
        config = check(AwqConfig, files.quantization, file=files.quantization_file)
        if config.version not in _LAYOUTS:
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(files.path), "this layout of AWQ is not read yet",
                        f"found {config.version}, expected {' or '.join(_LAYOUTS)}",
                        'Save the model again with version "gemm".', str(files.quantization_file),
                        field="quantization_config.version")
            )  # fmt: skip
        if config.bits != 4 or config.group_size == 0:
            field, found = ("bits", config.bits) if config.bits != 4 else ("group_size", 0)
            raise bad_file("bad-field", "AWQ does not store this", file=files.quantization_file,
                           field=f"quantization_config.{field}", found=found,
                           expected="4 bits, group_size -1 or positive")  # fmt: skip
        return config

    def _scheme(self, files: CheckpointFiles, module: str) -> Scheme:
        """Zero points that are there are believed, whatever the config says; writers differ in what zero_point means."""
        config = self._config(files)
        stored = f"{module}.qzeros" in files.source.tensors
        return config.model_copy(update={"zero_point": stored}).scheme()

    def _groups(self, files: CheckpointFiles, columns: int) -> int:
        size = self._config(files).group_size
        return columns // size if size > 0 else 1

    def _check_shapes(self, files: CheckpointFiles, module: str) -> tuple[int, int]:
        """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        config = self._config(files)
        qweight = require_tensor(files, f"{module}.qweight", dtypes=["I32"])
        if len(qweight.shape) != 2:
            raise bad_file("bad-shape", "qweight is a matrix", file=qweight.file, tensor=qweight.name, field="shape",
                           found=list(qweight.shape), expected="two dimensions")  # fmt: skip
        outer, inner = qweight.shape
        rows, columns = (inner * 8, outer) if config.version == "gemm" else (outer, inner * 8)
        if config.group_size > 0 and columns % config.group_size:
            raise bad_file("bad-shape", "groups do not divide the input channels", file=qweight.file,
                           tensor=qweight.name, field="shape", found=f"{columns} channels",
                           expected=f"a multiple of {config.group_size}")  # fmt: skip
        groups = self._groups(files, columns)
        if config.version == "gemm":
            scales, zeros = (groups, rows), (groups, rows // 8)
        else:
            words = _padded_words(groups, config.group_size)
            scales, zeros = (rows, words * 8), (rows, words)
        require_tensor(files, f"{module}.scales", shape=scales, dtypes=["F16", "BF16", "F32"])
        if f"{module}.qzeros" in files.source.tensors or config.zero_point:
            require_tensor(files, f"{module}.qzeros", shape=zeros, dtypes=["I32"])
        return rows, columns

    def _zeros(self, files: CheckpointFiles, module: str, columns: int) -> torch.Tensor:
        """uint8 [N, G]"""
        nibbles = _nibbles(files.source.read(f"{module}.qzeros"))
        if self._config(files).version == "gemm":
            return nibbles[..., list(_PLACES)].flatten(1).t().contiguous()
        return nibbles.flatten(1)[:, : self._groups(files, columns)].contiguous()


def _padded_words(groups: int, group_size: int) -> int:
    """Words of a gemv row of zero points: rounded up to what its kernel reads at once (AutoAWQ's calculate_zeros_width)."""
    unit = 1 if group_size >= 128 or group_size <= 0 else {64: 2, 32: 4}.get(group_size, 1)
    return math.ceil(groups / (8 * unit)) * unit


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 [A, B] -> uint8 [A, 4 B], lowest byte first."""
    import torch

    return words.contiguous().view(torch.uint8)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [A, B] -> uint8 [A, B, 8], lowest nibble first."""
    import torch

    stored = _bytes(words)
    return torch.stack([stored & 15, stored >> 4], -1).view(*words.shape, 8)


def _pack_rows(words: torch.Tensor, rows: int) -> torch.Tensor:
    """gemm's int32 [K, N / 8] -> uint8 [N, ceil(K / 2)], a block of output channels at a time."""
    import torch

    from qcore.bits import pack, packed_bytes

    codes = torch.empty(rows, packed_bytes(words.shape[0], 4), dtype=torch.uint8)
    for start in range(0, rows, _CHANNELS):
        stop = min(start + _CHANNELS, rows)
        block = _nibbles(words[:, start // 8 : stop // 8])[..., list(_PLACES)].flatten(1)
        codes[start:stop] = pack(block.t().contiguous(), 4)
    return codes


METHOD = Awq()
