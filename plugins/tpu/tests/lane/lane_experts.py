"""A mixture's experts held as one: what rows become blocks, programs for every generation, and whole models, which the decoder takes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from tpu_models import JAX, REFERENCE, STAND_IN

import qcore
from golden_checkpoints import divergence
from mixtures import TOKENS, Mixture
from qcore.kernel import Kernel
from qcore.model.experts import QuantizedExperts
from qcore.model.generate import Stepper
from qcore.model.load import kernel_counts
from qcore.platform import Target
from qcore.scheme import Scheme
from qcore.testing.cases import claimed
from qcore_tpu.ahead import compiled
from qcore_tpu.chips import chip
from qcore_tpu.decoder import CompiledDecoder, CompiledSteps
from qcore_tpu.kernels.experts import blocks_of, rows_of_block
from qcore_tpu.kernels.linear import PlanesLinear
from qcore_tpu.kernels.program import EXPERTS, ProductProgram
from qcore_tpu.plugin import qcore_kernels, qcore_platforms
from qcore_tpu.sharding import AXIS
from test_experts import FORMATS, quantized

(PLATFORM,) = qcore_platforms()
LINEARS = [kernel for kernel in qcore_kernels() if kernel.op == "linear"]
SCHEMES = "W4A16-g128-asym W8A8-int8-dyn W8A8-int8-static W8A8-fp8-dyn W4A16-nf4-g64 W4A16-gguf:q4_k W2A16-gguf:iq2_xs W8A8-fp8-block128 W4A4-mxfp4"
CASES = [(kernel, scheme) for kernel in LINEARS for scheme in claimed(kernel, map(Scheme.parse, SCHEMES.split()))]


@pytest.mark.parametrize("counts", [[1], [0, 0, 3], [5, 0, 1, 40, 0, 16, 17], [1] * 8, [0, 0, 64]])
@pytest.mark.parametrize("size", [16, 32])
def test_every_row_comes_into_a_block_of_its_expert(counts: list[int], size: int) -> None:
    experts = jnp.repeat(jnp.arange(len(counts)), jnp.asarray(counts)).astype(jnp.int32)
    blocks = blocks_of(experts, len(counts), size)
    (used,) = blocks.used.tolist()
    assert used == sum(-(-count // size) for count in counts) <= len(blocks.owner)
    assert blocks.source[blocks.place].tolist() == list(range(len(experts)))
    assert blocks.owner[blocks.place // size].tolist() == experts.tolist()
    assert set(blocks.owner[used:].tolist()) <= {int(experts[-1])}


def test_blocks_are_as_long_as_what_an_expert_gets() -> None:
    assert [rows_of_block(rows, 8, 256) for rows in (1, 8, 128, 200, 1024, 9000)] == [16, 16, 16, 32, 128, 256]


@pytest.mark.parametrize("target", PLATFORM.targets, ids=lambda target: target.architecture)
@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=[f"{kernel.name}-{scheme}" for kernel, scheme in CASES])
def test_programs_hold_nothing_dense_and_fetch_no_experts_that_are_not_chosen(
    kernel: Kernel, scheme: Scheme, target: Target
) -> None:
    """Which XLA would do where vector memory has room for all of their scales."""
    made = kernel.load()
    assert issubclass(made, PlanesLinear)
    program: ProductProgram = made.programs(scheme, "bfloat16", target)[-1]
    assert program.parts[0][1][0] == EXPERTS
    found = program.compile(target)
    assert found["flops"] >= 2 * program.rows * program.columns * program.parts[0][1][-1]
    from qcore_tpu.kernels.pallas import product

    parts = {name: (shape, kind) for name, shape, kind in program.parts}
    x = ((program.rows, program.columns), program.dtype)
    text = compiled(product, target, x, parts, form=program.form, chip=chip(target.architecture)).as_text()
    fetched = re.findall(r"(?:copy|slice)-start\(%parts__(\w+)__", text)
    assert not {"codes", "scales", "zeros", "coarse", "coarse_zeros", "tail"} & set(fetched)
    assert "%parts__codes__" in text


def written(folder: Path, kind: str, form: str) -> Path:
    mixture = Mixture(kind)
    make, config = FORMATS[form]
    return mixture.write(folder, quantized(mixture, make), config)


@pytest.fixture
def torch_alone() -> Iterator[None]:
    """Without torchax, which once it is ready takes copies of a CPU's tensors for its own to make."""
    torchax: Any = sys.modules.get("torchax")
    if torchax is not None:
        torchax.disable_globally()
    yield
    if torchax is not None:
        torchax.enable_globally()


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize(
    ("kind", "form"), [("mixtral", "gptq"), ("qwen3_moe", "compressed-tensors"), ("deepseek_v3", "gptq")]
)
def test_models(kind: str, form: str, tmp_path: Path) -> None:
    path, logits = written(tmp_path, kind, form), []
    for device in (STAND_IN, REFERENCE):
        model = qcore.load_model(path, device=device, dtype=torch.float32)
        if device is STAND_IN:
            experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
            assert experts and all(module.stacked for module in experts)
            assert all(name.startswith("tpu_") for name in kernel_counts(model))
        with torch.no_grad():
            logits.append(model(TOKENS).logits)
    assert divergence(*logits) < 1e-6


def test_the_decoder_takes_a_mixture_and_compiles_nothing_more(tmp_path: Path) -> None:
    path, prompt = written(tmp_path, "mixtral", "gptq"), TOKENS[0].tolist()
    reference = qcore.load_model(path, device=REFERENCE, dtype=torch.float32)
    with torch.no_grad():
        expected = reference.generate(TOKENS, max_new_tokens=12, do_sample=False)[0].tolist()  # type: ignore[operator]
    steps = Stepper(qcore.load_model(path, device=JAX, dtype=torch.float32))
    text = [*prompt, int(steps.prompt(prompt).argmax())]
    assert steps.decoder == "tpu_decoder" and isinstance(steps.steps, CompiledSteps)
    logits, warm = steps.step(text[-1]), steps.steps.decoder.programs
    while len(text) < len(expected):
        text.append(int(logits.argmax()))
        logits = steps.step(text[-1])
    assert text == expected and steps.steps.decoder.programs == warm
    for target in PLATFORM.targets:
        assert steps.steps.decoder.compile(target, 1)["bytes of code"] > 0


def test_a_mixture_over_several_chips(tmp_path: Path) -> None:
    """Each has its part of every expert's outputs."""
    model: Any = qcore.load_model(written(tmp_path, "mixtral", "gptq"), device=JAX, dtype=torch.float32)
    parted = CompiledDecoder(model, Mesh(np.array(jax.devices()[:4]), (AXIS,)))
    codes = [part for name, part in parted.weights.items() if name.endswith(".packed.codes") and part.ndim == 3]
    assert codes and all(part.addressable_shards[0].data.nbytes * 4 == part.nbytes for part in codes)
    tokens = [TOKENS[0].tolist()]
    got, wanted = (decoder.begin().take(tokens, keep=9)[0] for decoder in (parted, CompiledDecoder(model)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
