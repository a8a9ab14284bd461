"""fp8 as Intel Neural Compressor (INC) makes it: saved models, and plain models with its measurements beside them.

    saved      weight e4m3 or e5m2 [K, N], transposed; scale_weight [] | [N], scale_input []; quant_input.scale_inv is the
               reciprocal of scale_input; k_cache and v_cache have scales of their own
    qdq        the same, saved where inputs are quantized and dequantized again (`use_qdq`, as on a CPU): dequant_weights.scale
               and quant_input.scale
    measured   plain weights, a QUANT_CONFIG file (quant_config.json or quantization_config.json in the folder) and INC's
               measurement or scale files (qcore/checkpoint/inc_measurements.py); quantized while they are loaded

w = q * scale_weight, x = q * scale_input. A scale is max |x| / (largest * backoff), computed in `hp_dtype`; the backoff is 1/2
for weights and 1/4 for inputs, and METHODS says how it is rounded. `device_for_scales` chooses RANGES: how large an e4m3 may be
and which scales are exponent biases; where it is not stated, 448 is the largest, as for all e4m3fn here. With
`dynamic_quantization` inputs have scales of run time, and nothing was measured.
The config has no quant_method: it is known by its keys. Read from neural_compressor 3.10, torch/algorithms/fp8_quant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from qcore.checkpoint.inc_measurements import Node, caches, read_nodes
from qcore.checkpoint.patterns import check_count, matches
from qcore.checkpoint.settings import Settings, check
from qcore.checkpoint.source import TensorInfo
from qcore.elements import Float, Granularity, Level, PerChannel, PerTensor
from qcore.layouts import inc_writer
from qcore.layouts.inc_scales import METHODS, RANGES, Rounding, ScaleMethod, input_scheme, positive, rounded, searched
from qcore.layouts.inc_writer import FORMS
from qcore.method import (
    CheckpointFiles,
    Method,
    ModulePlan,
    dense_modules,
    finite,
    is_embedding,
    quantizable,
    require_tensor,
    stated_method,
)
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.kv_scales import KvScales
    from qcore.tensor import LayerTensors

_KEYS = ("fp8_config", "dump_stats_path", "scale_method", "observer")
"""Keys of INC's configs, one of which is always there."""
_KINDS = {"linear": frozenset(["linear"]), "cache": frozenset(["kvcache", "vllmkvcache"])}
"""INC's classes, in lower case, of what is quantized; that of a linear layer stands in the names of vLLM's kinds of it."""
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}  # fmt: skip
"""Layers that vLLM, for which most models are measured, has in one."""
_SIDE = re.compile(
    r"\.(quant_input(_\d)?|dequant_(output|weights))\.(scale(_inv)?|zero_point)$"
    r"|\.([kv]_cache|matmul_(qk|av)|softmax|fused_scaled_dot_product_attention)\.(\w+\.)?\w*scale\w*$"
)
"""Reciprocals, scales of caches, which are read elsewhere, and of attention's own products, which stay in 16 bits here."""
_FLOATS = ("F32", "BF16", "F16")
_FP8 = {"E4M3": ("F8_E4M3", "e4m3fn"), "E5M2": ("F8_E5M2", "e5m2")}


class Names(Settings):
    """An allowlist or a blocklist."""

    names: list[str] = Field(default_factory=list)
    types: list[str] = Field(default_factory=list)


