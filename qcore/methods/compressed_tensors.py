"""compressed-tensors as LLM Compressor writes it: pack-, int-, float- and naive-quantized modules.

    pack-quantized   weight_packed int32 [N, ceil(K bits / 32)], codes q + 2^(bits-1) as a little-endian bit stream
                     along K; weight_shape int64 [2]; weight_zero_point int32 [ceil(N bits / 32), G], packed along N
    int-quantized    weight int8 [N, K], one code a byte
    float-quantized  weight float8_e4m3fn [N, K]
    all of them      weight_scale [1] | [N, 1] | [N, G] | [ceil(N / r), ceil(K / c)]; weight_zero_point;
                     weight_g_idx (act-order); input_scale, input_zero_point (static activations)

w = (q - z) * s. Source: the compressed-tensors library (quantization/quant_args.py, compressors/); docs/formats.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from qcore.checkpoint.kv_scales import declared_scheme, unknown_kv_cache
from qcore.checkpoint.patterns import matches
from qcore.checkpoint.settings import Settings, check
from qcore.elements import Float, Granularity, Group, Int, Level, PerChannel, PerTensor, PerToken, Tile, scale_shape
from qcore.method import PLAIN_FLOATS, CheckpointFiles, Method, ModulePlan, finite, is_embedding, require_tensor
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import PRESETS, Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_SCALE_DTYPES = ("F16", "BF16", "F32")


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

    @field_validator("block_structure", mode="before")
    @classmethod
    def _legacy_blocks(cls, value: object) -> object:
        return value.split("x") if isinstance(value, str) else value

    def tensor_scheme(self, *, weight: bool) -> TensorScheme:
        """Raises ValueError where no kernel's words describe it."""
        strategy = self.strategy or {None: "tensor", -1: "channel"}.get(self.group_size, "group")
        size = self.group_size or 0
        granularities: dict[str, Granularity | None] = {
            "tensor": PerTensor(),
            "channel": PerChannel(),
            "token": PerToken(),
            "group": Group(size) if size > 0 else None,
            "block": Tile(*self.block_structure) if self.block_structure and min(self.block_structure) > 0 else None,
        }
        granularity = granularities.get(strategy)
        if granularity is None or self.scale_dtype not in (None, *_TORCH_SCALES):
            raise ValueError(f"strategy {strategy} with group_size {self.group_size}, scale_dtype {self.scale_dtype}")
        if self.type == "float" and self.num_bits != 8:
            raise ValueError(f"{self.num_bits}-bit floats")
        # Weights come to the normal form: asymmetric codes are unsigned.
        signed = self.symmetric or not weight
        element = Float("e4m3fn") if self.type == "float" else Int(self.num_bits, signed)
        ordered = self.actorder in ("group", "dynamic", True) and isinstance(granularity, Group)
        zero = None if self.symmetric else "stored"
        levels = (Level(granularity),)
        return TensorScheme(element, levels, zero, ordered, dynamic=bool(self.dynamic))  # type: ignore[arg-type]


_TORCH_SCALES = ("torch.float16", "torch.bfloat16", "torch.float32")


class Scope(Settings):
    """One of config_groups: which modules, and how."""

    targets: list[str]
    weights: Arguments | None = None
    input_activations: Arguments | None = None
    output_activations: Arguments | None = None
    format: str | None = None


class CompressedConfig(Settings):
    config_groups: dict[str, Scope | list[str]] = Field(default_factory=dict)
    format: str = "dense"
    quantization_status: str = "compressed"
    ignore: list[str] = Field(default_factory=list)
    kv_cache_scheme: Arguments | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    version: str = ""


