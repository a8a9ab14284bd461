"""What this plugin declares: its platform, the kernels' rows, and this host's devices. The core's portable kernels run on them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcore.hookspecs import hookimpl
from qcore.kernel import Accepts, Kernel, Op
from qcore.platform import Device, Platform
from qcore_neuron.devices import ARCHITECTURES, devices, report, stand_ins

QCORE_API = (1, 2)

_ROWS = ("channel", "tensor")
_GROUPS = tuple(f"g{size}" for size in (16, 32, 64, 96, 128, 160, 192, 256, 512, 1024))
_FLAT = tuple(f"flat{size}" for size in (32, 64, 128, 256, 512, 1024))
_NESTED = tuple(f"flat{size}:dynamic8+flat{256 * size}" for size in (32, 64, 128, 256, 512, 1024))
_TILES = ("block32", "block64", "block128", "tile1x128")
_MICROSCALES = ("g32:e8m0", "g16:e4m3fn", "g16:e4m3fn+tensor")
_INT8 = ("int8-token-sym-dyn", "int8-tensor-sym")
_AFFINE = ("int8-token-asym-dyn", "int8-tensor-asym")
_FP8 = ("fp8-token-dyn", "fp8-tensor")
_ZEROS = (None, "stored", "float")
_E4M3 = (frozenset({"e4m3fn"}),)


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return [Platform("neuron", "AWS Neuron", ARCHITECTURES, portable=True)]


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    def xla(
        name: str, accepts: Accepts, cost: float, implementation: str, note: str, *, op: Op = "linear", multiples: tuple[int, int] = (1, 1),
        features: tuple[frozenset[str], ...] = (),
    ) -> Kernel:  # fmt: skip
        return Kernel(f"neuron_{name}", "neuron", op, ("neuron",), accepts, ("bfloat16", "float32"), cost, f"qcore_neuron.kernels.{implementation}", note,
                      features=features, multiples=multiples)  # fmt: skip

    planes, fp8 = (8, 8), "rows or tiles with numbers above 240, which most chips lack, are held as halves"
    return [
        xla("int8", Accepts(("int8",), _ROWS), 0.5, "eight_bits:WeightOnlyLinear",
            "int8 is what weights are stored in: codes become the activations' type, scales follow the sums"),
        xla("int8_inputs", Accepts(("int8",), _ROWS, inputs=_INT8), 0.5, "eight_bits:Int8ProductLinear",
            "weights and inputs are rounded to int8, and multiplied as whole numbers in the activations' type, for the chips multiply no integers"),
        xla("fp8", Accepts(("fp8",), _ROWS), 0.5, "eight_bits:WeightOnlyLinear",
            f"e4m3 is what weights are stored in; {fp8}", features=_E4M3),
        xla("fp8_inputs", Accepts(("fp8",), _ROWS, inputs=_FP8), 0.5, "eight_bits:Fp8ProductLinear",
            f"weights and inputs are rounded to e4m3, and multiplied in the activations' type; weights: {fp8}", features=_E4M3),
        xla("fp8_tiles", Accepts(("fp8",), (*_GROUPS, *_TILES, "g32:e8m0"), inputs=("none", *_FP8, "fp8-g128-dyn")), 0.6, "tiles:Fp8TileLinear",
            f"e4m3 weights are scaled by group or tile at every call; {fp8}", features=_E4M3, multiples=(8, 1)),
        xla("e5m2", Accepts(("e5m2",), _ROWS), 0.5, "eight_bits:WeightOnlyLinear", "e5m2 is what weights are stored in, the same on all chips"),
        xla("integers", Accepts(("int?", "uint?"), (*_GROUPS, *_ROWS), _ZEROS, ordered=True), 0.7, "integers:IntegerLinear",
            "codes of 1 to 8 bits are taken out of bytes by division and floor, and scaled in float32 at every call", multiples=planes),
        xla("rounded_integers", Accepts(("int?", "uint?"), (*_GROUPS, *_ROWS), _ZEROS, ordered=True, inputs=(*_INT8, *_AFFINE, *_FP8)), 0.8,
            "integers:RoundedIntegerLinear", "the same, of inputs that are rounded to int8 or e4m3", multiples=planes),
        xla("blocks", Accepts(("gguf:*",)), 0.7, "blocks:BlockLinear",
            "ggml's blocks, held as codes with scales of runs and blocks, are put together in float32 at every call", multiples=planes),
        xla("floats", Accepts(("fp8", "e4m3", "e4m3fnuz", "e3m2", "e2m3", "e2m1"), (*_GROUPS, *_FLAT, *_TILES, *_MICROSCALES, *_ROWS),
                              inputs=("none", *_FP8, "fp8-g128-dyn", "e2m1-g*-dyn")), 1.0, "floats:FloatLinear",
            "small floats are taken apart by arithmetic, with all numbers of their formats on every chip; MX and NVFP4 too", multiples=planes),
        xla("codebooks", Accepts(("nf4", "fp4"), (*_GROUPS, *_FLAT, *_NESTED)), 0.9, "codebooks:CodebookLinear",
            "entries are chosen bit by bit, without a gather, and scaled in float32 at every call", multiples=planes),
        xla("llm_int8", Accepts(("int8",), ("channel",), inputs=("int8-token-sym-dyn-outliers*",)), 0.5, "llm_int8:LlmInt8Linear",
            "columns with outliers stay in 16 bits, the others are rounded to int8, and both meet the same codes"),
        xla("embedding", Accepts(("int?", "uint?"), (*_GROUPS, *_ROWS), _ZEROS), 0.5, "integers:IntegerEmbedding",
            "the rows that are looked up are taken out of bytes and scaled in float32", op="embedding", multiples=(1, 8)),
        xla("block_embedding", Accepts(("gguf:*",)), 0.5, "blocks:BlockEmbedding",
            "the rows of ggml's blocks that are looked up are put together in float32", op="embedding", multiples=(1, 8)),
        xla("kv_cache", Accepts(("fp8", "e5m2", "int8"), _ROWS, (None, "stored")), 0.5, "kv_cache:KvCache",
            "keys and values in 8 bits, the bytes that they have everywhere; attention gets all of them dequantized", op="kv_cache"),
    ]  # fmt: skip


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
