"""The plugin's kernels as nodes of torch-xla's graphs: run on a CPU by XLA (PJRT) against the definition, and compiled for TPUs as they are lowered there."""

from __future__ import annotations

import jax
import pytest
import torch

from qcore.kernel import Kernel
from qcore.scheme import Scheme
from qcore.testing.cases import catalogue, claimed
from qcore.testing.checks import Bench
from qcore.testing.layers import random_layer
from qcore_tpu import lazy
from qcore_tpu.ahead import placed
from qcore_tpu.chips import chip
from qcore_tpu.kernels.pallas import product
from qcore_tpu.plugin import qcore_kernels, qcore_platforms, qcore_stand_ins

(STAND_IN,) = qcore_stand_ins()
LINEARS = [kernel for kernel in qcore_kernels() if kernel.op == "linear"]
TARGETS = [target for target in qcore_platforms()[0].targets if target.architecture != "v7x"]
"""libtpu 0.0.21 knows none newer."""


@pytest.mark.parametrize("kernel", LINEARS, ids=lambda kernel: kernel.name)
def test_a_product_of_each_kernel(kernel: Kernel) -> None:
    """All schemes of each are tried over jax itself (`make test-tpu`), whose functions these are."""
    assert STAND_IN.torch_device == "xla"
    scheme = claimed(kernel, catalogue())[0]
    layer = random_layer(scheme, 48, 512)
    for dtype, rows in (("bfloat16", 1), ("float32", 17)):
        bench = Bench(kernel, scheme, dtype, "odd", STAND_IN, layer)
        x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(3)).to(getattr(torch, dtype))
        bench.compare(f"{rows} rows", bench.run(x), bench.product(x))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.architecture)
@pytest.mark.parametrize("text", ["W4A16-g128-sym", "W8A8-int8-dyn"])
def test_the_node_compiles_for_every_generation(text: str, target: object) -> None:
    """What becomes a node there holds Pallas's program as one call; libtpu, in the version that torch-xla takes, compiles it without a dense copy of the weight."""
    scheme, (rows, columns) = Scheme.parse(text), (1024, 1024)
    kernel = next(kernel for kernel in LINEARS if kernel.accepts.refuse(scheme) is None)
    module = kernel.load().from_layer(random_layer(scheme, rows, columns), torch.bfloat16)
    parts = {name: (tuple(part.shape), str(part.dtype).removeprefix("torch.")) for name, part in module.named_buffers()}
    static = {"form": module.form, "chip": chip(target.architecture), "mesh": None}  # type: ignore[attr-defined]
    exported = lazy.exported(product, ((16, columns), "bfloat16"), parts, static, "tpu")
    assert "tpu_custom_call" in exported.mlir_module()
    place = placed(str(target.name))  # type: ignore[attr-defined]
    shaped = [jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=place) for part in exported.in_avals]
    memory = jax.jit(exported.call, out_shardings=place).lower(*shaped).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * columns * 2 // 8
