"""Bits that are chosen for each layer: the budget is kept, nothing that fits is better, and the model is nearer than one of as many bits everywhere."""

import itertools
from pathlib import Path

import pytest
import torch

import qcore
from golden_checkpoints import FOLDERS
from qcore.calibration.mixing import Unit, chosen
from qcore.calibration.run import quantize
from qcore.evaluation import evaluate
from qcore.refusal import Refused

BASE = FOLDERS[0] / "base"
TEXT = (FOLDERS[0] / "text.txt").read_text(encoding="utf-8")


def units(count: int) -> list[Unit]:
    """Errors fall by four for a bit, as those of rounding do."""
    generator = torch.Generator().manual_seed(0)
    sensitive = (torch.randn(count, generator=generator) * 2).exp().tolist()
    sizes = torch.randint(1, 9, (count,), generator=generator).tolist()
    bits = (2.25, 3.25, 4.25, 8.25)
    return [Unit((str(n),), size * 1000, bits, tuple(own * 4.0**-b for b in bits)) for n, (own, size) in enumerate(zip(sensitive, sizes, strict=True))]  # fmt: skip


@pytest.mark.parametrize("target", [2.25, 2.6, 3.0, 4.1, 5.5, 9.0])
def test_nothing_that_fits_is_much_better(target: float) -> None:
    own = units(7)
    weights = sum(unit.weights for unit in own)

    def cost(taken: tuple[int, ...]) -> float:
        return sum(unit.costs[choice] for unit, choice in zip(own, taken, strict=True))

    def bits(taken: tuple[int, ...]) -> float:
        return sum(unit.bits[choice] * unit.weights for unit, choice in zip(own, taken, strict=True)) / weights

    found = tuple(chosen(own, target))
    assert bits(found) <= target
    best = min(cost(taken) for taken in itertools.product(range(4), repeat=7) if bits(taken) <= target)
    assert cost(found) <= 1.25 * best


def test_less_than_the_narrowest_is_refused() -> None:
    with pytest.raises(Refused, match=r"at least 2\.250"):
        chosen(units(3), 2.0)


def test_mixed_models_are_nearer_than_even_ones(tmp_path: Path) -> None:
    base = qcore.load_model(BASE, device="cpu", dtype="float32")
    tokens = qcore.open_checkpoint(BASE).load_tokenizer()(TEXT[28_000:])["input_ids"][:2048]

    def made(name: str, scheme: str, target: float | None) -> tuple[float, float]:
        path = quantize(BASE, scheme, "gptq", TEXT[:20_000], out=tmp_path / name, samples=8, seqlen=256, target_bpw=target).paths[0]  # fmt: skip
        checkpoint = qcore.open_checkpoint(path)
        packed = [checkpoint.weight(module) for module, scheme in checkpoint.plan.items() if scheme]
        model = qcore.load_model(path, device="cpu", dtype="float32", kernel="reference_linear")
        divergence = float(evaluate(model, tokens, reference=base, context=256).summary()["kld_mean"])
        return divergence, sum(8 * weight.nbytes for weight in packed) / sum(weight.shape[0] * weight.shape[1] for weight in packed)  # fmt: skip

    even, bits = made("even", "W3A16-g128-sym", None)
    mixed, fewer = made("mixed", "W4A16-g128-sym", 3.125)
    assert fewer <= bits and mixed < even
    assert len({str(scheme) for scheme in qcore.open_checkpoint(tmp_path / "mixed").plan.values() if scheme}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "FP8_DYNAMIC"}, "integer weights alone"),
        ({"target_bpw": 1.5}, "at least"),
        ({"format": "bitblas"}, "bitblas"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "scheme": "W4A16-g128-asym",
        "algorithm": "gptq",
        "target_bpw": 4.0,
        "samples": 2,
        "seqlen": 64,
    }
    with pytest.raises(Refused, match=message):
        quantize(BASE, **{**given, **changes}, calibration=TEXT, out=tmp_path / "out")  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
