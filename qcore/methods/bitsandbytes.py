"""bitsandbytes: 4-bit codebooks (nf4, fp4), with absmax quantized again or not, and LLM.int8.

    4 bits   weight uint8 [ceil(N K / 2), 1]      the flattened weight, two codes a byte, the first in the high nibble
             weight.absmax f32 [B] | uint8 [B]    one scale for each block of the flattened weight; uint8 where nested
             weight.quant_map f32 [16]            the codebook
             weight.nested_absmax f32, weight.nested_quant_map f32 [256]
             weight.quant_state.bitsandbytes__nf4 uint8: JSON with the shape, block sizes and the nested offset
    8 bits   weight int8 [N, K], SCB f32 [N]: absmax of each row, w = q * SCB / 127; weight_format uint8, 0

w = quant_map[q] * absmax, nested: absmax = nested_quant_map[a] * nested_absmax + offset. Blocks run over row ends where the
block size does not divide K. LLM.int8 keeps the input's columns beyond a threshold in 16 bits (Dettmers et al. 2022).
A config over plain matrices asks for them to be quantized while they are loaded, and so they are.
Read from bitsandbytes' QuantState, Linear4bit and Linear8bitLt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from qcore.checkpoint.json_file import parse_json
from qcore.checkpoint.patterns import skips
from qcore.checkpoint.settings import Settings, check
from qcore.checkpoint.source import TensorInfo
from qcore.elements import Codebook, FlatGroup, Int, Level, PerChannel, PerToken, in_rows
from qcore.layouts.bitsandbytes import WRITTEN, config_of, int8_scales, pack_layer, rows_of_nibbles
from qcore.method import (
    CheckpointFiles,
    Method,
    ModulePlan,
    dense_modules,
    finite,
    in_flight,
    is_embedding,
    require_tensor,
)
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme, weight_only

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_STATE = ".weight.quant_state.bitsandbytes__"
_SIDE = frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map"})
"""What stands beside a 4-bit weight, besides its state."""
_STORAGE = ("U8", "I8", "F16", "BF16", "F32", "F64")
"""Types that the bytes of a 4-bit weight may be stored as (bnb_4bit_quant_storage)."""
_LARGEST_STATE = 4096
"""Bytes of a quant_state; real ones have about 170."""


class BitsAndBytesConfig(Settings):
    """The keys that decide what the tensors mean."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    llm_int8_threshold: float = Field(6.0, ge=0)
    llm_int8_skip_modules: list[str] | None = None
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Literal["float32", "float16", "bfloat16"] | None = None

    @field_validator("load_in_8bit")
    @classmethod
    def _one_of_two(cls, eight: bool, others: ValidationInfo) -> bool:
        if eight and others.data.get("load_in_4bit"):
            raise ValueError("load_in_4bit is true already, and a model is loaded in one of both")
        return eight

    @property
    def computes(self) -> str:
        """The type that 4-bit layers round their inputs to before they multiply; empty where they do not: in float32."""
        return self.bnb_4bit_compute_dtype if self.bnb_4bit_compute_dtype in ("float16", "bfloat16") else ""

    @property
    def skipped(self) -> list[str]:
        """Names and patterns of layers that are not quantized."""
        return ["lm_head"] if self.llm_int8_skip_modules is None else self.llm_int8_skip_modules

    def request(self) -> tuple[str, Scheme]:
        """The algorithm and the scheme that plain weights are quantized with: blocks of 64, nested ones of 256."""
        if self.load_in_8bit:
            return "llm.int8", _int8_scheme(self)
        state = QuantState(quant_type=self.bnb_4bit_quant_type, blocksize=64, shape=(1, 1),
                           nested_blocksize=256 if self.bnb_4bit_use_double_quant else None, nested_offset=0.0)  # fmt: skip
        return "bitsandbytes", state.scheme()


