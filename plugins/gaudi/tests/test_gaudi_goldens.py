"""Checkpoints made by the real tools, through the stand-in for Gaudi2: the reference's logits. QCORE_GOLDEN=FOLDER tries more than the few that this repository
carries; `make test-gaudi` does with what it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qcore
from golden_checkpoints import divergence, goldens
from qcore.model.load import kernel_counts
from qcore_gaudi.devices import stand_ins

BOUND = 2.5e-4
BOUNDS = (("fp8", 2e-3), ("kvfp8", 1e-2), ("mxfp4", 1e-2), ("gguf-iq2", 1e-3), ("gguf-q2", 1e-3), ("mxfp4a16", BOUND))
"""The largest Kullback-Leibler divergence from the reference's logits in float32, by what a name has in it; the last that fits counts. Gaudi's layers are in
bfloat16. Where inputs or keys are rounded to fp8 or fp4 too, those between two codes go to the one or the other with bfloat16's noise."""


@pytest.mark.parametrize("path", goldens(), ids=lambda path: path.name)
def test_logits_are_the_references(path: Path) -> None:
    tokens = load_file(path / "expected.safetensors")["input_ids"]
    device, found = stand_ins()[0], {}
    for name, given in (("gaudi", {"dtype": torch.bfloat16}), ("reference", {"dtype": torch.float32, "kernel": "reference_linear"})):  # fmt: skip
        try:
            model = qcore.load_model(path, device, **given)  # type: ignore[arg-type]
        except qcore.Refused as error:
            if error.refusal.code != "missing-package":
                raise
            pytest.skip(str(error.refusal.fact))  # caches in 8 bits, under the transformers that optimum-habana takes
        if name == "gaudi":
            linears = {kernel for kernel in kernel_counts(model) if kernel != "reference_embedding"}
            assert all(kernel.startswith("gaudi_") for kernel in linears), linears
            plan = qcore.open_checkpoint(path).plan
            assert linears or not any(plan.values())
        with torch.inference_mode():
            found[name] = model(tokens).logits
    bound = next((most for word, most in reversed(BOUNDS) if word in path.name), BOUND)
    assert 0 < divergence(found["gaudi"], found["reference"]) < bound
