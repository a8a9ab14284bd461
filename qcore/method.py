"""Method: one checkpoint format. Decodes files into the waist; never sees a device.

A format is one file in qcore/methods/: a subclass of `Method` with an instance named METHOD. It states what it
recognizes, plans from configs and tensor headers alone (module -> scheme, or why not), and decodes one module at a time.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qcore.checkpoint.finite import all_finite
from qcore.checkpoint.source import TensorInfo, TensorSource
from qcore.elements import FlatGroup, in_rows
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qcore.checkpoint.kv_scales import KvScales
    from qcore.tensor import LayerTensors

_PIECE_BYTES = 4 << 20


T = TypeVar("T")

WRITER = "qcore:2.0.0"
"""What a checkpoint says of the tool that wrote it, where its format asks."""
PLAIN_FLOATS = ("F16", "BF16", "F32", "F64")
"""Data types of unquantized weights."""
SCALE_DTYPES: Mapping[str, tuple[str, ...]] = {
    "float": ("F16", "BF16", "F32"),
    "e4m3fn": ("F8_E4M3",),
    "e8m0": ("U8", "F8_E8M0"),
}
"""Data types that files store scales of a ScaleType in."""


@dataclass(frozen=True)
class CheckpointFiles:
    """What was found at a path: the tensors' container and, for folders, the parsed configs.

    config: config.json's content (empty for GGUF). quantization: its quantization config, wherever that stood, or None;
    quantization_file: the file it came from. folder: where tokenizer files may lie.
    """

    path: Path
    source: TensorSource
    config: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    quantization_file: Path
    folder: Path
    _made: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gave the first time, for what a method works out of the files only once."""
        if name not in self._made:
            self._made[name] = make()
        return cast("T", self._made[name])


@dataclass(frozen=True)
class ModulePlan:
    """One linear layer or embedding: its scheme (None: not quantized), why, and its shape [N, K].

    Experts of a mixture are layers of their own, or one entry [E, N, K] where the checkpoint stacks them.
    algorithm: what quantizes the weight while it is read; empty where it is stored quantized.
    computes: the type that the format's tool multiplies in, whatever the model's (bfloat16, float16); empty where it is the
    model's own.
    """

    scheme: Scheme | None
    reason: str
    shape: tuple[int, ...]
    algorithm: str = ""
    computes: str = ""

    @property
    def matrix(self) -> tuple[int, int]:
        """[N, K] of the layer, or of one expert."""
        return self.shape[-2], self.shape[-1]


def in_flight(algorithm: str, scheme: Scheme, reason: str, shape: tuple[int, ...]) -> ModulePlan:
    """The plan of a plain matrix that is quantized while it is read. A single level of flat groups is counted along the
    rows where it ends with them."""
    levels = scheme.weight.scales
    if len(levels) == 1 and isinstance(group := levels[0].granularity, FlatGroup):
        level = replace(levels[0], granularity=in_rows(group, shape[-1]))
        scheme = replace(scheme, weight=replace(scheme.weight, scales=(level,)))
    return ModulePlan(scheme, reason, shape, algorithm)


