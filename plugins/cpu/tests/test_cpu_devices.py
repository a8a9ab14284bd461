"""Detection, on this host and from the facts of others."""

import platform
import time

import pytest

from qcore_cpu.devices import cpu_device, free_memory

SAPPHIRE_RAPIDS = """processor : 0
model name : Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags : fpu sse4_2 avx avx2 fma avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8
"""
HASWELL = """processor : 0
model name : Intel(R) Core(TM) i7-4790 CPU @ 3.60GHz
flags : fpu sse4_2 avx f16c avx2 bmi2 fma
"""
CORE2 = "model name : Intel(R) Core(TM)2 Duo\nflags : fpu sse2 ssse3\n"
GRAVITON3 = "processor : 0\nFeatures : fp asimd asimddp sve asimdfhm bf16 i8mm\nCPU implementer : 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "column", "has", "lacks", "dtype"),
    [
        (SAPPHIRE_RAPIDS, "x86_64", "x86_cpu", {"avx512f", "amx_int8", "avx512_bf16"}, {"avx_vnni"}, "bfloat16"),
        (HASWELL, "x86_64", "x86_cpu", {"avx2", "fma"}, {"avx512f"}, "float32"),
        (CORE2, "AMD64", "x86_cpu", set(), {"avx2"}, "float32"),
        (GRAVITON3, "aarch64", "arm_cpu", {"i8mm", "asimddp", "bf16"}, {"avx2"}, "bfloat16"),
        (GRAVITON3, "arm64", "arm_cpu", {"sve"}, set(), "bfloat16"),
    ],
)
def test_recorded_cpus(cpuinfo: str, machine: str, column: str, has: set[str], lacks: set[str], dtype: str) -> None:
    device = cpu_device(cpuinfo, machine)
    assert device.platform == column and device.fast_dtype == dtype
    assert has <= device.features and not lacks & device.features


def test_this_host() -> None:
    began = time.perf_counter()
    device = cpu_device()
    assert time.perf_counter() - began < 0.5
    assert device.torch_device == "cpu" and device.name
    assert device.memory == pytest.approx(free_memory(), rel=0.2) and device.memory > 1 << 28
    if platform.machine() == "x86_64":
        assert device.platform == "x86_cpu"


def test_without_vector_instructions_the_reference_runs_and_says_so() -> None:
    from qcore.discovery import registry
    from qcore.scheme import Scheme
    from qcore.select import LayerRequest, select

    request = LayerRequest("linear", Scheme.parse("W4A16-g32-sym"), (64, 64), "bfloat16")
    selection = select(request, "x86_cpu", registry().kernels, cpu_device(CORE2, "x86_64"))
    assert selection.kernel is not None and selection.kernel.name == "reference_linear"
    refused = {c.kernel.name: c.refusal for c in selection.candidates if c.refusal}
    assert refused["torch_int4pack"].code == "wrong-device" and "avx2" in refused["torch_int4pack"].fact
