"""Whole models through torch-xla on a CPU: the golden checkpoints, and texts that go on in graphs that are compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch_xla.debug import metrics
from tpu_models import GOLDEN, PROMPT, REFERENCE, STAND_IN, check_logits, check_tokens, load

from golden_checkpoints import goldens
from qcore.model.generate import Stepper


@pytest.mark.parametrize("path", goldens(), ids=lambda path: path.name)
def test_logits_of_golden_checkpoints(path: Path) -> None:
    assert STAND_IN.torch_device == "xla"
    check_logits(path)


@pytest.mark.parametrize("name", ["gptqmodel-gptq-4bit-sym", "llmcompressor-w8a8-int8-dynamic"])
def test_a_model_gives_the_same_tokens_and_compiles_nothing_more(name: str) -> None:
    check_tokens(name, STAND_IN, "tpu_lazy_decoder", lambda steps: metrics.metric_data("CompileTime")[0])


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_quantized_kv_caches_are_run_by_the_layers(kv_cache: str) -> None:
    """One of a scale of its own, and one whose scales are found at run time; a text goes on as the reference's."""
    found = []
    for device in (STAND_IN, REFERENCE):
        steps = Stepper(load(GOLDEN / "gptqmodel-gptq-4bit-sym", device, kv_cache))  # type: ignore[arg-type]
        text = [int(steps.prompt(PROMPT).argmax())]
        for _ in range(4):
            text.append(int(steps.step(text[-1]).argmax()))
        assert not steps.decoder
        found.append(text)
    assert found[0] == found[1]
