"""GPTQ as AutoGPTQ, GPTQModel and optimum write it: qweight, qzeros, scales and g_idx.

    qweight  int32 [ceil(K bits / 32), N]   codes as a little-endian bit stream along K
    qzeros   int32 [G, ceil(N bits / 32)]   zero points along N; v1 stores z - 1, v2 (`gptq_v2`) stores z
    scales   f16 or bf16 [G, N]
    g_idx    int32 [K], optional            the group of each input channel (act-order)

w[n, k] = (q - z[g(k), n]) * s[g(k), n]. Read from AutoGPTQ's and GPTQModel's layers; docs/formats.md has the details.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field

from qcore.checkpoint.patterns import matches
from qcore.checkpoint.settings import Settings, check
from qcore.elements import Granularity, Group, PerChannel
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, finite, require_tensor
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_BITS = (2, 3, 4, 8)
_OTHER_LAYOUTS = {
    "marlin": "serialized Marlin",
    "marlin_24": "serialized 2:4 Marlin",
    "bitblas": "serialized BitBLAS",
    "gptq_p": "GPTQModel's planar layout",
}


class GptqConfig(Settings):
    """The keys that decide what the tensors mean; GPTQModel's `format` and optimum's spellings included."""

    bits: int
    group_size: int = Field(ge=-1)
    desc_act: bool = False
    sym: bool = True
    lm_head: bool = False
    checkpoint_format: str = Field("gptq", validation_alias=AliasChoices("checkpoint_format", "format"))
    pack_dtype: str = "int32"
    is_marlin_format: bool = False
    is_bitblas_format: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None
    modules_in_block_to_quantize: list[Any] | None = None


class ModuleConfig(Settings):
    """One module's numbers, after `dynamic` overrides."""

    bits: int
    group_size: int = Field(ge=-1)
    desc_act: bool
    sym: bool

    def scheme(self) -> Scheme:
        # One group for the whole row cannot be reordered.
        granularity: Granularity = Group(self.group_size) if self.group_size > 0 else PerChannel()
        ordered = self.desc_act and self.group_size > 0
        return Scheme(integer_weight(self.bits, granularity, symmetric=self.sym, ordered=ordered))


