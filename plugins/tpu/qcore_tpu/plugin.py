"""What this plugin declares: its platform, the kernels' rows, and this host's devices. The core's portable kernels run on them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcore.decoder import Decoder
from qcore.hookspecs import hookimpl
from qcore.kernel import Accepts, Kernel, Op
from qcore.platform import Device, Platform, Target
from qcore_tpu.chips import CHIPS
from qcore_tpu.devices import ARCHITECTURES, devices, report, stand_ins

QCORE_API = (1, 4)

_SIZES = (16, 32, 64, 96, 128, 160, 192, 256, 512, 1024)
_GROUPS = tuple(f"g{size}" for size in _SIZES)
_FLAT = tuple(f"flat{size}" for size in _SIZES)
_NESTED = tuple(f"flat{size}:dynamic8+flat{256 * size}" for size in _SIZES)
_BLOCKS = ("gguf:q*", "gguf:tq*", "gguf:iq4_*", "gguf:iq3_*", "gguf:iq2_s", "gguf:*fp4")
_LONG_GROUPS = ("g128", "g256", "g512", "g1024")
"""Whole vectors of a TPU, whose sums are scaled."""

_LINEARS: tuple[tuple[str, Accepts, float, str, str], ...] = (
    ("integers", Accepts(("int?", "uint?"), (*_GROUPS, "channel", "tensor"), (None, "stored", "float"), ordered=True),
     0.3, "linear:IntegerLinear", "codes of 1 to 8 bits, unpacked and scaled in vector memory as they are multiplied"),
    ("floats", Accepts(("fp8", "e4m3", "e4m3fnuz", "e5m2", "e3m2", "e2m3", "e2m1"),
                       (*_GROUPS, "block128", "tile1x128", "channel", "tensor", "g32:e8m0", "g16:e4m3fn", "g16:e4m3fn+tensor")),
     0.3, "linear:FloatLinear", "small floats, MX and NVFP4, whose bits are moved in vector memory as they are multiplied"),
    ("codebooks", Accepts(("nf4", "fp4"), (*_GROUPS, *_FLAT, *_NESTED)),
     0.35, "linear:CodebookLinear", "4-bit codebooks, chosen from in vector memory as they are multiplied"),
    ("blocks", Accepts(_BLOCKS),
     0.35, "blocks:BlockLinear", "ggml's blocks taken apart, unpacked and scaled in vector memory as they are multiplied"),
    ("grids", Accepts(("gguf:iq1_?", "gguf:iq2_xxs", "gguf:iq2_xs")),
     0.4, "grids:GridLinear", "ggml's smallest blocks; tuples of weights are looked up in vector memory as they are multiplied"),
    ("int8", Accepts(("int?",), (*_LONG_GROUPS, "channel", "tensor"), ordered=True, inputs=("int8-token-sym-dyn", "int8-tensor-sym")),
     0.25, "rounded:RoundedIntegerLinear", "inputs are rounded within the product; int8 x int8, exact in int32, on v5e, v5p and v6e, else in bfloat16"),
    ("fp8", Accepts(("fp8",), ("channel", "tensor"), inputs=("fp8-token-dyn", "fp8-tensor")),
     0.25, "rounded:RoundedFloatLinear", "inputs are rounded within the product; e4m3 x e4m3 on v7x, else in bfloat16"),
    ("fp8_block128", Accepts(("fp8",), ("block128", "tile1x128"), inputs=("fp8-g128-dyn",)),
     0.25, "rounded:RoundedFloatLinear", "as fp8, the sums of 128 columns scaled"),
    ("llm_int8", Accepts(("int8",), ("channel", "tensor"), inputs=("int8-token-sym-dyn-outliers*",)),
     0.4, "rounded:RoundedIntegerLinear", "inputs are rounded by XLA, and what they stand for is multiplied by whole numbers"),
    ("microscaled", Accepts(("fp8", "e2m1"), ("g32:e8m0", "g16:e4m3fn", "g16:e4m3fn+tensor"),
                            inputs=("fp8-g32:e8m0-dyn", "e2m1-g32:e8m0-dyn", "e2m1-g16:e4m3fn+tensor-dyn")),
     0.4, "rounded:RoundedFloatLinear", "inputs are rounded by XLA as MX or NVFP4 says, and what they stand for is multiplied by small floats"),
)  # fmt: skip


_EMBEDDINGS = Accepts(("int?", "uint?", *_BLOCKS), ("none", *_GROUPS, "channel", "tensor"), (None, "stored", "float"))


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    targets = tuple(Target(chip.architecture, "tpu", chip.topology) for chip in CHIPS)
    return [Platform("tpu", "Google TPU", ARCHITECTURES, portable=True, targets=targets)]


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    def tpu(name: str, family: str, op: Op, accepts: Accepts, cost: float, implementation: str, note: str) -> Kernel:
        return Kernel(f"tpu_{name}", family, op, ("tpu",), accepts, ("bfloat16", "float32"), cost, f"qcore_tpu.kernels.{implementation}", note,
                      features=(frozenset({"torchax"}), frozenset({"torch_xla", "jax"})), requires=(("torch", "2.8"), ("jax|torch-xla", "0.10"), ("jax", "0.7.1"), ("torchax|torch-xla", "0.0.13")), ragged=name != "codebooks",
                      architectures=tuple(chip.architecture for chip in CHIPS), compiles=True, experts=op == "linear")  # fmt: skip

    return [
        *(tpu(name, "pallas", "linear", accepts, cost, implementation, note) for name, accepts, cost, implementation, note in _LINEARS),
        tpu("embedding", "xla", "embedding", _EMBEDDINGS, 0.5, "embedding:PlanesEmbedding",
            "packed rows are gathered, and those alone unpacked"),
        tpu("kv_cache", "xla", "kv_cache", Accepts(("fp8", "int8"), ("tensor", "channel"), (None, "stored")), 0.5, "kv_cache:KvCache",
            "keys and values in 8 bits, rounded as they are written; attention gets all of them dequantized"),
    ]  # fmt: skip


@hookimpl
def qcore_decoders() -> Sequence[Decoder]:
    return [
        Decoder(
            "tpu_decoder",
            "jax",
            "qcore_tpu.decoder:CompiledDecoder",
            "transformers' own code, compiled by XLA for a few numbers of tokens",
        ),
        Decoder(
            "tpu_lazy_decoder",
            "xla",
            "qcore_tpu.lazy_decoder:LazyDecoder",
            "the same through torch-xla, which compiles a graph of the same shape once",
        ),
    ]


@hookimpl
def qcore_stand_ins() -> Sequence[Device]:
    return stand_ins()


@hookimpl
def qcore_evidence() -> Path:
    return Path(__file__).with_name("evidence.json")


@hookimpl
def qcore_devices() -> Sequence[Device]:
    return devices()


@hookimpl
def qcore_report() -> Mapping[str, str]:
    return report()
