"""Rotary embeddings in the keys of transformers 4 and 5."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, write
from qcore.checkpoint.rope import of_version_4

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "older"),
    [
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, {"rope_theta": 1e5}),
        ({"rope_parameters": {"rope_theta": 1e5, **SCALED}}, {"rope_theta": 1e5, "rope_scaling": SCALED}),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, {"rope_theta": 1e5}),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}, "x": 1}, {"partial_rotary_factor": 0.5, "x": 1}),
        ({"rope_parameters": None, "x": 1}, {"x": 1}),
        ({"text_config": {"rope_parameters": {"rope_theta": 1e5}}}, {"text_config": {"rope_theta": 1e5}}),
        ({"rope_theta": 1e5, "rope_scaling": SCALED}, {"rope_theta": 1e5, "rope_scaling": SCALED}),
    ],
)
def test_version_4_has_other_keys(config: dict[str, Any], older: dict[str, Any]) -> None:
    assert of_version_4(config) == older


KINDS = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}


def test_under_version_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch that version 4 takes, whichever is installed: 5 reads the older keys too."""
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    tokens, said = torch.tensor([[1, 5, 9, 100]]), {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}
    newer = qcore.load_model(write(tmp_path / "newer", dense_llama(), **said), dtype="float32")
    older = qcore.load_model(write(tmp_path / "older", dense_llama(), rope_theta=300.0), dtype="float32")
    assert torch.equal(newer(tokens).logits, older(tokens).logits)
    for name, config in (
        ("kinds", {"rope_parameters": KINDS}),
        ("inside", {"text_config": {"rope_parameters": KINDS}}),
    ):
        with pytest.raises(qcore.Refused) as caught:
            qcore.load_model(write(tmp_path / name, dense_llama(), **config), dtype="float32")
        refusal = caught.value.refusal
        assert (refusal.code, refusal.field) == ("unknown-architecture", "rope_parameters") and "5" in refusal.fix


def test_what_is_said_twice_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def logits(folder: str, config: dict[str, Any]) -> torch.Tensor:
        model = qcore.load_model(write(tmp_path / folder, dense_llama(), **config), dtype="float32")
        given: torch.Tensor = model(torch.tensor([[1, 5, 9, 100]])).logits
        return given

    with caplog.at_level(logging.WARNING, "qcore"):
        alone = logits("alone", {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}})
        older = logits("older", {"rope_theta": 300.0})
        assert not caplog.records
        twice = logits("twice", {"rope_theta": 20.0, "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}})
    assert torch.equal(alone, older) and torch.equal(alone, twice)
    assert not torch.equal(alone, logits("other", {"rope_theta": 20.0}))
    assert ["ran with 20.0" in record.message for record in caplog.records] == [True]