class Gptq(Method):
    name = "gptq"
    quant_methods = ("gptq",)
    side_files = ("quantize_config.json",)
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx", "bias"})

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).checkpoint_format

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config = self._config(files)
        tensors = files.source.tensors
        quantized = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        if not quantized:
            raise bad_file("missing-tensor", "the config says GPTQ, but no tensor is named *.qweight", file=files.path)
        plan = {}
        for module in quantized:
            settings, pattern = self._module(files, config, module)
            shape = self._check_shapes(files, module, settings)
            reason = f"dynamic pattern {pattern!r}" if pattern else "quantization_config"
            plan[module] = ModulePlan(settings.scheme(), reason, shape)
        for module, entry in dense_modules(tensors, "").items():
            plan.setdefault(module, ModulePlan(None, _skip_reason(files, module, config), entry.shape))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        import torch

        from qcore.bits import unpack
        from qcore.tensor import LayerTensors, QuantizedTensor

        config = self._config(files)
        settings, _ = self._module(files, config, module)
        rows, columns = self._check_shapes(files, module, settings)
        read, bits = files.source.read, settings.bits
        stream = read(f"{module}.qweight").t().contiguous().view(torch.uint8)
        codes = stream[:, : (columns * bits + 7) // 8].contiguous()
        scales = finite(files, f"{module}.scales", read(f"{module}.scales").t().contiguous())
        zeros = unpack(read(f"{module}.qzeros").contiguous().view(torch.uint8), bits, rows).t().contiguous()
        if config.checkpoint_format == "gptq":
            zeros = (zeros + 1) & ((1 << bits) - 1)  # v1; field by field, so that no carry reaches the next zero point
        scheme = settings.scheme()
        index = self._index(files, module, settings, columns, scales.shape[1])
        if index is not None and not scheme.weight.ordered:
            scheme = Scheme(integer_weight(bits, Group(settings.group_size), symmetric=settings.sym, ordered=True))
        symmetric = bool((zeros == 1 << (bits - 1)).all())
        if settings.sym and not symmetric:  # the stored zero points are the truth, whatever the config says
            weight = scheme.weight
            scheme = Scheme(integer_weight(bits, weight.scales[0].granularity, symmetric=False, ordered=weight.ordered))
        if settings.sym and symmetric and bits == 8:
            codes = (codes ^ 0x80).view(torch.int8)
        weight_tensor = QuantizedTensor(
            scheme, (rows, columns), codes, (scales,), None if settings.sym and symmetric else zeros, index
        )
        bias = f"{module}.bias"
        return LayerTensors(weight_tensor, read(bias) if bias in files.source.tensors else None)

    def _config(self, files: CheckpointFiles) -> GptqConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> GptqConfig:
        assert files.quantization is not None
        config = check(GptqConfig, files.quantization, file=files.quantization_file)
        layout = config.checkpoint_format
        if config.is_marlin_format or config.is_bitblas_format:
            layout = "marlin" if config.is_marlin_format else "bitblas"
        if layout not in ("gptq", "gptq_v2") or config.pack_dtype != "int32":
            found = _OTHER_LAYOUTS.get(layout, layout) if config.pack_dtype == "int32" else config.pack_dtype
            raise Refused(
                Refusal(
                    "unknown-variant", "notimpl", str(files.path), "this layout of GPTQ is not read yet",
                    f"found {found}, expected checkpoint_format gptq or gptq_v2, packed in int32",
                    "Save the model again with GPTQModel as format=gptq.",
                    str(files.quantization_file), field="quantization_config.checkpoint_format",
                )
            )  # fmt: skip
        return config

    def _module(self, files: CheckpointFiles, config: GptqConfig, module: str) -> tuple[ModuleConfig, str]:
        """The module's numbers and the `dynamic` pattern that changed them, if any. The first match wins."""
        values: dict[str, Any] = config.model_dump(include={"bits", "group_size", "desc_act", "sym"})
        matched = ""
        for pattern, overrides in (config.dynamic or {}).items():
            if _matches(files, pattern, module):
                values |= {key: overrides[key] for key in values.keys() & overrides.keys()}
                matched = pattern
                break
        settings = check(ModuleConfig, values, file=files.quantization_file)
        if settings.bits not in _BITS or settings.group_size == 0:
            field, found = ("bits", settings.bits) if settings.group_size else ("group_size", 0)
            raise bad_file("bad-field", f"{module} has a value that GPTQ does not store",
                           file=files.quantization_file, field=f"quantization_config.{field}", found=found,
                           expected=f"bits in {_BITS}, group_size -1 or positive")  # fmt: skip
        return settings, matched

    def _check_shapes(self, files: CheckpointFiles, module: str, settings: ModuleConfig) -> tuple[int, int]:
        """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        bits = settings.bits
        qweight = require_tensor(files, f"{module}.qweight", dtypes=["I32"])
        scales = require_tensor(files, f"{module}.scales", dtypes=["F16", "BF16", "F32"])
        if len(qweight.shape) != 2 or len(scales.shape) != 2:
            raise bad_file("bad-shape", "qweight and scales are matrices", file=qweight.file, tensor=qweight.name,
                           field="shape", found=[qweight.shape, scales.shape], expected="two dimensions")  # fmt: skip
        groups, rows = scales.shape
        order = files.source.tensors.get(f"{module}.g_idx")
        # Where bits do not divide 32 or K is ragged, only g_idx has K itself.
        columns = order.shape[0] if order and len(order.shape) == 1 else qweight.shape[0] * 32 // bits
        group_size = settings.group_size if settings.group_size > 0 else max(columns, 1)
        require_tensor(files, f"{module}.qweight", shape=(-(-columns * bits // 32), rows))
        require_tensor(files, f"{module}.scales", shape=(-(-columns // group_size), rows))
        require_tensor(files, f"{module}.qzeros", shape=(groups, -(-rows * bits // 32)), dtypes=["I32"])
        if order:
            require_tensor(files, order.name, shape=(columns,), dtypes=["I32", "I64"])
        return rows, columns

    def _index(
        self, files: CheckpointFiles, module: str, settings: ModuleConfig, columns: int, groups: int
    ) -> torch.Tensor | None:
        """g_idx where it says more than k // group_size, or where the scheme promises it."""
        import torch

        if settings.group_size <= 0:
            return None
        name = f"{module}.g_idx"
        sequential = torch.arange(columns, dtype=torch.int32) // settings.group_size
        index = files.source.read(name).to(torch.int32) if name in files.source.tensors else sequential
        if bool(((index < 0) | (index >= groups)).any()):
            raise bad_file("bad-content", "a group index is out of range", file=files.source.tensors[name].file,
                           tensor=name, field="values", found=f"{int(index.min())} to {int(index.max())}",
                           expected=f"0 to {groups - 1}")  # fmt: skip
        return None if not settings.desc_act and torch.equal(index, sequential) else index


def _matches(files: CheckpointFiles, pattern: str, module: str) -> bool:
    """GPTQModel's rule: `+:` and `-:` are prefixes of the sign, the rest is a regular expression anchored at the start."""
    bare = pattern.removeprefix("+:").removeprefix("-:")
    return matches(bare, module, file=files.quantization_file, field="quantization_config.dynamic")


def _skip_reason(files: CheckpointFiles, module: str, config: GptqConfig) -> str:
    """Why a module is stored unquantized, in the config's words."""
    for pattern in config.dynamic or {}:
        if pattern.startswith("-:") and _matches(files, pattern, module):
            return f"excluded by dynamic pattern {pattern!r}"
    allowed = _flatten(config.modules_in_block_to_quantize)
    if allowed and not any(entry in module for entry in allowed):
        return "not in modules_in_block_to_quantize"
    if module.endswith("lm_head") and not config.lm_head:
        return "lm_head is false"
    return "stored unquantized"


def _flatten(entries: object) -> list[str]:
    if isinstance(entries, list):
        return [name for entry in entries for name in _flatten(entry)]
    return [entries] if isinstance(entries, str) else []


METHOD = Gptq()
