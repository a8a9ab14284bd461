"""A model over several chips: four of a CPU's give what one does, and programs for whole topologies have each chip hold its part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from tpu_models import GOLDEN, JAX, PROMPT, REFERENCE, load

from qcore.model.generate import Stepper
from qcore.platform import Target
from qcore.scheme import Scheme
from qcore.testing.layers import random_layer
from qcore_tpu import sharding
from qcore_tpu.decoder import CompiledDecoder
from qcore_tpu.kernels.linear import IntegerLinear
from qcore_tpu.plugin import qcore_platforms
from qcore_tpu.sharding import AXIS, current_mesh, mesh_of, placements

PATH = GOLDEN / "gptqmodel-gptq-4bit-sym"
TOKENS = [list(range(5, 16)), [7], [3], [11]]


def arrays_of(model: torch.nn.Module) -> dict[str, Any]:
    from torchax.interop import jax_view  # once torchax is ready

    found: dict[str, Any] = jax_view({**dict(model.named_parameters()), **dict(model.named_buffers())})
    return found


def steps(decoder: CompiledDecoder) -> list[torch.Tensor]:
    state = decoder.begin()
    return [state.take([tokens], keep=len(tokens))[0] for tokens in TOKENS]


@pytest.mark.parametrize("name", ["gptqmodel-gptq-4bit-sym", "llmcompressor-w8a8-int8-dynamic"])
@pytest.mark.parametrize("chips", [2, 4])
def test_parts_of_a_model_give_what_the_whole_gives(name: str, chips: int) -> None:
    model = load(GOLDEN / name, JAX)
    mesh = Mesh(np.array(jax.devices()[:chips]), (AXIS,))
    parted = CompiledDecoder(model, mesh)  # type: ignore[arg-type]
    codes = [array for key, array in parted.weights.items() if key.endswith(".packed.codes")]
    assert codes and all(array.addressable_shards[0].data.nbytes * chips == array.nbytes for array in codes)
    for got, wanted in zip(steps(parted), steps(CompiledDecoder(model)), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_comes_to_lie_on_all_chips_as_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has dense, too. Layers run one by one, and by the decoder; on one chip the next model is whole again."""
    monkeypatch.setattr(sharding, "LARGE", 4096)
    wanted = load(PATH, REFERENCE)(torch.tensor([PROMPT])).logits[0]
    model = load(PATH, replace(JAX, ready="qcore_tpu.sharding:on_all"))
    (first, *others) = [codes for name, codes in arrays_of(model).items() if name.endswith(".codes")]
    assert (
        len(first.sharding.device_set) == 4 and first.addressable_shards[0].data.nbytes * 4 == first.nbytes and others
    )
    dense = [part for name, part in arrays_of(model).items() if ".packed." not in name and part.ndim == 2]
    dense = [part for part in dense if part.nbytes >= sharding.LARGE]
    assert dense and all(part.addressable_shards[0].data.nbytes * 4 == part.nbytes for part in dense)
    torch.testing.assert_close(model(torch.tensor([PROMPT]).to("jax")).logits[0].cpu(), wanted, rtol=1e-4, atol=1e-4)
    steps = Stepper(model)  # type: ignore[arg-type]
    torch.testing.assert_close(steps.prompt(PROMPT), wanted[-1], rtol=1e-4, atol=1e-4)
    assert steps.decoder == "tpu_decoder" and current_mesh().size == 4
    whole = load(PATH, JAX)
    assert current_mesh() is None
    assert all(len(part.sharding.device_set) == 1 for part in arrays_of(whole).values())


def test_each_chip_s_part_is_whole_vectors() -> None:
    """So that no chip lays its part out anew at every call, and parts are equal. A weight is not more than doubled for that."""
    sharding.on_all()
    try:
        for outputs, filled in ((1300, 1536), (64, 128)):
            layer = random_layer(Scheme.parse("W4A16-g128-asym"), outputs, 512)
            x = torch.randn(3, 512, generator=torch.Generator().manual_seed(outputs))
            packed = IntegerLinear.from_layer(layer, torch.float32).to("jax")
            (codes,) = (part for name, part in arrays_of(packed).items() if name == "codes")
            assert codes.shape[1] == filled and codes.addressable_shards[0].data.shape[1] == filled // 4
            y = packed(x.to("jax")).cpu()
            torch.testing.assert_close(y, x @ layer.weight.dequantize().T, rtol=1e-4, atol=1e-3)
    finally:
        sharding.on_one()


@pytest.mark.parametrize(("topology", "chips"), [("v5e:2x2", 4), ("v5e:4x4", 16)])
def test_programs_of_whole_topologies(topology: str, chips: int) -> None:
    """Of what each chip is given, its part and what is small."""
    decoder = CompiledDecoder.from_model(load(PATH, JAX))  # type: ignore[arg-type]
    target: Target = next(target for target in qcore_platforms()[0].targets if target.architecture == "v5e")
    alone, parted = (decoder.compile(target, 16, topology=name) for name in ("", topology))
    placed = placements(decoder.weights, mesh_of(topology))
    apart = [array.nbytes for name, array in decoder.weights.items() if any(placed[name].spec)]
    assert len(apart) > 2 * 7 and sum(apart) > 0.5 * sum(array.nbytes for array in decoder.weights.values())
    assert alone["bytes needed"] - parted["bytes needed"] >= 0.98 * sum(apart) * (1 - 1 / chips)
