"""The rows of the kernels in Triton, which each plugin registers for its own platforms under its own prefix. Nothing of Triton or torch is imported."""

from __future__ import annotations

from collections.abc import Sequence

from qcore.kernel import Accepts, Kernel

_SIZES = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 1024, 2048)
"""Groups are whole sections, of 16 columns at least."""
_GROUPS = tuple(f"g{size}" for size in _SIZES)
_FLAT = tuple(f"flat{size}" for size in _SIZES)
_NESTED = tuple(f"flat{size}:dynamic8+flat{256 * size}" for size in _SIZES)
_TILES = ("block32", "block64", "block128", "tile1x128", "tile64x32")
_MICROSCALES = ("g32:e8m0", "g16:e4m3fn", "g16:e4m3fn+tensor")
_FLOATS = ("fp8", "e4m3", "e4m3fnuz", "e5m2", "e3m2", "e2m3", "e2m1")
_FLOAT_SCALES = (*_GROUPS, *_TILES, *_MICROSCALES, "channel", "tensor")

_FAMILIES: tuple[tuple[str, Accepts, str, str], ...] = (
    ("integers", Accepts(("int?", "uint?"), (*_GROUPS, "channel", "tensor"), (None, "stored", "float"), ordered=True),
     "integers:IntegerLinear", "codes of 1 to 8 bits; whole numbers are multiplied, and the sums of a group scaled"),
    ("floats", Accepts(_FLOATS, _FLOAT_SCALES),
     "floats:FloatLinear", "small floats, MX and NVFP4; bits are moved to the activations' type, and the sums of a group scaled"),
    ("rounded_integers", Accepts(("int?", "uint?"), (*_GROUPS, "channel", "tensor"), (None, "stored", "float"), ordered=True,
                                 inputs=("int?-token-*dyn", "int?-g*-dyn", "int8-token-sym-dyn-outliers*", "int?-tensor-*", "fp8-token-dyn*",
                                         "fp8-tensor*", "fp8-g*-dyn")),
     "inputs:RoundedLinear", "inputs are rounded as the scheme says, and what they stand for is multiplied in 16 bits by whole numbers"),
    ("rounded_floats", Accepts(_FLOATS, _FLOAT_SCALES,
                               inputs=("fp8-token-dyn*", "fp8-tensor*", "fp8-g*-dyn", "e?m?-g*-dyn", "int?-token-*dyn", "int?-tensor-*")),
     "inputs:RoundedLinear", "inputs are rounded as the scheme says, and what they stand for is multiplied in 16 bits by small floats"),
    ("codebooks", Accepts(("nf4", "fp4"), (*_GROUPS, *_FLAT, *_NESTED)),
     "codebooks:CodebookLinear", "4-bit codebooks; entries in the activations' type, and the sums of a group scaled"),
    ("grids", Accepts(("gguf:iq1_?", "gguf:iq2_xxs", "gguf:iq2_xs")),
     "grids:GridLinear", "ggml's smallest blocks; tuples of weights are looked up, scaled, and the sums of a block scaled once more"),
    ("blocks", Accepts(("gguf:q*", "gguf:tq*", "gguf:iq4_*", "gguf:iq3_*", "gguf:iq2_s", "gguf:*fp4")),
     "blocks:BlockLinear", "ggml's blocks taken apart; codes are multiplied, and the sums of a group scaled"),
)  # fmt: skip


def triton_kernels(
    prefix: str, platforms: tuple[str, ...], dtypes: tuple[str, ...], *, features: tuple[frozenset[str], ...] = (),
    requires: tuple[tuple[str, str], ...] = (), architectures: tuple[str, ...] = ("*",),
) -> Sequence[Kernel]:  # fmt: skip
    """One row for each family of elements, named `prefix_family`."""
    return [
        Kernel(f"{prefix}_{family}", "triton", "linear", platforms, accepts, dtypes, 0.5, f"qcore.kernels.triton.{implementation}", note,
               features=features, requires=requires, ragged=family != "codebooks", architectures=architectures, compiles=True, experts=True)
        for family, accepts, implementation, note in _FAMILIES
    ]  # fmt: skip


