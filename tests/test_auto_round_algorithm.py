"""Roundings that are learned: they begin with what was made, stay numbers of the scheme, and leave a model nearer than before; the same each time."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from golden_checkpoints import FOLDERS
from qcore.algorithms.auto_round import Rounding
from qcore.algorithms.gptq import gptq
from qcore.algorithms.seen import Seen, Watch
from qcore.calibration import block
from qcore.calibration.run import quantize
from qcore.evaluation import evaluate
from qcore.scheme import Scheme

BASE = FOLDERS[0] / "base"
TEXT = (FOLDERS[0] / "text.txt").read_text(encoding="utf-8")
SCHEMES = ("W4A16-g128-sym", "W4A16-g32-asym", "W2A16-g64-asym", "W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8", "W4A16-g128-sym-actorder", "W4A16-g100-sym")  # fmt: skip


def given() -> tuple[torch.Tensor, Seen]:
    generator = torch.Generator().manual_seed(0)
    watch = Watch(256)
    watch.add(torch.randn(1024, 256, generator=generator) * torch.logspace(0, -1, 256))
    return torch.randn(48, 256, generator=generator), watch.seen()


@pytest.mark.parametrize("words", SCHEMES)
def test_it_begins_with_what_was_made_and_stays_in_the_scheme(words: str) -> None:
    scheme, (weight, seen) = Scheme.parse(words), given()
    made = gptq(weight, scheme, seen)
    rounding = Rounding(weight, made, seen)
    assert torch.equal(rounding.quantized().dequantize(), made.dequantize())
    for _ in range(5):
        rounding.step((rounding.weight() - weight) @ seen.gram, 0.02)
    learned = rounding.quantized()
    assert learned.scheme == scheme and not torch.equal(learned.dequantize(), made.dequantize())
    torch.testing.assert_close(learned.dequantize(), rounding.weight(), rtol=1e-6, atol=0)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_a_model_is_nearer_than_before(tmp_path: Path) -> None:
    base = qcore.load_model(BASE, device="cpu", dtype="float32")
    tokens = qcore.open_checkpoint(BASE).load_tokenizer()(TEXT[28_000:])["input_ids"][:2048]

    def made(name: str, algorithm: str) -> Path:
        return quantize(BASE, "W2A16-g64-asym", algorithm, TEXT[:28_000], out=tmp_path / name, samples=40, seqlen=256, iterations=24).paths[0]  # fmt: skip

    def divergence(path: Path) -> float:
        model = qcore.load_model(path, device="cpu", dtype="float32")
        return float(evaluate(model, tokens, reference=base, context=256).summary()["kld_mean"])

    assert divergence(made("learned", "auto_round")) < 0.95 * divergence(made("gptq", "gptq"))


def test_it_gives_the_same_each_time(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # sums of several threads come in another order
    one, other = (
        quantize(BASE, "W3A16-g64-sym", "auto_round", TEXT, out=tmp_path / name, samples=3, seqlen=32, iterations=3)
        for name in ("one", "other")
    )
    assert digests(one.paths[0]) == digests(other.paths[0])


def test_errors_are_those_of_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights that are written, on what the layers saw, wherever roundings were taken."""
    seen: dict[str, Seen] = {}
    watch, learn = block.Block._seen, block.tune

    def kept(self: Any, layers: Any, states: Any) -> dict[str, Seen]:
        found = watch(self, layers, states)
        seen.update(found)
        return found

    def taken(*given: Any) -> bool:
        learn(*given)
        return True

    monkeypatch.setattr(block.Block, "_seen", kept)
    monkeypatch.setattr(block, "tune", taken)
    made = quantize(BASE, "W3A16-g64-sym", "auto_round", TEXT, out=tmp_path / "out", samples=4, seqlen=64, iterations=4)
    own, written = qcore.open_checkpoint(BASE), qcore.open_checkpoint(made.paths[0])
    assert made.errors.keys() == seen.keys()
    for name, error in made.errors.items():
        assert error == pytest.approx(seen[name].error(own.dequantize(name), written.dequantize(name)), rel=1e-5)
