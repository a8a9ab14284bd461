"""Programs compiled by libtpu for every generation, with no TPU: what it says of them, and that the checks would find a dense weight."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from qcore.kernel import Kernel
from qcore.platform import Target
from qcore.scheme import Scheme
from qcore.testing.cases import claimed, row_schemes
from qcore_tpu.chips import chip
from qcore_tpu.kernels.linear import IntegerLinear, PlanesLinear
from qcore_tpu.kernels.pallas import product
from qcore_tpu.kernels.program import COLUMNS, OUTPUTS, ROWS, ProductProgram
from qcore_tpu.kernels.rounded import RoundedFloatLinear, RoundedIntegerLinear
from qcore_tpu.plugin import qcore_kernels, qcore_platforms

(PLATFORM,) = qcore_platforms()
LINEARS = [kernel for kernel in qcore_kernels() if kernel.op == "linear"]
LARGEST = "W4A16-g128-asym W8A8-int8-dyn W8A8-fp8-dyn W4A16-nf4-g64 W4A16-gguf:q4_k W3A16-gguf:iq3_s W8A16-fp8-channel W8A8-fp8-block128"
CASES = [(kernel, scheme) for kernel in LINEARS for scheme in claimed(kernel, map(Scheme.parse, LARGEST.split()))]


@pytest.mark.parametrize("target", PLATFORM.targets, ids=lambda target: target.architecture)
@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=[f"{kernel.name}-{scheme}" for kernel, scheme in CASES])
def test_programs_compile_and_hold_nothing_dense(kernel: Kernel, scheme: Scheme, target: Target) -> None:
    made = kernel.load()
    assert issubclass(made, PlanesLinear)
    for dtype in kernel.dtypes if target.architecture == "v4" else kernel.dtypes[:1]:  # v4 has the least memory
        for program in made.programs(scheme, dtype, target)[: len(ROWS)]:  # experts are lane_experts.py's
            found = program.compile(target)
            assert found["flops"] >= 2 * program.rows * COLUMNS * OUTPUTS
            assert found["temporary bytes"] == 0 and found["bytes of code"] > 0, program.name
            if program.rows <= 16:
                assert found["bytes moved"] <= 1.02 * found["bytes needed"], program.name


def test_every_scheme_of_the_matrix_that_is_claimed_has_programs() -> None:
    (target, *_) = PLATFORM.targets
    for kernel in LINEARS:
        schemes = claimed(kernel, row_schemes())
        made = kernel.load()
        assert schemes and issubclass(made, PlanesLinear)
        for scheme in schemes:
            stacked = scheme.input is None or scheme.input.outliers is None
            assert len(made.programs(scheme, "bfloat16", target)) == len(ROWS) + stacked


def test_a_dense_weight_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same codes, unpacked by XLA before the product."""

    def dense(x: jax.Array, parts: dict[str, jax.Array], **_: object) -> jax.Array:
        codes = jnp.stack([parts["codes"] & 15, parts["codes"] >> 4], 1).reshape(x.shape[1], -1).astype(jnp.float32)
        scales = jnp.repeat(parts["scales"].reshape(-1, codes.shape[1]), 128, 0)
        return x @ ((codes - 8) * scales).astype(x.dtype)

    (target,) = (target for target in PLATFORM.targets if target.architecture == "v5e")
    program = IntegerLinear.programs(Scheme.parse("W4A16-g128-sym"), "bfloat16", target)[1]
    assert program.compile(target)["temporary bytes"] == 0
    monkeypatch.setattr("qcore_tpu.kernels.pallas.product", dense)
    with pytest.raises(ValueError, match=r"(temporary bytes|it moves)"):
        program.compile(target)


@pytest.mark.parametrize(
    ("linear", "scheme", "architecture", "operands"),
    [
        (RoundedIntegerLinear, "W8A8-int8-dyn", "v5e", "i8"),
        (RoundedIntegerLinear, "W8A8-int8-static", "v6e", "i8"),
        (RoundedIntegerLinear, "W8A8-int8-dyn", "v4", "bf16"),
        (RoundedFloatLinear, "W8A8-fp8-dyn", "v7x", "f8_e4m3fn"),
        (RoundedFloatLinear, "W8A8-fp8-dyn", "v5e", "bf16"),
    ],
)
def test_the_matrix_unit_multiplies_what_it_can(
    linear: type[PlanesLinear], scheme: str, architecture: str, operands: str
) -> None:
    target = next(target for target in PLATFORM.targets if target.architecture == architecture)
    program: ProductProgram = linear.programs(Scheme.parse(scheme), "bfloat16", target)[1]
    parts = {name: jax.ShapeDtypeStruct(shape, kind) for name, shape, kind in program.parts}
    x = jax.ShapeDtypeStruct((program.rows, program.columns), program.dtype)
    text = str(jax.make_jaxpr(lambda x, parts: product(x, parts, program.form, chip(architecture)))(x, parts))
    sums = "i32" if operands == "i8" else "f32"
    (result,) = set(re.findall(r":(\w+)\[\d+,\d+\] = dot_general\[", text))
    assert result == sums and f":{operands}[1024,512]" in text