class CompressedTensors(Method):
    name = "compressed-tensors"
    quant_methods = ("compressed-tensors",)
    variants = _FORMATS
    parts = frozenset(
        [
            "weight",
            "weight_packed",
            "weight_shape",
            "weight_scale",
            "weight_zero_point",
            "weight_g_idx",
            "bias",
            "input_scale",
            "input_zero_point",
            "k_scale",
            "v_scale",
            "q_scale",
            "output_scale",
        ]
    )

    def format_version(self, files: CheckpointFiles) -> str:
        config = self._config(files)
        return " ".join(word for word in (config.format, config.version) if word)

    def kv_cache(self, files: CheckpointFiles) -> TensorScheme | None:
        config = self._config(files)
        for name, entry in config.config_groups.items():
            group = _scope(name, entry)
            if group.weights is None and group.input_activations:  # of attention: queries are quantized too
                raise unknown_kv_cache(files, "config_groups", f"{name!r}, which quantizes attention")
        given = config.kv_cache_scheme
        return None if given is None else declared_scheme(files, "kv_cache_scheme", given.model_dump())

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config = self._config(files)
        tensors = files.source.tensors
        plan = {}
        for name, info in tensors.items():
            module, _, part = name.rpartition(".")
            if part not in ("weight", "weight_packed") or len(info.shape) != 2:
                continue
            stored = part == "weight_packed" or info.dtype not in PLAIN_FLOATS
            group, reason = self._scope(files, config, module)
            if group is None and stored:
                raise bad_file("bad-field", f"{module} is stored quantized, but the config does not cover it",
                               file=files.quantization_file, field="quantization_config.config_groups",
                               found=reason, expected=f"a target that matches {module}")  # fmt: skip
            if group is None or not stored:
                why = reason if group is None else f"stored unquantized although {reason} targets it"
                plan[module] = ModulePlan(None, why, (info.shape[0], info.shape[1]))
                continue
            scheme = self._scheme(files, group, reason)
            plan[module] = ModulePlan(scheme, reason, self._check(files, module, scheme))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.tensor import LayerTensors, QuantizedTensor

        config = self._config(files)
        group, reason = self._scope(files, config, module)
        assert group is not None, f"{module} is not quantized"
        scheme = self._scheme(files, group, reason)
        shape = self._check(files, module, scheme)
        rows, columns = self._true_shape(files, module, scheme.weight) or shape
        scale = self._part(files, module, "weight_scale")
        assert scale is not None
        if scale.numel() == 1:
            scale = scale.reshape(1, 1)
        zeros = self._zeros(files, module, scheme.weight, rows) if scheme.weight.zero else None
        index = self._part(files, module, "weight_g_idx") if scheme.weight.ordered else None
        if index is not None:
            groups = scale.shape[1]
            if bool(((index < 0) | (index >= groups)).any()):
                raise bad_file("bad-content", "a group index is out of range", file=files.path,
                               tensor=f"{module}.weight_g_idx", field="values",
                               found=f"{int(index.min())} to {int(index.max())}", expected=f"0 to {groups - 1}")  # fmt: skip
            index = index.int()
        codes = self._codes(files, module, scheme.weight, columns)
        input_scale, input_zero = (self._part(files, module, part) for part in ("input_scale", "input_zero_point"))
        return LayerTensors(
            QuantizedTensor(scheme, (rows, columns), codes, (scale,), zeros, index),
            files.source.read(bias) if (bias := f"{module}.bias") in files.source.tensors else None,
            input_scale,
            input_zero,
        )

    def _config(self, files: CheckpointFiles) -> CompressedConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> CompressedConfig:
        assert files.quantization is not None
        config = check(CompressedConfig, files.quantization, file=files.quantization_file)
        for field, found in (
            ("format", config.format if config.format not in (*_FORMATS, "mixed-precision") else None),
            ("sparsity_config.format", (config.sparsity_config or {}).get("format", "dense")),
            ("transform_config", (config.transform_config or {}).get("config_groups")),
        ):
            if found and found != "dense":
                raise self._variant(files, field, found)
        return config

    def _variant(self, files: CheckpointFiles, field: str, found: object) -> Refused:
        return Refused(
            Refusal(
                "unknown-variant", "notimpl", str(files.path), "this variant of compressed-tensors is not read yet",
                f"found {found}, expected one of {', '.join(_FORMATS)}",
                "Quantize to W4A16, W8A16, INT8, FP8, FP8_DYNAMIC or FP8_BLOCK.",
                str(files.quantization_file), field=f"quantization_config.{field}",
            )
        )  # fmt: skip

    def _scope(self, files: CheckpointFiles, config: CompressedConfig, module: str) -> tuple[Scope | None, str]:
        """The module's group and its name; or None and why. `ignore` wins, then names, then the module's class."""

        def hit(pattern: str) -> bool:
            if not pattern.startswith("re:"):
                return pattern == module
            return matches(pattern[3:], module, file=files.quantization_file, field="quantization_config")

        for pattern in config.ignore:
            if hit(pattern):
                return None, f"in the ignore list as {pattern!r}"
        groups = {name: _scope(name, entry) for name, entry in config.config_groups.items()}
        for by_class in (False, True):
            for name, group in groups.items():
                for target in group.targets:
                    if (target == "Linear" and not is_embedding(module)) if by_class else hit(target):
                        return group, f"config group {name!r}"
        return None, "no config group targets it"

    def _scheme(self, files: CheckpointFiles, group: Scope, name: str) -> Scheme:
        layout = group.format or self._config(files).format
        if layout not in _FORMATS or group.output_activations or group.weights is None:
            found = layout if layout not in _FORMATS else "output_activations" if group.weights else "no weights"
            raise self._variant(files, f"config_groups ({name})", found)
        weight = self._tensor_scheme(files, group.weights, f"config_groups ({name}).weights", weight=True)
        given = group.input_activations
        if given is None:
            return Scheme(weight)
        return Scheme(
            weight, self._tensor_scheme(files, given, f"config_groups ({name}).input_activations", weight=False)
        )

    def _tensor_scheme(self, files: CheckpointFiles, given: Arguments, field: str, *, weight: bool) -> TensorScheme:
        try:
            return given.tensor_scheme(weight=weight)
        except ValueError as error:
            raise self._variant(files, field, str(error)) from error

    def _check(self, files: CheckpointFiles, module: str, scheme: Scheme) -> tuple[int, int]:
        """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        weight, tensors = scheme.weight, files.source.tensors
        packed = tensors.get(f"{module}.weight_packed")
        if packed is None:
            dtype = "F8_E4M3" if isinstance(weight.element, Float) else "I8"
            info = require_tensor(files, f"{module}.weight", dtypes=[dtype])
            rows, columns = info.shape
        else:
            if len(require_tensor(files, packed.name, dtypes=["I32"]).shape) != 2:
                raise bad_file("bad-shape", "packed weights are matrices", file=packed.file, tensor=packed.name,
                               field="shape", found=list(packed.shape), expected="two dimensions")  # fmt: skip
            require_tensor(files, f"{module}.weight_shape", shape=(2,), dtypes=["I64", "I32"])
            rows, columns = self._packed_shape(files, module, weight)
        scale = require_tensor(files, f"{module}.weight_scale", dtypes=_SCALE_DTYPES)
        granularity = weight.scales[0].granularity
        expected = scale_shape(granularity, rows, columns)
        if not (isinstance(granularity, PerTensor) and scale.shape in ((), (1,))):
            require_tensor(files, scale.name, shape=expected)
        if weight.zero:
            grid = expected if packed is None else (-(-rows * weight.bits // 32), expected[1])
            require_tensor(files, f"{module}.weight_zero_point", shape=grid, dtypes=["I8", "I32"])
        if weight.ordered:
            require_tensor(files, f"{module}.weight_g_idx", shape=(columns,), dtypes=["I32", "I64"])
        if scheme.input and not scheme.input.dynamic:
            require_tensor(files, f"{module}.input_scale", dtypes=_SCALE_DTYPES)
        return rows, columns

    def _packed_shape(self, files: CheckpointFiles, module: str, weight: TensorScheme) -> tuple[int, int]:
        """[N, K] as far as headers tell: K is ambiguous where rows are padded to a word. `decode` reads weight_shape."""
        rows, words = files.source.tensors[f"{module}.weight_packed"].shape
        granularity = weight.scales[0].granularity
        scale = files.source.tensors.get(f"{module}.weight_scale")
        if isinstance(granularity, Group) and scale is not None and len(scale.shape) == 2:
            columns = scale.shape[1] * granularity.size
            if words in _word_counts(columns, weight.bits):
                return rows, columns
        return rows, words * 32 // weight.bits

    def _true_shape(self, files: CheckpointFiles, module: str, weight: TensorScheme) -> tuple[int, int] | None:
        """What weight_shape says, checked against the packed words; None where weights are not packed."""
        packed = files.source.tensors.get(f"{module}.weight_packed")
        if packed is None:
            return None
        rows, columns = (int(size) for size in files.source.read(f"{module}.weight_shape"))
        if rows != packed.shape[0] or columns < 1 or packed.shape[1] not in _word_counts(columns, weight.bits):
            raise bad_file("bad-shape", "weight_shape disagrees with weight_packed", file=packed.file,
                           tensor=f"{module}.weight_shape", field="values", found=[rows, columns],
                           expected=f"the unpacked form of {list(packed.shape)}")  # fmt: skip
        return rows, columns

    def _codes(self, files: CheckpointFiles, module: str, weight: TensorScheme, columns: int) -> torch.Tensor:
        import torch

        from qcore.bits import pack, packed_bytes

        if f"{module}.weight_packed" not in files.source.tensors:
            codes = files.source.read(f"{module}.weight")
            if isinstance(weight.element, Float) or (weight.bits == 8 and weight.zero is None):
                return codes
            stored = (codes.view(torch.uint8) + (1 << (weight.bits - 1))) & ((1 << weight.bits) - 1)
            return pack(stored, weight.bits)
        stream = files.source.read(f"{module}.weight_packed").view(torch.uint8)
        bits = weight.bits
        if stream.shape[1] == _word_counts(columns, bits)[0] * 4:
            codes = stream[:, : packed_bytes(columns, bits)].contiguous()
        else:
            codes = pack(_unpack_words(stream, bits)[:, :columns], bits)
        return (codes ^ 0x80).view(torch.int8) if bits == 8 and weight.zero is None else codes

    def _zeros(self, files: CheckpointFiles, module: str, weight: TensorScheme, rows: int) -> torch.Tensor:
        """uint8 zero points on the scale of unsigned codes."""
        import torch

        from qcore.bits import unpack

        stored = files.source.read(f"{module}.weight_zero_point")
        if f"{module}.weight_packed" in files.source.tensors and stored.dtype == torch.int32:
            return unpack(stored.t().contiguous().view(torch.uint8), weight.bits, rows).t().contiguous()
        return (stored.to(torch.int16) + (1 << (weight.bits - 1))).to(torch.uint8)

    def _part(self, files: CheckpointFiles, module: str, part: str) -> torch.Tensor | None:
        name = f"{module}.{part}"
        if name not in files.source.tensors:
            return None
        tensor = files.source.read(name)
        return finite(files, name, tensor) if part.endswith("scale") else tensor


def _scope(name: str, entry: Scope | list[str]) -> Scope:
    """A config group; the short form maps a preset's name to its targets."""
    if isinstance(entry, Scope):
        return entry
    scheme = PRESETS.get(name)
    if scheme is None:
        return Scope(targets=entry)
    return Scope(targets=entry, weights=_arguments(scheme.weight), input_activations=_arguments(scheme.input))