def quantizable(weight: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """A weight that is to be quantized while it is read. Raises Refused (bad-shape, bad-content)."""
    if not weight.numel():
        raise bad_file("bad-shape", "a weight that is to be quantized has no elements", file=info.file, tensor=info.name,
                       field="shape", found=list(info.shape), expected="rows and columns")  # fmt: skip
    if not all_finite(weight):
        raise bad_file("bad-content", "a weight that is to be quantized is not finite", file=info.file, tensor=info.name,
                       field="values", found="NaN or infinity", expected="finite weights")  # fmt: skip
    return weight


class Method(ABC):
    """One checkpoint format."""

    name: str
    quant_methods: tuple[str, ...] = ()
    """The values of `quant_method` in a quantization config that mean this format."""
    variants: tuple[str, ...] = ()
    """What of the format is read, in the format's own words; the matrix asks for them as `name:variant`."""
    side_files: tuple[str, ...] = ()
    """Files beside config.json that may hold the quantization config instead."""
    pickles: str = ""
    """How pickled checkpoints of the format become safetensors, where there is a better way than saving them again."""
    written: tuple[str, ...] = ()
    """The variants that `encode_config` makes, the usual one first; empty where the format has one form, or is not written."""
    embeddings: bool = False
    """Whether the format holds quantized embeddings."""
    stacked: bool = False
    """Whether `encode` takes experts stacked in one tensor [E, N, K]."""
    parts: frozenset[str] = frozenset()
    """The tensors that a quantized module may have; empty where names are checked otherwise."""

    @property
    def readable(self) -> tuple[str, ...]:
        """What a row of the matrix may name: the format and its variants."""
        return (self.name, *(f"{self.name}:{variant}" for variant in self.variants))

    def recognizes(self, files: CheckpointFiles) -> bool:
        """Whether the files are of this format; decides on the config alone unless overridden."""
        return stated_method(files.quantization) in self.quant_methods

    def format_version(self, files: CheckpointFiles) -> str:
        """The variant or writer's version, in the format's own words; empty if it has none."""
        return ""

    def model_config(self, files: CheckpointFiles) -> dict[str, Any]:
        """The transformers config, without its quantization part."""
        dropped = ("quantization_config", "compression_config")
        return {key: value for key, value in files.config.items() if key not in dropped}

    def load_tokenizer(self, files: CheckpointFiles) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        from qcore.checkpoint.tokenizer import tokenizer_from_folder

        return tokenizer_from_folder(files.folder)

    @abstractmethod
    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        """Every linear layer and embedding, by transformers' module name, from headers alone."""

    def kv_cache(self, files: CheckpointFiles) -> TensorScheme | None:
        """The scheme that the checkpoint declares for the kv cache."""
        return None

    def kv_scales(self, files: CheckpointFiles) -> dict[str, KvScales]:
        """The kv cache's calibrated scales, by attention module: those of the tensors that any tool's names are of."""
        from qcore.checkpoint.kv_scales import read_kv_scales

        return read_kv_scales(files.source)

    @abstractmethod
    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        """One quantized module of the plan. Raises Refused (bad-content and others)."""

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """The quantization config of a checkpoint with these modules, with all that `encode` needs to know.

        variant: one of `written`; empty for what suits the plan best. Raises Refused (format-not-written, not-representable).
        """
        raise Refused(
            Refusal("format-not-written", "notimpl", self.name, "this format is read, not written",
                    fix="Choose a format that is written: compressed-tensors holds most schemes.")
        )  # fmt: skip

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """A quantized module's tensors, by full name, under what `encode_config` gave. Raises Refused (not-representable)."""
        raise NotImplementedError(f"{self.name} has encode_config and no encode")

    def encode_kv_cache(
        self, scheme: TensorScheme, scales: Mapping[str, KvScales]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What declares a quantized kv cache in the quantization config, and the tensors of its scales by attention module.

        Raises Refused (not-representable).
        """
        raise Refused(
            Refusal("not-representable", "notimpl", self.name, "a quantized kv cache is not written in this format",
                    f"found {scheme}", "Choose compressed-tensors, or quantize the model again without it.")
        )  # fmt: skip

    def encode_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The JSON files that the format has beside config.json, by name, under what `encode_config` and `encode_kv_cache` gave."""
        return {}

    def encode_metadata(self, plan: Mapping[str, ModulePlan], config: Mapping[str, Any], dtype: str) -> dict[str, str]:
        """What the format keeps in the metadata of the safetensors files; dtype: the type that the model computes in."""
        return {}

    def parameters(self, files: CheckpointFiles, plan: Mapping[str, ModulePlan]) -> dict[str, TensorInfo]:
        """The tensors that no quantized module decodes, by transformers' parameter name."""
        quantized = {module for module, entry in plan.items() if entry.scheme}
        return {n: info for n, info in files.source.tensors.items() if n.rpartition(".")[0] not in quantized}

    def read_parameter(self, files: CheckpointFiles, name: str) -> torch.Tensor:
        """One tensor of `parameters`, as transformers expects it, in the dtype of the file."""
        return files.source.read(name)

    def read_pieces(self, files: CheckpointFiles, name: str) -> Iterator[torch.Tensor]:
        """The same, some whole rows after the other."""
        info = files.source.tensors[name]
        if not info.shape or not info.nbytes:
            yield self.read_parameter(files, name)
            return
        rows = rows_of_a_piece(info.nbytes, info.shape[0])
        for start in range(0, info.shape[0], rows):
            yield files.source.read_rows(name, start, min(start + rows, info.shape[0]))


def rows_of_a_piece(nbytes: int, rows: int) -> int:
    """How many rows of a tensor are read at a time where it need not be there as a whole."""
    return max(1, _PIECE_BYTES * rows // max(nbytes, 1))


def stated_method(config: Mapping[str, Any] | None) -> str:
    """The format that a quantization config names, in lower case: `quant_method`, or `method` as GPTQModel writes it."""
    config = config or {}
    return str(config.get("quant_method", config.get("method", ""))).lower()


def is_embedding(module: str) -> bool:
    """Headers do not name classes; by name, transformers' embeddings are the only matrices that are no linear layers."""
    return re.search(r"(^|\.)(embed_\w+|\w*embeddings?|wte|wpe)$", module) is not None


def is_expert(module: str) -> bool:
    """Whether the module is one of a mixture's experts, or all of them stacked: so transformers names them, and checkpoints do."""
    return re.search(r"(^|\.)experts\.", module) is not None


def is_router(module: str) -> bool:
    """Whether the module chooses or weighs a mixture's experts: so transformers' models name those, and checkpoints do. They stay unquantized: a token that is sent to another expert
    is more than an error of rounding, and they are small."""
    return re.search(r"(^|\.)(gate|router|router_gate|shared_expert_gate)(\.|$)", module) is not None


def left_whole(plan: Mapping[str, ModulePlan]) -> list[str]:
    """The linear layers that a writer has to name as unquantized: those of the plan, and lm_head, which a plan does not have
    where it is tied to the embedding."""
    kept = [module for module, entry in plan.items() if entry.scheme is None and not is_embedding(module)]
    return kept if any(module.endswith("lm_head") for module in plan) else [*kept, "lm_head"]


def dense_modules(tensors: Mapping[str, TensorInfo], reason: str) -> dict[str, ModulePlan]:
    """Plans for the modules whose weight is a plain matrix."""
    plans = {}
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and len(info.shape) == 2 and info.dtype in PLAIN_FLOATS:
            plans[module] = ModulePlan(None, reason, (info.shape[0], info.shape[1]))
    return plans


def require_tensor(
    files: CheckpointFiles, name: str, *, shape: tuple[int, ...] | None = None, dtypes: Iterable[str] | None = None
) -> TensorInfo:
    """The tensor's header, checked. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
    info = files.source.tensors.get(name)
    if info is None:
        raise bad_file("missing-tensor", "a tensor that the format needs is not there", file=files.path, tensor=name)
    where: dict[str, Any] = {"file": info.file, "tensor": name}
    if shape is not None and info.shape != shape:
        raise bad_file("bad-shape", "its shape is not the one that the config implies", **where, field="shape",
                       found=list(info.shape), expected=list(shape))  # fmt: skip
    if dtypes is not None and info.dtype not in (allowed := tuple(dtypes)):
        raise bad_file("bad-dtype", "its data type is not one that the format stores", **where, field="dtype",
                       found=info.dtype, expected=" or ".join(allowed))  # fmt: skip
    return info


def finite(files: CheckpointFiles, name: str, values: torch.Tensor) -> torch.Tensor:
    """`values`, which were read from the tensor of this name. Raises Refused (bad-content) where one is NaN or infinite."""
    if not all_finite(values.float()):
        raise bad_file("bad-content", "a scale is not a finite number", file=files.source.tensors[name].file,
                       tensor=name, field="values", found="NaN or infinity", expected="finite scales")  # fmt: skip
    return values


def signed_codes(files: CheckpointFiles, name: str, values: torch.Tensor, bits: int) -> torch.Tensor:
    """`values`, integers that were read from the tensor of this name. Raises Refused (bad-content) where one is no signed
    integer of so many bits: narrowing would wrap it into another."""
    most = (1 << (bits - 1)) - 1
    if values.numel() and not -most - 1 <= int(values.min()) <= int(values.max()) <= most:
        raise bad_file("bad-content", "a number is outside its type", file=files.source.tensors[name].file, tensor=name,
                       field="values", found=f"{int(values.min())} to {int(values.max())}",
                       expected=f"{-most - 1} to {most}")  # fmt: skip
    return values


def read_scale(files: CheckpointFiles, name: str, kind: str = "float") -> torch.Tensor:
    """The scales of a ScaleType in the tensor of this name. Raises Refused (bad-content) where one is no number."""
    import torch

    values = files.source.read(name)
    if kind != "e8m0":
        return finite(files, name, values)
    exponents = values.view(torch.uint8)
    finite(files, name, exponents.view(torch.float8_e8m0fnu))
    return exponents