class IncConfig(Settings):
    """The keys that decide the numbers."""

    mode: str = "QUANTIZE"
    observer: str = "maxabs"
    scale_method: str = "MAXABS_HW"
    fp8_config: Literal["E4M3", "E5M2"] = "E4M3"
    hp_dtype: Literal["BF16", "FP16", "FP32"] = "BF16"
    device_for_scales: str | None = None
    dump_stats_path: str = "stats"
    dynamic_quantization: bool = False
    ignore_modules_wo_measures: bool = False
    recalc_scales: bool = False
    scale_params: dict[str, Any] = Field(default_factory=dict)
    allowlist: Names = Field(default_factory=Names)
    blocklist: Names = Field(default_factory=Names)

    @field_validator("mode", "scale_method", "fp8_config", "hp_dtype", "device_for_scales", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value


class Inc(Method):
    name = "inc"
    quant_methods = ("inc",)
    variants = (*FORMS, "measured")
    written = tuple(FORMS)
    side_files = ("quant_config.json", "quantization_config.json")
    parts = frozenset({"weight", "bias", *FORMS["saved"]})

    def recognizes(self, files: CheckpointFiles) -> bool:
        config, stated = files.quantization or {}, stated_method(files.quantization)
        return stated in ("", "hooks", "inc") and "bits" not in config and any(key in config for key in _KEYS)

    def format_version(self, files: CheckpointFiles) -> str:
        return f"{_form(files) or 'measured'} {self._config(files).scale_method}"

    def kv_cache(self, files: CheckpointFiles) -> TensorScheme | None:
        cached = any(re.search(r"\.[kv]_cache\.", name) for name in files.source.tensors)
        measured = not _form(files) and bool(self.kv_scales(files))
        return TensorScheme(self._element(files), (Level(PerTensor()),)) if cached or measured else None

    def kv_scales(self, files: CheckpointFiles) -> dict[str, KvScales]:
        """Those of a saved model's tensors; or those that a cache's measured largest magnitudes give, as inputs have them."""
        from qcore.checkpoint.kv_scales import Side, both_sides

        if _form(files):
            return super().kv_scales(files)
        import torch

        nodes, are_scales = self._measured(files)
        how, dtype = METHODS[self._config(files).scale_method].input, _torch(self._config(files).hp_dtype)
        found: dict[str, dict[str, Side]] = {}
        for name, (attention, part) in caches(nodes).items():
            largest = nodes[name].input
            if largest is None or self._listed(files, name, "cache"):
                continue
            given = torch.tensor([largest], dtype=dtype)
            scale = positive(given) if are_scales else self._rounded(files, given, how, "input")
            found.setdefault(attention, {})[part] = Side(scale.float(), None, name)
        return {attention: both_sides(attention, sides) for attention, sides in found.items()}

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        plan: dict[str, ModulePlan] = {}
        form = _form(files)
        for name, info in files.source.tensors.items():
            if re.search(r"\.(weight|scale_\w+)_\d+_\d+$", name):
                raise self._variant(files, "world_size", f"the part {name} of one of several ranks")
            module, _, part = name.rpartition(".")
            if form and name.endswith(f".{FORMS[form][0]}"):
                module = name.removesuffix(f".{FORMS[form][0]}")
            elif part != "weight" or info.dtype not in ("F8_E4M3", "F8_E5M2"):
                continue
            if form:
                plan.setdefault(module, self._saved_entry(files, module, form))
        saved = bool(form)
        for module, entry in dense_modules(files.source.tensors, "stored unquantized").items():
            why = "" if saved or is_embedding(module) else self._kept(files, module)
            if saved or why or is_embedding(module):
                plan.setdefault(module, ModulePlan(None, why or entry.reason, entry.shape))
            else:
                grid = PerChannel() if self._method(files).channels else PerTensor()
                scheme = self._scheme(files, grid, entry.shape[1])
                plan[module] = ModulePlan(scheme, "quantized while loading, as the config asks", entry.shape)
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.tensor import TORCH_FLOATS, LayerTensors, QuantizedTensor

        read, tensors = files.source.read, files.source.tensors
        bias = read(f"{module}.bias") if f"{module}.bias" in tensors else None
        weight = read(f"{module}.weight")
        if form := _form(files):
            entry = self._saved_entry(files, module, form)
            assert entry.scheme is not None
            scale, *stored = (finite(files, n, read(n)) for n in self._scale_names(files, module, form))
            made = QuantizedTensor(entry.scheme, entry.shape, weight.t().contiguous(), (scale.reshape(-1, 1),))
            return LayerTensors(made, bias, input_scale=stored[0].reshape(1) if stored else None)
        weight = quantizable(weight, tensors[f"{module}.weight"]).to(_torch(self._config(files).hp_dtype))
        scale, given = self._scales(files, module, weight)
        element, largest = self._element(files), self._largest(files)
        codes = (weight.float() * (1 / scale).float()).clamp_(-largest, largest).to(TORCH_FLOATS[element.format])
        scheme = self._scheme(files, PerChannel() if self._method(files).channels else PerTensor(), weight.shape[1])
        made = QuantizedTensor(scheme, (weight.shape[0], weight.shape[1]), codes, (scale.float(),))
        return LayerTensors(made, bias, input_scale=None if given is None else given.float().reshape(1))

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """A saved model, as a Gaudi's or, with the variant qdq, as a CPU's."""
        return inc_writer.config_of(plan, variant or "saved")

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return inc_writer.pack_layer(module, layer, config)

    def encode_kv_cache(
        self, scheme: TensorScheme, scales: Mapping[str, KvScales]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return inc_writer.kv_cache_of(scheme, scales)

    def encode_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"quantization_config.json": dict(config)}

    def parameters(self, files: CheckpointFiles, plan: Mapping[str, ModulePlan]) -> dict[str, TensorInfo]:
        return {name: info for name, info in super().parameters(files, plan).items() if not _SIDE.search(name)}

    # --- What the config says ---

    def _config(self, files: CheckpointFiles) -> IncConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> IncConfig:
        found = dict(files.quantization or {})
        for old, new in (("whitelist", "allowlist"), ("blacklist", "blocklist")):
            found.setdefault(new, found.get(old) or {})
        if not isinstance(found.get("scale_method", ""), str):
            raise self._variant(files, "scale_method", "scales by layer")
        config = check(IncConfig, found, file=files.quantization_file)
        for name, entries in (("allowlist", config.allowlist), ("blocklist", config.blocklist)):
            check_count(entries.names, file=files.quantization_file, field=f"{name}.names")
        # INC writes its two types there; older ones took backoffs from it, which saved scales have in them already.
        params = set() if _form(files) else config.scale_params.keys() - {"hp_dtype", "lp_dtype"}
        for field, value, known in (
            ("mode", config.mode, config.mode in ("QUANTIZE", "LOAD", "AUTO")),
            ("observer", config.observer, config.observer in ("maxabs", "maxabs_per_channel")),
            ("scale_method", config.scale_method, bool(_form(files)) or config.scale_method in METHODS),
            ("device_for_scales", config.device_for_scales, config.device_for_scales in RANGES),
            ("dynamic_quantization", str(config.dynamic_quantization).lower(), _timely(config)),
            ("scale_params", ", ".join(sorted(params)), not params),
        ):
            if not known:
                raise self._variant(files, field, str(value))
        return config

    def _variant(self, files: CheckpointFiles, field: str, found: str) -> Refused:
        return Refused(
            Refusal("unknown-variant", "notimpl", str(files.path), "this form of INC's fp8 is not read yet",
                    f"found {field} {found}, expected mode QUANTIZE, maxabs scales, one of {', '.join(METHODS)}",
                    "Choose one of these scale methods, or save the model from one rank in INC's vllm format.",
                    str(files.quantization_file), field=field)
        )  # fmt: skip

    def _element(self, files: CheckpointFiles) -> Float:
        return Float(_FP8[self._config(files).fp8_config][1])  # type: ignore[arg-type]

    def _method(self, files: CheckpointFiles) -> ScaleMethod:
        return METHODS.get(self._config(files).scale_method) or METHODS["MAXABS_HW"]

    def _largest(self, files: CheckpointFiles) -> float:
        config = self._config(files)
        return RANGES[config.device_for_scales].largest if config.fp8_config == "E4M3" else 57344.0

    def _scheme(self, files: CheckpointFiles, grid: Granularity, columns: int) -> Scheme:
        element, dynamic = self._element(files), self._config(files).dynamic_quantization
        given = input_scheme(element, self._method(files), columns, dynamic=dynamic)
        return Scheme(TensorScheme(element, (Level(grid),)), given)

    def _scale_names(self, files: CheckpointFiles, module: str, form: str) -> list[str]:
        """Of the weight, and of the input where it is stored."""
        parts = FORMS[form][:1] if self._config(files).dynamic_quantization else FORMS[form]
        return [f"{module}.{part}" for part in parts]

    # --- Saved models ---

    def _saved_entry(self, files: CheckpointFiles, module: str, form: str) -> ModulePlan:
        """[N, K] of a saved layer, once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        weight = require_tensor(files, f"{module}.weight", dtypes=[_FP8[self._config(files).fp8_config][0]])
        if len(weight.shape) != 2:
            raise bad_file("bad-shape", "the weight is a matrix", file=weight.file, tensor=weight.name, field="shape",
                           found=list(weight.shape), expected="two dimensions")  # fmt: skip
        columns, rows = weight.shape
        scale, *given = (require_tensor(files, name, dtypes=_FLOATS) for name in self._scale_names(files, module, form))
        for part in ("dequant_weights", "quant_input"):
            zero = f"{module}.{part}.zero_point"
            if zero in files.source.tensors and bool(files.source.read(zero).any()):
                raise bad_file("bad-content", "fp8 has no zero points", file=files.source.tensors[zero].file, tensor=zero,
                               field="values", found="other than 0", expected="0")  # fmt: skip
        one: list[tuple[int, ...]] = [(), (1,), (1, 1)]
        for info, shapes in ((scale, [*one, (rows,), (rows, 1)]), *((info, one) for info in given)):
            if info.shape not in shapes:
                raise bad_file("bad-shape", "the scales do not fit the weight", file=info.file, tensor=info.name,
                               field="shape", found=list(info.shape), expected=" or ".join(map(str, map(list, shapes))))  # fmt: skip
        single = scale.shape in ((), (1,), (1, 1))
        return ModulePlan(
            self._scheme(files, PerTensor() if single else PerChannel(), columns), "stored in fp8", (rows, columns)
        )

    # --- Measured models ---

    def _measured(self, files: CheckpointFiles) -> tuple[dict[str, Node], bool]:
        """The layers' measurements, or their scales (True). Raises Refused where there are none although they are needed."""
        return files.once("measured", lambda: self._read_measured(files))

    def _read_measured(self, files: CheckpointFiles) -> tuple[dict[str, Node], bool]:
        config = self._config(files)
        if config.dynamic_quantization:
            return {}, False
        suffix = f"hooks_{config.observer}"
        if not config.recalc_scales:
            scales = read_nodes(files.folder, config.dump_stats_path, f"{suffix}_{config.scale_method}")
            if scales is not None:
                return scales, True
        nodes = read_nodes(files.folder, config.dump_stats_path, suffix)
        if nodes is None and METHODS[config.scale_method].input not in ("one", "single"):
            raise bad_file("path-not-found", "INC's measurements are not there", file=files.folder, field="dump_stats_path",
                           found=config.dump_stats_path, expected=f"{config.dump_stats_path}_{suffix}.json in the folder",
                           fix="Copy the measurement files beside the weights.")  # fmt: skip
        return nodes or {}, False

    def _kept(self, files: CheckpointFiles, module: str) -> str:
        """Why a linear layer is not quantized; empty where it is."""
        config = self._config(files)
        if why := self._listed(files, module, "linear"):
            return why
        fixed = config.dynamic_quantization or METHODS[config.scale_method].input in ("one", "single")
        node = self._node(files, module)
        if not fixed and (node is None or node.input is None):
            if config.ignore_modules_wo_measures:
                return "not measured"
            raise bad_file("bad-field", "a layer that the config has quantized was not measured", file=files.folder,
                           field=f"Nodes.{module}", found="no entry", expected="its largest input",
                           fix="Put it on the blocklist, or set ignore_modules_wo_measures.")  # fmt: skip
        return ""

    def _listed(self, files: CheckpointFiles, module: str, what: str) -> str:
        """Why the lists leave the module, which is one of _KINDS, as it is; empty where they do not."""
        config, kinds = self._config(files), _KINDS[what]

        def named(names: list[str], field: str) -> bool:
            where = f"{field}.names"
            return any(matches(n, module, file=files.quantization_file, field=where, anywhere=True) for n in names)

        blocked, allowed = config.blocklist, config.allowlist
        if named(blocked.names, "blocklist") or any(kind.lower() in kinds for kind in blocked.types):
            return "in the blocklist"
        meant = any(own in kind.lower() for kind in allowed.types for own in kinds)
        if (allowed.names or allowed.types) and not meant and not named(allowed.names, "allowlist"):
            return "not in the allowlist"
        return ""

    def _node(self, files: CheckpointFiles, module: str) -> Node | None:
        nodes = self._measured(files)[0]
        parent, _, leaf = module.rpartition(".")
        return nodes.get(module) or nodes.get(f"{parent}.{_FUSED.get(leaf, leaf)}")

    def _scales(
        self, files: CheckpointFiles, module: str, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales in hp_dtype of the weight [N, 1] or [1, 1], and of the input [] where it is known before it runs."""
        import torch

        from qcore.tensor import TORCH_FLOATS

        config, (nodes, are_scales) = self._config(files), self._measured(files)
        method, node = METHODS[config.scale_method], self._node(files, module)

        def kept(numbers: list[float]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=weight.dtype)

        if are_scales and node is not None and node.input is not None and node.weight:
            scale, given = kept(list(node.weight)), kept([node.input])
            if scale.numel() not in ((weight.shape[0],) if method.channels else (1,)):
                raise bad_file("bad-shape", "a scale file does not fit the weight", file=files.folder,
                               field=f"Nodes.{module}.params.weight", found=scale.numel(), expected=weight.shape[0])  # fmt: skip
            return positive(scale.reshape(-1, 1)), positive(given)
        largest = weight.abs().amax(1, keepdim=True) if method.channels else weight.abs().amax().reshape(1, 1)
        if module not in nodes and node is not None and node.weight and not method.channels:
            largest = largest.clamp(min=max(node.weight))  # layers that were measured as one share a scale
        scale = self._rounded(files, largest, method.weight, "weight")
        if method.search:
            bounds, fp8 = RANGES[config.device_for_scales], TORCH_FLOATS[self._element(files).format]
            scale = searched(weight, method, scale, self._largest(files), bounds, fp8)
        if config.dynamic_quantization:
            return scale, None
        given = kept([node.input if node is not None and node.input is not None else 0.0])
        return scale, self._rounded(files, given, method.input, "input")

    def _rounded(self, files: CheckpointFiles, largest: torch.Tensor, how: Rounding, what: str) -> torch.Tensor:
        return rounded(largest, how, what, self._largest(files), RANGES[self._config(files).device_for_scales])


def _timely(config: IncConfig) -> bool:
    """Whether the method's scales of inputs are known when the config wants them: by token at run time alone, and those that are a device's before."""
    method = METHODS.get(config.scale_method)
    if method is None:
        return not config.dynamic_quantization
    return method.input in ("pow2", "none") if config.dynamic_quantization else not method.tokens


def _form(files: CheckpointFiles) -> str:
    """Which of FORMS a saved model is in; empty where the model is measured."""
    tensors = files.source.tensors
    return next((form for form, (part, _) in FORMS.items() if any(n.endswith(f".{part}") for n in tensors)), "")


def _torch(name: str) -> torch.dtype:
    import torch

    return {"BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32}[name]


METHOD = Inc()
