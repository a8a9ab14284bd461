"""What this plugin declares: its platform, the kernels' rows, and this host's devices. The core's portable kernels run on them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcore.hookspecs import hookimpl
from qcore.kernel import Accepts, Kernel, Op
from qcore.platform import Device, Platform
from qcore_gaudi.devices import ARCHITECTURES, devices, report, stand_ins

QCORE_API = (1, 2)

_GROUPS = ("g32", "g64", "g96", "g128", "g160", "g192", "g256", "g512", "g1024")
_ROWS = ("channel", "tensor")
_SIZES = (16, *(int(group[1:]) for group in _GROUPS), 2048)
_ANY_GROUP = (*(f"g{size}" for size in _SIZES), *_ROWS)
_FLAT = tuple(text for n in _SIZES for text in (f"flat{n}", f"flat{n}:dynamic8+flat{256 * n}"))
_E4M3_INPUTS = ("fp8-token-dyn", "fp8-tensor", "fp8-tensor-dyn", "fp8-tensor:e8m0ceil-dyn", "fp8-g*:e8m0ceil-dyn")
"""One scale for each row or for all, and INC's powers of two."""
_INPUTS = (
    "none", "int8-token-sym-dyn", "int8-token-asym-dyn", "int8-token-sym-dyn-outliers*", "int8-tensor-sym", "int8-tensor-asym", "int8-tensor-sym-dyn",
    *_E4M3_INPUTS, "fp8-g*-dyn", "e2m1-g*:e8m0*-dyn", "e2m1-g16:e4m3fn+tensor-dyn",
)  # fmt: skip
_FLOAT_SCALES = (*_ANY_GROUP, "block*", "tile*", "g32:e8m0", "g16:e4m3fn", "g16:e4m3fn+tensor")


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return [Platform("gaudi", "Intel Gaudi", ARCHITECTURES, portable=True)]


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    def hpu(
        name: str, accepts: Accepts, cost: float, implementation: str, note: str, *, op: Op = "linear", dtypes: tuple[str, ...] = ("bfloat16",),
        multiples: tuple[int, int] = (1, 1), ragged: bool = False,
    ) -> Kernel:  # fmt: skip
        return Kernel(f"gaudi_{name}", "hpu", op, ("gaudi",), accepts, dtypes, cost, f"qcore_gaudi.kernels.{implementation}", note,
                      requires=(("torch", "2.8"),), multiples=multiples, ragged=ragged, architectures=("gaudi2", "gaudi3"))  # fmt: skip

    dense = "become bfloat16 at every call, by torch's operators; inputs are rounded as the scheme says"
    return [
        hpu("int4", Accepts(("int4", "uint4"), (*_GROUPS, "channel"), (None, "stored"), ordered=True), 0.6, "int4:Int4Linear",
            "weights become bfloat16 at every call; scales in bfloat16", multiples=(8, 8)),
        hpu("fp8", Accepts(("fp8",), _ROWS, inputs=_E4M3_INPUTS), 0.4, "fp8:Fp8ProductLinear",
            "e4m3 x e4m3; rows of weights and inputs with numbers above 240, which Gaudi2 lacks, are halved and their scales doubled", multiples=(16, 16)),
        hpu("fp8_weights", Accepts(("fp8",), _ROWS), 0.6, "fp8:Fp8Linear",
            "weights become bfloat16 at every call; rows with numbers above 240, which Gaudi2 lacks, are halved and their scales doubled", multiples=(16, 16)),
        hpu("integers", Accepts(("int?", "uint?"), _ANY_GROUP, (None, "stored", "float"), ordered=True, inputs=_INPUTS), 0.9, "dense:DenseLinear",
            f"codes of 1 to 8 bits {dense}; int8 x int8 is a product of bfloat16, for Gaudi multiplies no integers", ragged=True),
        hpu("floats", Accepts(("fp8", "e4m3", "e4m3fnuz", "e5m2", "e3m2", "e2m3", "e2m1"), _FLOAT_SCALES, inputs=_INPUTS), 0.9, "dense:DenseLinear",
            f"small floats, MX, NVFP4 and e4m3 by groups and tiles {dense}", ragged=True),
        hpu("codebooks", Accepts(("nf4", "fp4"), (*_ANY_GROUP, *_FLAT)), 0.9, "dense:DenseLinear",
            "looked up in float32, and bfloat16 at every call, by torch's operators"),
        hpu("blocks", Accepts(("gguf:*",)), 0.9, "blocks:BlockLinear",
            "ggml's blocks taken apart; they become bfloat16 at every call, by torch's operators", ragged=True),
        hpu("kv_cache", Accepts(("fp8", "int8"), _ROWS, (None, "stored")), 0.5, "kv_cache:KvCache",
            "keys and values in int8, or in e4m3, all of its numbers on Gaudi2 too; attention gets all of them dequantized",
            op="kv_cache", dtypes=("bfloat16", "float16", "float32")),
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
