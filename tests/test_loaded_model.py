"""qcore.quantize of a model that is loaded already: as of its folder, with the weights that it has now."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qcore
from golden_checkpoints import FOLDERS
from qcore.refusal import Refused

BASE = FOLDERS[0] / "base"
TEXT = (FOLDERS[0] / "text.txt").read_text(encoding="utf-8")[:4000]
ASKED: dict[str, Any] = {
    "scheme": "W4A16-g32-sym",
    "algorithm": "gptq",
    "calibration": TEXT,
    "samples": 2,
    "seqlen": 32,
}


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = qcore.open_checkpoint(path)
    return {module: checkpoint.dequantize(module) for module in checkpoint.layers}


def loaded() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")


def test_a_loaded_model_is_quantized_as_its_folder_is(tmp_path: Path) -> None:
    """Its tokenizer is found by where it came from, and goes with it."""
    ours = qcore.quantize(loaded(), **ASKED, out=tmp_path / "loaded").paths[0]
    theirs = qcore.quantize(BASE, **ASKED, out=tmp_path / "folder").paths[0]
    for (name, own), other in zip(weights(ours).items(), weights(theirs).values(), strict=True):
        assert torch.equal(own, other), name
    assert AutoTokenizer.from_pretrained(ours)(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(BASE)(TEXT)["input_ids"]  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "loaded"]


def test_weights_are_those_of_now(tmp_path: Path) -> None:
    model = loaded()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    ours = weights(qcore.quantize(model, "W8A16", out=tmp_path / "loaded").paths[0])
    theirs = weights(qcore.quantize(BASE, "W8A16", out=tmp_path / "folder").paths[0])
    doubled = "model.layers.1.mlp.up_proj"
    assert torch.equal(ours.pop(doubled), 2 * theirs.pop(doubled))
    assert all(torch.equal(own, theirs[name]) for name, own in ours.items())


def test_a_model_from_nowhere_has_the_tokenizer_that_it_is_given(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(BASE)
    config.name_or_path = ""
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Refused, match="tokenizer"):
        qcore.quantize(model, **ASKED, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    qcore.quantize(model, "W8A16", out=tmp_path / "nearest")  # which reads no text
    path = qcore.quantize(model, **ASKED, tokenizer=AutoTokenizer.from_pretrained(BASE), out=tmp_path / "out").paths[0]
    assert (path / "tokenizer.json").exists()


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no model"):
        qcore.quantize(3, **ASKED, out=tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="a loaded model has none"):
        qcore.quantize(loaded(), **ASKED, out=tmp_path / "out", resume=True)
    with pytest.raises(Refused) as refused:
        qcore.quantize(loaded(), **ASKED, out=tmp_path / "missing" / "out")
    assert refused.value.refusal.code == "cannot-write"
