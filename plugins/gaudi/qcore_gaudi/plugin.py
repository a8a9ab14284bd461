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


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return [Platform("gaudi", "Intel Gaudi", ARCHITECTURES, portable=True)]


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    def hpu(
        name: str, accepts: Accepts, cost: float, implementation: str, note: str, *, op: Op = "linear", dtypes: tuple[str, ...] = ("bfloat16",),
        multiples: tuple[int, int] = (1, 1),
    ) -> Kernel:  # fmt: skip
        return Kernel(f"gaudi_{name}", "hpu", op, ("gaudi",), accepts, dtypes, cost, f"qcore_gaudi.kernels.{implementation}", note,
                      requires=(("torch", "2.8"),), multiples=multiples, architectures=("gaudi2", "gaudi3"))  # fmt: skip

    rows = ("channel", "tensor")
    return [
        hpu("int4", Accepts(("int4", "uint4"), (*_GROUPS, "channel"), (None, "stored"), ordered=True), 0.6, "int4:Int4Linear",
            "weights become bfloat16 at every call; scales in bfloat16", multiples=(8, 8)),
        hpu("fp8", Accepts(("fp8",), rows, inputs=("fp8-token-dyn", "fp8-tensor")), 0.4, "fp8:Fp8ProductLinear",
            "e4m3 x e4m3; rows of weights and inputs with numbers above 240, which Gaudi2 lacks, are halved and their scales doubled", multiples=(16, 16)),
        hpu("fp8_weights", Accepts(("fp8",), rows), 0.6, "fp8:Fp8Linear",
            "weights become bfloat16 at every call; rows with numbers above 240, which Gaudi2 lacks, are halved and their scales doubled", multiples=(16, 16)),
        hpu("kv_cache", Accepts(("fp8",), rows), 0.5, "kv_cache:KvCache",
            "keys and values in e4m3, all of its numbers on Gaudi2 too; attention gets all of them dequantized",
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
