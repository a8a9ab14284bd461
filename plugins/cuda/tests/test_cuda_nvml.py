"""The calls of NVML, against a library with its functions and structures, compiled here."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qcore_cuda.nvml import Gpu, NvmlError, probe

SOURCE = r"""
#include <stdio.h>
#include <string.h>
#ifndef INIT
#define INIT 0
#endif
#ifndef COUNT
#define COUNT 0
#endif
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { const char *name, *uuid; int major, minor; unsigned long long free; int mig; } gpu_t;
static gpu_t gpus[] = {
    {"NVIDIA H100 80GB HBM3", "GPU-5c8f3f1e-8a4a-5f4e-9b0e-7d7b0f1a2c3d", 9, 0, 84987740160ull, 1},
    {"Tesla V100-SXM2-16GB", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 7, 0, 16935682048ull, -1},
    {"NVIDIA GB10", "GPU-11111111-2222-3333-4444-555555555555", 12, 1, 0, -1},
};
static int running;
int nvmlInit_v2(void) { running = !INIT; return INIT; }
int nvmlShutdown(void) { running = 0; return 0; }
static int write(char *out, unsigned size, const char *text) {
    if (!running) return 1;
    if (strlen(text) + 1 > size) return 7;
    strcpy(out, text);
    return 0;
}
int nvmlSystemGetDriverVersion(char *out, unsigned size) { return write(out, size, "570.172.08"); }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = 4; return running ? COUNT : 1; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    if (index > 2) return 15;
    *out = &gpus[index];
    return 0;
}
int nvmlDeviceGetName(gpu_t *gpu, char *out, unsigned size) { return write(out, size, gpu->name); }
int nvmlDeviceGetUUID(gpu_t *gpu, char *out, unsigned size) { return write(out, size, gpu->uuid); }
int nvmlDeviceGetCudaComputeCapability(gpu_t *gpu, int *major, int *minor) {
    *major = gpu->major; *minor = gpu->minor;
    return 0;
}
int nvmlDeviceGetMemoryInfo(gpu_t *gpu, memory_t *out) {
    if (!gpu->free) return 3;
    out->total = gpu->free + 1; out->free = gpu->free; out->used = 1;
    return 0;
}
#ifndef OLD
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = 12080; return 0; }
int nvmlDeviceGetMigMode(gpu_t *gpu, unsigned *current, unsigned *pending) {
    if (gpu->mig < 0) return 3;
    *current = gpu->mig; *pending = 0;
    return 0;
}
#endif
"""

H100 = Gpu("NVIDIA H100 80GB HBM3", "GPU-5c8f3f1e-8a4a-5f4e-9b0e-7d7b0f1a2c3d", (9, 0), 84987740160, mig=True)
V100 = Gpu("Tesla V100-SXM2-16GB", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", (7, 0), 16935682048)
GB10 = Gpu("NVIDIA GB10", "GPU-11111111-2222-3333-4444-555555555555", (12, 1), None)

Library = Callable[..., str]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")

    def build(*macros: str) -> str:
        source, out = tmp_path / "nvml.c", tmp_path / "libnvml.so"
        source.write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", *(f"-D{m}" for m in macros), "-o", out, source], check=True)
        return str(out)

    return build


def test_every_fact_is_read(library: Library) -> None:
    facts = probe(library())
    assert facts.driver == "570.172.08" and facts.cuda == (12, 8)
    assert facts.gpus[:3] == (H100, V100, GB10)
    assert facts.gpus[3].capability is None and "fallen off the bus (15)" in facts.gpus[3].fault


def test_an_older_driver_lacks_functions(library: Library) -> None:
    facts = probe(library("OLD"))
    assert facts.cuda is None and facts.driver == "570.172.08"
    assert facts.gpus[0] == Gpu(H100.name, H100.uuid, H100.capability, H100.free, mig=False)


@pytest.mark.parametrize(
    ("macro", "says"),
    [
        ("INIT=9", "nvmlInit_v2 failed: the driver is not loaded"),
        ("INIT=18", "restart the host"),
        ("COUNT=999", "(999)"),
    ],
)
def test_a_broken_driver_is_one_kind_of_error(library: Library, macro: str, says: str) -> None:
    with pytest.raises(NvmlError) as caught:
        probe(library(macro))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["libqcore-absent.so.1", "libc.so.6", __file__])
def test_what_is_not_the_library_is_the_same_kind_of_error(name: str) -> None:
    with pytest.raises(NvmlError):
        probe(name)
