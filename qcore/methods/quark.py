"""AMD Quark's exports: fp8, int8, 4-bit integers in AWQ's order, MX and NVFP4, with numbers of their own for some layers.

    fp8_e4m3, fp8_e5m2  weight [N, K]; weight_scale one number, [N] or a number a block; input_scale where inputs are static
    int8, uint8, int4,  qcore/layouts/quark_integers.py; symmetric or not, int4 and int8 in two's complement
    uint4
    fp4, fp6_*          weight uint8 [N, K bits / 8], first code low; weight_scale uint8 [N, K / 32] (e8m0)
    [fp4, fp8_e4m3]     NVFP4: weight_scale e4m3 [N, K / 16], weight_scale_2 and input_scale_2 one number
    [fp8_e4m3, int4]    W4A8: int4 of fp8: weight_scale one number, weight_scale_2 [N]

w = (q - z) * weight_scale (* weight_scale_2). Read from Quark's exporter and its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.kv_scales import unknown_kv_cache
from qcore.checkpoint.patterns import check_count, matches, wildcard
from qcore.checkpoint.settings import check
from qcore.elements import Int
from qcore.layouts import quark_writer
from qcore.layouts.quark_config import KINDS, LayerSpec, QuarkConfig, Specs, input_scheme, weight_scheme
from qcore.layouts.quark_integers import integer_shape, no_zero_points, read_integers
from qcore.layouts.scaled import Names, read_layer, shape_of
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, is_embedding
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.kv_scales import KvScales
    from qcore.tensor import LayerTensors

_NAMES = Names(input_whole="input_scale_2")


class Quark(Method):
    name = "quark"
    quant_methods = ("quark",)
    variants = (*KINDS, "nvfp4", "w4a8")
    parts = frozenset(
        [
            "weight",
            "weight_scale",
            "weight_scale_2",
            "weight_zero_point",
            "weight_zero_point_2",
            "input_scale",
            "input_scale_2",
            "input_zero_point",
            "input_zero_point_2",
            "bias",
            "output_scale",
        ]
    )

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).version or ""

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config, plan = self._config(files), {}
        for name in files.source.tensors:
            module, _, part = name.rpartition(".")
            if part == "weight_scale":
                scheme, reason = self._scheme(files, module)
                plan[module] = ModulePlan(scheme, reason, self._shape(files, module, scheme))
        if not plan:
            raise bad_file("missing-tensor", "the config says Quark, but no tensor is named *.weight_scale",
                           file=files.path, field="quantization_config.quant_method")  # fmt: skip
        for module, entry in dense_modules(files.source.tensors, "").items():
            if module in plan:
                continue
            named = next((skip for skip in config.exclude or () if _names(files, skip, module)), "")
            spec = self._spec(files, module)[0]
            if not named and spec.weight is None and spec.input_tensors is not None and not is_embedding(module):
                raise self._variant(files, "input_tensors", f"quantized inputs of {module}, whose weight is plain")
            plan[module] = ModulePlan(None, f"exclude names {named!r}" if named else "stored unquantized", entry.shape)
        return plan

    def kv_cache(self, files: CheckpointFiles) -> TensorScheme | None:
        config = self._config(files)
        if config.softmax_quant_spec is not None:
            raise unknown_kv_cache(
                files, "softmax_quant_spec", f"attention probabilities in {config.softmax_quant_spec}"
            )
        layers = {name: spec for name, spec in (config.layer_quant_config or {}).items() if _of_cache(name)}
        declared = bool(config.export.kv_cache_group)
        for name, spec in (*(config.kv_cache_quant_config or {}).items(), *layers.items()):
            for output in spec.outputs:
                if name.endswith("q_proj"):
                    raise unknown_kv_cache(files, "layer_quant_config", f"{name!r}, queries in {output}")
                if str(output).strip() not in ("", "fp8_e4m3 per_tensor"):
                    raise unknown_kv_cache(files, "kv_cache_quant_config", str(output))
                declared = True
        return TensorScheme.parse("fp8-tensor") if declared else None

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        scheme, _ = self._scheme(files, module)
        shape = self._shape(files, module, scheme)
        no_zero_points(files, module, scheme)
        if not isinstance(scheme.weight.element, Int):
            return read_layer(files, module, scheme, _NAMES)
        reorder = self._config(files).export.pack_method == "reorder"
        return read_integers(files, module, scheme, shape, signed=self._signed(files, module), reorder=reorder)

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """global_quant_config is the commonest scheme; layer_quant_config has the layers that differ by name."""
        return quark_writer.config_of(plan)

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return quark_writer.pack_layer(module, layer)

    def encode_kv_cache(
        self, scheme: TensorScheme, scales: Mapping[str, KvScales]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return quark_writer.kv_cache_of(scheme, scales)

    def _config(self, files: CheckpointFiles) -> QuarkConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> QuarkConfig:
        config = check(QuarkConfig, files.quantization or {}, file=files.quantization_file)
        if config.export.weight_format != "real_quantized":
            found = f"weights that are {config.export.weight_format}, not codes"
            raise self._variant(files, "export.weight_format", found)
        if other := (config.layer_type_quant_config or {}).keys() - {"Linear"}:
            raise self._variant(files, "layer_type_quant_config", f"layers of type {', '.join(sorted(other))}")
        if online := [part for algorithm in config.algorithms for part in algorithm.at_run_time]:
            raise self._variant(files, "algo_config", f"inputs that layers transform themselves ({', '.join(online)})")
        patterns = [*(config.layer_quant_config or {})]
        for field, entries in (("exclude", config.exclude or []), ("layer_quant_config", patterns)):
            where: dict[str, Any] = {"file": files.quantization_file, "field": f"quantization_config.{field}"}
            check_count(entries, wildcards=True, **where)
            check_count((entry for entry in entries if entry.startswith("re:")), **where)
        return config

    def _spec(self, files: CheckpointFiles, module: str) -> tuple[LayerSpec, str]:
        """What is stated for the module, and where: a pattern of layer_quant_config, or the type of linear layers."""
        config = self._config(files)
        where: dict[str, Any] = {"file": files.quantization_file, "field": "quantization_config.layer_quant_config"}
        for pattern, spec in (config.layer_quant_config or {}).items():
            if wildcard(pattern, module, **where):
                return spec, f"layer_quant_config {pattern!r}"
        if typed := (config.layer_type_quant_config or {}).get("Linear"):
            return typed, "layer_type_quant_config 'Linear'"
        return config.global_quant_config, "global_quant_config"

    def _scheme(self, files: CheckpointFiles, module: str) -> tuple[Scheme, str]:
        """The module's scheme, and where it is stated. Raises Refused (unknown-variant) where it is not read."""
        spec, where = self._spec(files, module)
        weight, given = weight_scheme(spec.weight), None
        if spec.output_tensors is not None and not _of_cache(module):
            raise self._variant(files, "output_tensors", f"outputs of {module}, {spec.output_tensors}")
        if weight is None:
            raise self._variant(files, "weight", _told(spec.weight))
        if spec.bias is not None and f"{module}.bias" in files.source.tensors:
            raise self._variant(files, "bias", f"a quantized bias of {module}")
        if spec.input_tensors is not None and (given := input_scheme(spec.input_tensors)) is None:
            raise self._variant(files, "input_tensors", _told(spec.input_tensors))
        return Scheme(weight, given), where

    def _signed(self, files: CheckpointFiles, module: str) -> bool:
        """Whether integer codes are stored in two's complement."""
        specs = self._spec(files, module)[0].weight
        last = specs[-1] if isinstance(specs, list) else specs
        return last is not None and last.dtype.startswith("int")

    def _variant(self, files: CheckpointFiles, field: str, found: str) -> Refused:
        return Refused(
            Refusal("unknown-variant", "notimpl", str(files.path), "this scheme of Quark is not read yet",
                    f"found {found}, expected {', '.join(self.variants)}", "Export the model in one of these.",
                    str(files.quantization_file), field=f"quantization_config.{field}")
        )  # fmt: skip

    def _shape(self, files: CheckpointFiles, module: str, scheme: Scheme) -> tuple[int, int]:
        """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        if isinstance(scheme.weight.element, Int):
            return integer_shape(files, module, scheme, signed=self._signed(files, module))
        return shape_of(files, module, scheme, _NAMES)


def _of_cache(name: str) -> bool:
    """Whether a projection, or a pattern of some, makes queries, keys or values, whose outputs are quantized for attention."""
    return name.endswith(("k_proj", "v_proj", "q_proj", "qkv_proj", "kv_proj", "query_key_value", "qkv", "Wqkv"))


def _told(specs: Specs) -> str:
    if isinstance(specs, list):
        return " of ".join(f"{spec.dtype} {spec.qscheme}" for spec in specs) or "nothing"
    return str(specs) if specs else "none"


def _names(files: CheckpointFiles, entry: str, module: str) -> bool:
    """exclude's rule: a name, wildcards, or a regular expression after `re:`."""
    if entry.startswith("re:"):
        return matches(entry[3:], module, file=files.quantization_file, field="quantization_config.exclude")
    return wildcard(entry, module, file=files.quantization_file, field="quantization_config.exclude")


METHOD = Quark()