def _arguments(scheme: TensorScheme | None) -> Arguments | None:
    """The arguments that a preset's tensor scheme stands for."""
    if scheme is None:
        return None
    granularity = scheme.scales[0].granularity
    strategies = {PerTensor: "tensor", PerChannel: "channel", PerToken: "token", Group: "group", Tile: "block"}
    return Arguments(
        num_bits=scheme.bits,
        type="float" if isinstance(scheme.element, Float) else "int",
        symmetric=scheme.zero is None,
        group_size=granularity.size if isinstance(granularity, Group) else None,
        strategy=strategies[type(granularity)],  # type: ignore[arg-type]
        block_structure=(granularity.rows, granularity.cols) if isinstance(granularity, Tile) else None,
        dynamic=scheme.dynamic,
    )


def _word_counts(columns: int, bits: int) -> tuple[int, int]:
    """Words of a packed row: dense since late 2025; before, a word held floor(32 / bits) codes and none crossed it."""
    return -(-columns * bits // 32), -(-columns // (32 // bits))


def _unpack_words(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, words * 4] bytes -> [N, words * floor(32 / bits)] codes."""
    import torch

    from qcore.bits import unpack

    words = stream.unflatten(1, (-1, 4))
    return unpack(words, bits, 32 // bits).flatten(1).to(torch.uint8)


METHOD = CompressedTensors()