class QuantState(Settings):
    """What bitsandbytes' QuantState writes beside a 4-bit weight."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: int = Field(64, ge=32, le=4096)
    shape: tuple[int, int]
    nested_blocksize: int | None = Field(None, ge=1, le=65536)
    nested_offset: float | None = None

    @model_validator(mode="after")
    def _whole(self) -> QuantState:
        if self.nested and self.nested_offset is None:
            raise ValueError("nested scales have a nested_offset")
        return self

    @property
    def nested(self) -> bool:
        return self.nested_blocksize is not None

    def scheme(self) -> Scheme:
        """Groups of a row where blocks end with rows, else of the flattened weight; nested scales are always counted so."""
        flat = FlatGroup(self.blocksize)
        if self.nested_blocksize is not None:
            levels = (Level(flat, "dynamic8"), Level(FlatGroup(self.blocksize * self.nested_blocksize)))
            return weight_only(Codebook(self.quant_type), *levels)
        return weight_only(Codebook(self.quant_type), Level(in_rows(flat, self.shape[1])))


class BitsAndBytes(Method):
    name = "bitsandbytes"
    quant_methods = ("bitsandbytes",)
    variants = WRITTEN
    written = WRITTEN
    parts = frozenset({"weight", "bias", "SCB", "weight_format"})

    def format_version(self, files: CheckpointFiles) -> str:
        return "4 bits" if self._config(files).load_in_4bit else "8 bits"

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config, plan = self._config(files), {}
        for name in files.source.tensors:
            if _STATE in name:
                module = name.partition(_STATE)[0]
                state = self._state(files, module)
                self._check_four_bits(files, module, state)
                plan[module] = ModulePlan(state.scheme(), "quantization_config", state.shape, computes=config.computes)
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                plan[module] = ModulePlan(_int8_scheme(config), "quantization_config", _int8_shape(files, module))
        for name, info in files.source.tensors.items():
            module, _, part = name.rpartition(".")
            if part == "weight" and info.dtype in ("U8", "I8") and module not in plan:
                raise bad_file("missing-tensor", "the weight is quantized, and nothing beside it says how", file=info.file,
                               tensor=name, expected=f"{name}.quant_state.bitsandbytes__*, or {module}.SCB")  # fmt: skip
        marked = not plan
        if marked and not (config.load_in_4bit or config.load_in_8bit):
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(files.path), "it is not quantized, and nothing says how it is to be",
                        "found no quant_state, no SCB, load_in_4bit and load_in_8bit false",
                        "Save it with bitsandbytes after it has been quantized.",
                        str(files.quantization_file), field="quantization_config")
            )  # fmt: skip
        for module, entry in dense_modules(files.source.tensors, "").items():
            if skips(config.skipped, module, file=files.quantization_file, field="llm_int8_skip_modules"):
                plan.setdefault(module, ModulePlan(None, "llm_int8_skip_modules", entry.shape))
            elif marked and not is_embedding(module):
                algorithm, scheme = config.request()
                asked = in_flight(algorithm, scheme, "quantized while loading, as the config asks", entry.shape)
                plan[module] = replace(asked, computes="" if config.load_in_8bit else config.computes)
            else:
                plan.setdefault(module, ModulePlan(None, "stored unquantized", entry.shape))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.tensor import LayerTensors, QuantizedTensor

        read, bias = files.source.read, f"{module}.bias"
        held = read(bias) if bias in files.source.tensors else None
        if f"{module}.SCB" in files.source.tensors:
            largest = finite(files, f"{module}.SCB", read(f"{module}.SCB"))
            if bool((largest < 0).any()):
                raise bad_file("bad-content", "SCB are magnitudes", file=files.source.tensors[f"{module}.SCB"].file,
                               tensor=f"{module}.SCB", field="values", found=float(largest.min()), expected="0 or more")  # fmt: skip
            scales = int8_scales(largest.reshape(-1, 1))
            shape = _int8_shape(files, module)
            scheme = _int8_scheme(self._config(files))
            return LayerTensors(QuantizedTensor(scheme, shape, read(f"{module}.weight"), (scales,)), held)
        state = self._state(files, module)
        rows, columns = state.shape

        def side(part: str) -> torch.Tensor:
            return finite(files, f"{module}.weight.{part}", read(f"{module}.weight.{part}"))

        scheme = state.scheme()
        flat = isinstance(scheme.weight.granularity, FlatGroup)
        absmax = side("absmax").reshape((1, -1) if flat else (rows, -1))
        weight = QuantizedTensor(
            scheme, state.shape, rows_of_nibbles(read(f"{module}.weight"), rows, columns),
            (absmax, side("nested_absmax").reshape(1, -1)) if state.nested else (absmax,),
            table=side("quant_map").flatten(),
            scale_table=side("nested_quant_map").flatten() if state.nested else None,
            offset=_scalar(state.nested_offset) if state.nested else None,
        )  # fmt: skip
        return LayerTensors(weight, held)

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        return config_of(plan, variant)

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return pack_layer(module, layer)

    def parameters(self, files: CheckpointFiles, plan: Mapping[str, ModulePlan]) -> dict[str, TensorInfo]:
        found = super().parameters(files, plan)
        quantized = {f"{module}.weight" for module, entry in plan.items() if entry.scheme}
        return {
            name: info
            for name, info in found.items()
            if not any(name.startswith(f"{q}.") for q in _owners(name, quantized))
        }

    def _config(self, files: CheckpointFiles) -> BitsAndBytesConfig:
        assert files.quantization is not None
        return files.once(
            "config", lambda: check(BitsAndBytesConfig, files.quantization or {}, file=files.quantization_file)
        )

    def _state(self, files: CheckpointFiles, module: str) -> QuantState:
        return files.once(f"state {module}", lambda: self._read_state(files, module))

    def _read_state(self, files: CheckpointFiles, module: str) -> QuantState:
        """The weight's state: metadata, although it is stored as a tensor. Raises Refused."""
        names = [f"{module}{_STATE}{kind}" for kind in ("nf4", "fp4")]
        present = [name for name in names if name in files.source.tensors]
        info = require_tensor(files, present[0] if present else names[0], dtypes=["U8"])
        if len(present) > 1 or info.nbytes > _LARGEST_STATE:
            raise bad_file("limit-exceeded" if len(present) < 2 else "duplicate", "a weight has one small quant_state",
                           file=info.file, tensor=info.name, field="size", found=info.nbytes,
                           expected=f"one of at most {_LARGEST_STATE} bytes")  # fmt: skip
        values = parse_json([bytes(files.source.read(info.name).flatten().tolist())], file=info.file, field=info.name)
        state = check(QuantState, values, file=info.file, prefix=info.name)
        if not info.name.endswith(state.quant_type) or min(state.shape) < 1:
            raise bad_file("bad-field", "a quant_state contradicts its name, or has no elements", file=info.file,
                           tensor=info.name, field="quant_type", found=[state.quant_type, list(state.shape)],
                           expected=info.name.rpartition("__")[2])  # fmt: skip
        return state

    def _check_four_bits(self, files: CheckpointFiles, module: str, state: QuantState) -> None:
        """Raises Refused where the parts do not fit the state, or a part is not known."""
        count = state.shape[0] * state.shape[1]
        blocks = -(-count // state.blocksize)
        weight = require_tensor(files, f"{module}.weight", dtypes=_STORAGE)
        if weight.nbytes != -(-count // 2):
            raise bad_file("bad-shape", "the packed weight is not of its state's size", file=weight.file,
                           tensor=weight.name, field="shape", found=f"{weight.nbytes} bytes",
                           expected=f"{-(-count // 2)} bytes for {list(state.shape)}")  # fmt: skip
        require_tensor(files, f"{weight.name}.absmax", shape=(blocks,), dtypes=["U8" if state.nested else "F32"])
        require_tensor(files, f"{weight.name}.quant_map", shape=(16,), dtypes=["F32"])
        if state.nested_blocksize is not None:
            nested = -(-blocks // state.nested_blocksize)
            require_tensor(files, f"{weight.name}.nested_absmax", shape=(nested,), dtypes=["F32"])
            require_tensor(files, f"{weight.name}.nested_quant_map", shape=(256,), dtypes=["F32"])
        for name, info in files.source.tensors.items():
            part = name.removeprefix(f"{weight.name}.")
            if part != name and part not in _SIDE and not part.startswith("quant_state."):
                raise bad_file("unexpected-tensor", "bitsandbytes has no such part of a weight", file=info.file,
                               tensor=name, field="name", found=part, expected=", ".join(sorted(_SIDE)))  # fmt: skip


def _owners(name: str, quantized: set[str]) -> list[str]:
    """The quantized weights that a tensor's name begins with."""
    parts = name.split(".")
    return [prefix for i in range(1, len(parts)) if (prefix := ".".join(parts[:i])) in quantized]


def _int8_scheme(config: BitsAndBytesConfig) -> Scheme:
    """LLM.int8: a threshold of 0 keeps no columns apart, as one does that nothing reaches."""
    element = Int(8, signed=True)
    tokens = TensorScheme(element, (Level(PerToken()),), dynamic=True, outliers=config.llm_int8_threshold or math.inf)
    return Scheme(TensorScheme(element, (Level(PerChannel()),)), tokens)


def _int8_shape(files: CheckpointFiles, module: str) -> tuple[int, int]:
    weight = require_tensor(files, f"{module}.weight", dtypes=["I8"])
    if len(weight.shape) != 2:
        raise bad_file("bad-shape", "the weight is a matrix", file=weight.file, tensor=weight.name, field="shape",
                       found=list(weight.shape), expected="two dimensions")  # fmt: skip
    require_tensor(files, f"{module}.SCB", shape=(weight.shape[0],), dtypes=["F32"])
    stored = files.source.tensors.get(f"{module}.weight_format")
    if stored is not None and bool(files.source.read(stored.name).any()):
        raise bad_file("unknown-variant", "the weight is stored in an order that is not read", file=stored.file,
                       tensor=stored.name, field="values", found="another format", expected="0, row by row",
                       fix="Save the model again with a current bitsandbytes.")  # fmt: skip
    return weight.shape[0], weight.shape[1]


def _scalar(value: float | None) -> torch.Tensor:
    import torch

    return torch.tensor(value or 0.0, dtype=torch.float32)


METHOD = BitsAndBytes()
