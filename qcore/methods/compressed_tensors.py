"""compressed-tensors as LLM Compressor writes it.

    pack-quantized        weight_packed int32 [N, ceil(K bits / 32)], codes q + 2^(bits-1) as a little-endian bit stream
                          along K; weight_shape int64 [2]; weight_zero_point int32 [ceil(N bits / 32), G], along N
    int-quantized         weight int8 [N, K], one code a byte
    float-quantized       weight float8_e4m3fn [N, K]
    nvfp4-pack-quantized  weight_packed uint8 [N, K / 2], e2m1, first code low; weight_scale e4m3 [N, K / 16];
                          weight_global_scale f32 [1], which divides; so does input_global_scale
    mxfp4-, mxfp6-pack-   weight_packed uint8 [N, K bits / 8], e2m1 or e2m3; weight_scale uint8 [N, K / 32] (e8m0)
    mxfp8-quantized       weight float8_e4m3fn [N, K]; weight_scale uint8 [N, K / 32] (e8m0)
    the others            weight_scale [1] | [N, 1] | [N, G] | [ceil(N / r), ceil(K / c)]; weight_zero_point;
                          weight_g_idx (act-order); input_scale, input_zero_point (static activations)

w = (q - z) * s. Source: the compressed-tensors library (quantization/quant_args.py, compressors/); docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.kv_scales import declared_scheme, unknown_kv_cache
from qcore.checkpoint.patterns import check_count, matches
from qcore.checkpoint.settings import check
from qcore.elements import Float, Group, PerChannel, PerTensor, scale_shape
from qcore.layouts import compressed_writer
from qcore.layouts.compressed_config import CompressedConfig, Preset, Scope
from qcore.method import (
    PLAIN_FLOATS,
    SCALE_DTYPES,
    CheckpointFiles,
    Method,
    ModulePlan,
    finite,
    read_scale,
    require_tensor,
    signed_codes,
)
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.kv_scales import KvScales
    from qcore.tensor import LayerTensors

_FORMATS = (*compressed_writer.LAYOUTS, "mixed-precision", "dense")
_SCALE_DTYPES = SCALE_DTYPES["float"]


class CompressedTensors(Method):
    name = "compressed-tensors"
    quant_methods = ("compressed-tensors",)
    variants = _FORMATS
    written = compressed_writer.LAYOUTS
    embeddings = True
    parts = frozenset(
        [
            "weight",
            "weight_packed",
            "weight_shape",
            "weight_scale",
            "weight_global_scale",
            "input_global_scale",
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
        for name, group in config.groups.items():
            if isinstance(group, Scope) and group.weights is None and group.input_activations:
                # of attention: queries are quantized too
                raise unknown_kv_cache(files, "config_groups", f"{name!r}, which quantizes attention")
        if config.attention_input_activations:
            raise unknown_kv_cache(files, "attention_input_activations", "queries in 8 bits")
        given = config.kv_cache_scheme
        if given is None or config.dequantize:
            return None
        stated = given.model_dump() | {"strategy": given.stated_strategy}
        return declared_scheme(files, "kv_cache_scheme", stated)

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
            if isinstance(group, Scope) and group.weights is None:
                if group.input_activations is not None or group.output_activations is not None:
                    raise self._variant(files, f"config_groups ({reason})", "quantized activations of plain weights")
                group = None
            if group is None and stored:
                raise bad_file("bad-field", f"{module} is stored quantized, but the config does not cover it",
                               file=files.quantization_file, field="quantization_config.config_groups",
                               found=reason, expected=f"a target that matches {module}")  # fmt: skip
            if group is None or not stored:
                if group is not None and f"{module}.weight_scale" in tensors:
                    raise self._variant(
                        files, "quantization_status", f"{config.quantization_status}, plain weights with scales"
                    )
                if isinstance(group, Scope) and group.runs_plain(config.quantization_status):
                    raise self._variant(
                        files, f"config_groups ({reason})", "plain weights that are rounded at run time"
                    )
                why = reason if group is None else f"stored unquantized although {reason} targets it"
                plan[module] = ModulePlan(None, why, (info.shape[0], info.shape[1]))
                continue
            scheme = self._scheme(files, group, reason, module)
            plan[module] = ModulePlan(scheme, reason, self._check(files, module, scheme))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.tensor import LayerTensors, QuantizedTensor

        config = self._config(files)
        group, reason = self._scope(files, config, module)
        assert group is not None, f"{module} is not quantized"
        scheme = self._scheme(files, group, reason, module)
        shape = self._check(files, module, scheme)
        rows, columns = self._true_shape(files, module, scheme.weight) or shape
        scales = self._scales(files, module, scheme.weight)
        zeros = self._zeros(files, module, scheme.weight, rows) if scheme.weight.zero else None
        index = self._part(files, module, "weight_g_idx") if scheme.weight.ordered else None
        if index is not None and bool((index == -1).all()):  # no calibration has put columns into another order
            index, scheme = None, replace(scheme, weight=replace(scheme.weight, ordered=False))
        if index is not None:
            groups = scales[0].shape[1]
            if bool(((index < 0) | (index >= groups)).any()):
                raise bad_file("bad-content", "a group index is out of range", file=files.path,
                               tensor=f"{module}.weight_g_idx", field="values",
                               found=f"{int(index.min())} to {int(index.max())}", expected=f"0 to {groups - 1}")  # fmt: skip
            index = index.int()
        codes = self._codes(files, module, scheme.weight, columns)
        input_scale, input_zero = (self._part(files, module, part) for part in ("input_scale", "input_zero_point"))
        if scheme.weight.zero is None:
            self._no_zeros(files, f"{module}.weight_zero_point")
        if scheme.input is not None and scheme.input.zero is None:
            self._no_zeros(files, f"{module}.input_zero_point")
            input_zero = None
        if scheme.input is not None and len(scheme.input.scales) > 1:
            input_scale = self._divisor(files, f"{module}.input_global_scale")
        return LayerTensors(
            QuantizedTensor(scheme, (rows, columns), codes, scales, zeros, index),
            files.source.read(bias) if (bias := f"{module}.bias") in files.source.tensors else None,
            input_scale,
            input_zero,
        )

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        return compressed_writer.config_of(plan, variant)

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return compressed_writer.pack_layer(module, layer, config)

    def encode_kv_cache(
        self, scheme: TensorScheme, scales: Mapping[str, KvScales]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return compressed_writer.kv_cache_of(scheme, scales)

    def _config(self, files: CheckpointFiles) -> CompressedConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> CompressedConfig:
        assert files.quantization is not None
        config = check(CompressedConfig, files.quantization, file=files.quantization_file)
        targets = (group.targets if isinstance(group, Scope) else group for group in config.config_groups.values())
        patterns = (
            entry for entries in (config.ignore, *targets) for entry in entries or () if entry.startswith("re:")
        )
        check_count(patterns, file=files.quantization_file, field="quantization_config")
        for field, found in (
            ("format", config.format if config.format not in _FORMATS else None),
            ("sparsity_config.format", (config.sparsity_config or {}).get("format", "dense")),
            ("transform_config", config.transform_config and config.transform_config.online),
            ("moe_sparsity_config", config.moe_sparsity_config),
            ("fp8_dtype_flavor", config.fp8_dtype_flavor not in (None, "float8_e4m3fn") and config.fp8_dtype_flavor),
        ):
            if found and found != "dense":
                raise self._variant(files, field, found)
        return config

    def _variant(self, files: CheckpointFiles, field: str, found: object) -> Refused:
        return Refused(
            Refusal(
                "unknown-variant", "notimpl", str(files.path), "this variant of compressed-tensors is not read yet",
                f"found {found}, expected one of {', '.join(_FORMATS)}",
                "Quantize to a preset of LLM Compressor such as W4A16, INT8, FP8_DYNAMIC or NVFP4.",
                str(files.quantization_file), field=f"quantization_config.{field}",
            )
        )  # fmt: skip

    def _scope(
        self, files: CheckpointFiles, config: CompressedConfig, module: str
    ) -> tuple[Scope | Preset | None, str]:
        def regex(pattern: str, name: str) -> bool:
            return matches(pattern, name, file=files.quantization_file, field="quantization_config")

        return config.scope(module, regex)

    def _scheme(self, files: CheckpointFiles, group: Scope | Preset, name: str, module: str) -> Scheme:
        config = self._config(files)
        layout = group.format or config.format
        if layout not in _FORMATS:
            raise self._variant(files, f"config_groups ({name}).format", layout)
        try:
            scheme = config.as_run(group.scheme())
        except ValueError as error:
            raise self._variant(files, f"config_groups ({name})", error) from error
        if scheme.weight.ordered and config.omits_order and f"{module}.weight_g_idx" not in files.source.tensors:
            return replace(scheme, weight=replace(scheme.weight, ordered=False))
        return scheme

    def _check(self, files: CheckpointFiles, module: str, scheme: Scheme) -> tuple[int, int]:
        """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        weight, tensors = scheme.weight, files.source.tensors
        rows, columns = self._stored_shape(files, module, weight)
        fine = weight.scales[0]
        scale = require_tensor(files, f"{module}.weight_scale", dtypes=SCALE_DTYPES[fine.type])
        expected = scale_shape(fine.granularity, rows, columns)
        if not (isinstance(fine.granularity, PerTensor) and scale.shape in ((), (1,))):
            require_tensor(files, scale.name, shape=expected)
        if len(weight.scales) > 1:
            require_tensor(files, f"{module}.weight_global_scale", shape=(1,), dtypes=["F32"])
        if weight.zero:
            zeros = require_tensor(files, f"{module}.weight_zero_point", dtypes=["I8", "I32"])
            if self._packed_zeros(files, module, weight):
                counts = _word_counts(rows, weight.bits)
                if zeros.shape != (counts[1], expected[1]):
                    require_tensor(files, zeros.name, shape=(counts[0], expected[1]))
            elif not (isinstance(fine.granularity, PerTensor) and zeros.shape in ((), (1,))):
                require_tensor(files, zeros.name, shape=expected)
        if weight.ordered:
            require_tensor(files, f"{module}.weight_g_idx", shape=(columns,), dtypes=["I32", "I64"])
        elif f"{module}.weight_g_idx" in tensors:
            raise bad_file("unexpected-tensor", "an order of columns that the config does not declare", file=files.path,
                           tensor=f"{module}.weight_g_idx", expected="actorder group in the config")  # fmt: skip
        if scheme.input and not scheme.input.dynamic:
            self._one_number(files, f"{module}.input_scale", _SCALE_DTYPES)
            if scheme.input.zero:
                self._one_number(files, f"{module}.input_zero_point", ("I8", "I32"))
        if scheme.input and len(scheme.input.scales) > 1:
            require_tensor(files, f"{module}.input_global_scale", shape=(1,), dtypes=["F32"])
        return rows, columns

    def _one_number(self, files: CheckpointFiles, name: str, dtypes: tuple[str, ...]) -> None:
        info = require_tensor(files, name, dtypes=dtypes)
        if info.shape not in ((), (1,)):
            require_tensor(files, name, shape=(1,))

    def _packed_zeros(self, files: CheckpointFiles, module: str, weight: TensorScheme) -> bool:
        """The library packs zero points of channels and groups; before it did, all stood as int8, as others still do."""
        zeros = files.source.tensors[f"{module}.weight_zero_point"]
        packs = isinstance(weight.scales[0].granularity, Group | PerChannel)
        return packs and zeros.dtype == "I32" and f"{module}.weight_packed" in files.source.tensors

    def _no_zeros(self, files: CheckpointFiles, name: str) -> None:
        """Older writers store the zero points of symmetric codes, which are 0. Raises Refused (bad-content)."""
        if name not in files.source.tensors:
            return
        zeros = files.source.read(name)
        if bool(zeros.float().any()):
            raise bad_file("bad-content", "a symmetric tensor has a zero point", file=files.path, tensor=name,
                           field="values", found=zeros.float().flatten()[:4].tolist(), expected="0")  # fmt: skip

    def _stored_shape(self, files: CheckpointFiles, module: str, weight: TensorScheme) -> tuple[int, int]:
        """[N, K] of the codes. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        floats, packed = isinstance(weight.element, Float), files.source.tensors.get(f"{module}.weight_packed")
        if packed is None or (floats and weight.bits == 8):
            info = require_tensor(files, f"{module}.weight", dtypes=["F8_E4M3" if floats else "I8"])
            return info.shape[0], info.shape[1]
        require_tensor(files, packed.name, dtypes=["U8" if floats else "I32"])
        if floats:
            if packed.shape[1] * 8 % (weight.bits * 4):
                raise bad_file("bad-shape", "rows of packed floats are whole", file=packed.file, tensor=packed.name,
                               field="shape", found=list(packed.shape),
                               expected=f"a multiple of {weight.bits // 2} bytes")  # fmt: skip
            return packed.shape[0], packed.shape[1] * 8 // weight.bits
        require_tensor(files, f"{module}.weight_shape", shape=(2,), dtypes=["I64", "I32"])
        return self._packed_shape(files, module, weight)

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
        if packed is None or isinstance(weight.element, Float):
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

        if isinstance(weight.element, Float) and weight.bits < 8:
            return files.source.read(f"{module}.weight_packed")
        if f"{module}.weight_packed" not in files.source.tensors:
            codes = files.source.read(f"{module}.weight")
            if isinstance(weight.element, Float) or (weight.bits == 8 and weight.zero is None):
                return codes
            signed_codes(files, f"{module}.weight", codes, weight.bits)
            return pack((codes.to(torch.int16) + (1 << (weight.bits - 1))).to(torch.uint8), weight.bits)
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
        if self._packed_zeros(files, module, weight):
            stream = stored.t().flatten().view(torch.uint8).reshape(stored.shape[1], -1)
            dense = stored.shape[0] == _word_counts(rows, weight.bits)[0]
            codes = unpack(stream, weight.bits, rows) if dense else _unpack_words(stream, weight.bits)[:, :rows]
            return codes.t().contiguous()
        signed_codes(files, f"{module}.weight_zero_point", stored, weight.bits)
        shifted = (stored.to(torch.int16) + (1 << (weight.bits - 1))).to(torch.uint8)
        return shifted.reshape(1, 1) if shifted.numel() == 1 else shifted

    def _scales(self, files: CheckpointFiles, module: str, weight: TensorScheme) -> tuple[torch.Tensor, ...]:
        fine = read_scale(files, f"{module}.weight_scale", weight.scales[0].type)
        if fine.numel() == 1:
            fine = fine.reshape(1, 1)
        if len(weight.scales) == 1:
            return (fine,)
        return fine, self._divisor(files, f"{module}.weight_global_scale").reshape(1, 1)

    def _divisor(self, files: CheckpointFiles, name: str) -> torch.Tensor:
        """A global scale, which divides, as float64 [1] to multiply with: s / g is then exact when rounded to float32."""
        stored = read_scale(files, name)
        if not bool((stored > 0).all()):
            raise bad_file("bad-content", "a global scale divides, and is positive", file=files.source.tensors[name].file,
                           tensor=name, field="values", found=float(stored.min()), expected="a positive number")  # fmt: skip
        return 1 / stored.double()

    def _part(self, files: CheckpointFiles, module: str, part: str) -> torch.Tensor | None:
        name = f"{module}.{part}"
        if name not in files.source.tensors:
            return None
        tensor = files.source.read(name)
        return finite(files, name, tensor) if part.endswith("scale") else tensor


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
