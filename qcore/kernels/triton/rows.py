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

_FAMILIES: tuple[tuple[str, Accepts, str, str], ...] = (
    ("integers", Accepts(("int?", "uint?"), (*_GROUPS, "channel", "tensor"), (None, "stored", "float"), ordered=True),
     "integers:IntegerLinear", "codes of 1 to 8 bits; whole numbers are multiplied, and the sums of a group scaled"),
    ("floats", Accepts(("fp8", "e4m3", "e4m3fnuz", "e5m2", "e3m2", "e2m3", "e2m1"), (*_GROUPS, *_TILES, *_MICROSCALES, "channel", "tensor")),
     "floats:FloatLinear", "small floats, MX and NVFP4; bits are moved to the activations' type, and the sums of a group scaled"),
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
               features=features, requires=requires, ragged=family != "codebooks", architectures=architectures)
        for family, accepts, implementation, note in _FAMILIES
    ]  # fmt: skip
