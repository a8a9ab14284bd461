"""The plugin's kernels as nodes of torch-xla's graphs: run on a CPU by XLA (PJRT) against the definition, and compiled for TPUs as they are lowered there."""

from __future__ import annotations

import math

import jax
import pytest
import torch
from tpu_models import STAND_IN

from qcore.kernel import Kernel
from qcore.platform import Target
from qcore.scheme import Scheme
from qcore.testing.cases import catalogue, claimed
from qcore.testing.checks import CHECKS, Bench
from qcore.testing.layers import random_layer
from qcore_tpu import lazy
from qcore_tpu.ahead import placed
from qcore_tpu.chips import chip
from qcore_tpu.kernels.linear import PlanesLinear
from qcore_tpu.kernels.pallas import product
from qcore_tpu.plugin import qcore_kernels, qcore_platforms

LINEARS = [kernel for kernel in qcore_kernels() if kernel.op == "linear"]
TARGETS = [target for target in qcore_platforms()[0].targets if target.architecture != "v7x"]
"""libtpu 0.0.21 knows none newer."""


def bench(kernel: Kernel, dtype: str) -> Bench:
    """With the first of its schemes: all of each are tried over jax itself (`make test-tpu`), whose functions these are."""
    assert STAND_IN.torch_device == "xla"
    scheme = claimed(kernel, catalogue())[0]
    return Bench(kernel, scheme, dtype, "odd", STAND_IN, random_layer(scheme, 48, 512))


@pytest.mark.parametrize("kernel", LINEARS, ids=lambda kernel: kernel.name)
def test_a_product_of_each_kernel(kernel: Kernel) -> None:
    for dtype, rows in (("bfloat16", 1), ("float32", 17)):
        tried = bench(kernel, dtype)
        x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(3)).to(getattr(torch, dtype))
        tried.compare(f"{rows} rows", tried.run(x), tried.product(x))


@pytest.mark.parametrize("kernel", LINEARS, ids=lambda kernel: kernel.name)
def test_experts_are_one_product(kernel: Kernel) -> None:
    assert (CHECKS["stacked_experts"](bench(kernel, "bfloat16")) > 0) == (kernel.name != "tpu_llm_int8")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.architecture)
@pytest.mark.parametrize("text", ["W4A16-g128-sym", "W8A8-int8-dyn"])
def test_nodes_compile_for_every_generation(text: str, target: Target) -> None:
    """What becomes a node there holds Pallas's program as one call; libtpu, in the version that torch-xla takes, compiles it without a dense copy of the weight, and of experts'."""
    scheme, place = Scheme.parse(text), placed(str(target.name))
    made = next(kernel for kernel in LINEARS if kernel.accepts.refuse(scheme) is None).load()
    assert issubclass(made, PlanesLinear)
    for program in made.programs(scheme, "bfloat16", target):
        parts = {name: (shape, kind) for name, shape, kind in program.parts}
        static = {"form": program.form, "chip": chip(target.architecture), "mesh": None}
        exported = lazy.exported(product, ((program.rows, program.columns), "bfloat16"), parts, static, "tpu")
        assert "tpu_custom_call" in exported.mlir_module()
        shaped = [jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=place) for part in exported.in_avals]
        memory = jax.jit(exported.call, out_shardings=place).lower(*shaped).compile().memory_analysis()
        *experts, _, outputs = parts["codes"][0]
        assert memory.temp_size_in_bytes < 2 * outputs * program.columns * math.prod(experts) // 64, program.name
