"""Compute capability -> column, architecture and features.

Sources: NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities" (shared memory too); the PTX ISA's tables of mma, wmma and dp4a for the
capability from which each data type runs on tensor cores.
"""

from __future__ import annotations

from qcore.platform import Platform, Target

Capability = tuple[int, int]

_SHARED_KIB = {"sm_70": 96, "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227,
               "sm_120": 99, "sm_121": 99}  # fmt: skip
"""Shared memory that a block may have, of the architectures that Triton 3.9's compilers make code for."""

_FIRST_MATRIX = 80
"""From where Triton uses tensor cores; before, it makes products one by one."""
_FIRST_FP8 = 89
_RESERVED = 1024
"""Bytes of shared memory that the driver takes of every block from Ampere on (CUDA C++ Programming Guide, "Shared Memory")."""


def _platform(name: str, title: str, *architectures: str) -> Platform:
    targets = tuple(
        Target(
            architecture,
            "cuda",
            number,
            32,
            _SHARED_KIB[architecture] << 10,
            matrix=number >= _FIRST_MATRIX,
            fp8="e4m3fn" if number >= _FIRST_FP8 else "",
            reserved=_RESERVED if number >= _FIRST_MATRIX else 0,
        )
        for architecture in architectures
        if architecture in _SHARED_KIB
        for number in [int(architecture.removeprefix("sm_"))]
    )
    older = all(not target.matrix for target in targets)
    return Platform(
        name, title, architectures, portable=True, targets=targets, fast_dtype="float16" if older else "bfloat16"
    )


PLATFORMS = (
    _platform("volta", "Volta", "sm_70", "sm_72"),
    _platform("turing", "Turing", "sm_75"),
    _platform("ampere", "Ampere", "sm_80", "sm_86", "sm_87", "sm_88"),
    _platform("ada", "Ada", "sm_89"),
    _platform("hopper", "Hopper", "sm_90"),
    # CUDA 12 calls Thor sm_101, CUDA 13 sm_110.
    _platform("blackwell", "Blackwell", "sm_100", "sm_101", "sm_103", "sm_110", "sm_120", "sm_121"),
)

_COLUMNS = {architecture: platform.id for platform in PLATFORMS for architecture in platform.architectures}

_FEATURES: tuple[tuple[str, Capability], ...] = (
    ("dp4a", (6, 1)),
    ("fp16_tensor_core", (7, 0)),
    ("int8_tensor_core", (7, 2)),
    ("bf16", (8, 0)),
    ("fp8", (8, 9)),
    ("fp4", (10, 0)),
)
_TOOLKITS: tuple[tuple[str, tuple[int, int]], ...] = (("cuda12.9", (12, 9)),)
"""Versions of CUDA, the libraries of which torch is built with, that kernels ask for."""


def architecture(capability: Capability) -> str:
    """(9, 0) -> sm_90."""
    return f"sm_{capability[0]}{capability[1]}"


def column(capability: Capability) -> str | None:
    """The platform's id; None where no column holds this GPU."""
    return _COLUMNS.get(architecture(capability))


def features(capability: Capability, cuda: tuple[int, int] = (0, 0)) -> frozenset[str]:
    """What its cores multiply natively, and from which versions on CUDA's libraries are, in the words that kernels ask for. cuda: that torch is built for."""
    known = ((_FEATURES, capability), (_TOOLKITS, cuda))
    return frozenset(name for names, found in known for name, first in names if found >= first)


def fast_dtype(capability: Capability) -> str:
    """bfloat16 from the first capability whose tensor cores have it."""
    return "bfloat16" if "bf16" in features(capability) else "float16"


def built_for(capability: Capability, built: list[str]) -> bool:
    """Whether code for these targets (`torch.cuda.get_arch_list()`) runs on a GPU: machine code (`sm_80`) on its own
    major version from its own minor one on, PTX (`compute_80`) on all later ones. Suffixed targets (`sm_90a`) run on
    that one alone. An empty list says nothing."""
    for target in built:
        kind, _, digits = target.partition("_")
        number = digits.rstrip("af")
        if not number.isdigit():
            continue
        found = int(number[:-1]), int(number[-1])
        same = found == capability if digits != number else found[0] == capability[0] and found <= capability
        if same or (kind == "compute" and found <= capability):
            return True
    return not built