def triton_kv_cache(
    prefix: str, platforms: tuple[str, ...], dtypes: tuple[str, ...], *, attends: bool = True, features: tuple[frozenset[str], ...] = (),
    requires: tuple[tuple[str, str], ...] = (), architectures: tuple[str, ...] = ("*",),
) -> Kernel:  # fmt: skip
    """One stored scale, or one for each head, or at run time one for each token and head. attends: where Triton has the use of matrix units; without them
    attention would take longer than a copy of the cache."""
    implementation, read = (
        ("attention:AttendedKvCache", "attention of up to 16 tokens reads them as they are, that of more and under soft caps gets all of them dequantized")
        if attends
        else ("kv_cache:KvCache", "attention gets all of them dequantized, at every token: no matrix unit for Triton")
    )  # fmt: skip
    return Kernel(f"{prefix}_kv_cache", "triton", "kv_cache", platforms, Accepts(("fp8", "e5m2", "int8"), ("tensor", "channel"), (None, "stored")),
                  dtypes, 0.5, f"qcore.kernels.triton.{implementation}", f"keys and values in 8 bits, rounded as they are written; {read}",
                  features=features, requires=requires, ragged=True, architectures=architectures, compiles=True)  # fmt: skip


def triton_int8(
    prefix: str, platforms: tuple[str, ...], *, features: tuple[frozenset[str], ...] = (), requires: tuple[tuple[str, str], ...] = (),
    architectures: tuple[str, ...] = ("*",),
) -> Kernel:  # fmt: skip
    """8-bit integers on matrix units that have them."""
    return Kernel(f"{prefix}_int8", "triton", "linear", platforms,
                  Accepts(("int8",), ("channel", "tensor"), inputs=("int8-token-sym-dyn", "int8-tensor-sym")),
                  ("bfloat16", "float16"), 0.35, "qcore.kernels.triton.eights:EightsLinear",
                  "int8 x int8 on matrix units, exact in int32; inputs are rounded by one kernel before",
                  features=features, requires=requires, architectures=architectures, compiles=True, experts=True)  # fmt: skip


def triton_fp8(
    prefix: str, platforms: tuple[str, ...], *, features: tuple[frozenset[str], ...] = (), requires: tuple[tuple[str, str], ...] = (),
    architectures: tuple[str, ...] = ("*",),
) -> Sequence[Kernel]:  # fmt: skip
    """e4m3 on matrix units that have it: a scale for each row, for all rows of inputs at run time, or for each tile and group of 128 columns."""
    return [
        Kernel(f"{prefix}_fp8{suffix}", "triton", "linear", platforms, accepts, ("bfloat16", "float16"), 0.35,
               f"qcore.kernels.triton.{implementation}", f"e4m3 x e4m3 on matrix units{note}",
               features=features, requires=requires, architectures=architectures, ragged=suffix == "_block128", compiles=True, experts=True)
        for suffix, implementation, note, accepts in (
            ("", "eights:EightsLinear", "; inputs are rounded by one kernel before",
             Accepts(("fp8",), ("channel", "tensor"), inputs=("fp8-token-dyn*", "fp8-tensor"))),
            ("_tensor", "whole:WholeEightsLinear", "; torch's operators find the scale of all inputs, one kernel rounds them",
             Accepts(("fp8",), ("channel", "tensor"), inputs=("fp8-tensor-dyn*",))),
            ("_block128", "eights:EightsLinear", ", the sums of 128 columns scaled; inputs are rounded by one kernel before",
             Accepts(("fp8",), ("block128", "tile1x128"), inputs=("fp8-g128-dyn",))),
        )
    ]  # fmt: skip
