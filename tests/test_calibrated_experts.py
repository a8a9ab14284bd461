"""Calibrated runs of mixtures: each expert by the tokens that are sent to it, routers as they are, and experts that no token reaches."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from commands import command
from golden_checkpoints import FOLDERS
from mixtures import EXPERTS, HIDDEN, INNER, Mixture, logits
from qcore.algorithms.seen import Seen, Watch
from qcore.calibration import block, precision
from qcore.calibration.experts import portions
from qcore.calibration.run import Quantized, quantize
from qcore.calibration.texts import windows_of
from qcore.calibration.watching import Sums
from qcore.refusal import Refused

GOLDEN = FOLDERS[0]
TEXT = (GOLDEN / "text.txt").read_text(encoding="utf-8")[:2500]
VOCABULARY = json.loads((GOLDEN / "base" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
SHAPES: dict[str, dict[str, Any]] = {"deepseek_v3": {"kv_lora_rank": 32, "v_head_dim": 32}}
"""What of them makes rows whole groups."""


def mixture(kind: str, **changes: Any) -> Mixture:
    return Mixture(kind, vocab_size=VOCABULARY, **SHAPES.get(kind, {}), **changes)


def written(mix: Mixture, folder: Path) -> Path:
    path = mix.write(folder, mix.tensors(), None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "base" / name, path)
    return path


def made(path: Path, out: Path, scheme: str = "W4A16-g32-sym", **others: Any) -> Quantized:
    return quantize(path, scheme, calibration=TEXT, out=out, **{"samples": 4, "seqlen": 64, **others})


def as_written(mix: Mixture, path: Path, prefix: str = "") -> torch.Tensor:
    """Logits of the unquantized model with the weights that a quantized one stands for, as far as their names begin so."""
    checkpoint = qcore.open_checkpoint(path)
    for module, scheme in checkpoint.plan.items():
        if scheme is not None and module.startswith(prefix):
            own = (mix.parts, module) if module in mix.parts else (mix.rest, f"{module}.weight")
            assert own[1] in own[0]
            own[0][own[1]] = checkpoint.dequantize(module)
    return mix.logits()


def routed(mix: Mixture, windows: torch.Tensor, layer: int) -> dict[str, Seen]:
    """What transformers' own model sends to each expert of a layer: gate's and up's inputs."""
    watches = [Watch(HIDDEN) for _ in range(EXPERTS)]

    def add(hidden: torch.Tensor, chosen: torch.Tensor) -> None:
        for expert, watch in enumerate(watches):
            watch.add(hidden[(chosen == expert).any(1)])

    mix.logits()  # gives the model its weights
    hook = mix.model.model.layers[layer].mlp.experts.register_forward_pre_hook(lambda _, given: add(*given[:2]))
    with torch.no_grad():
        for window in windows:
            mix.model(window[None])
    hook.remove()
    return {f"model.layers.{layer}.{mix.block}.experts.{expert}": watch.seen() for expert, watch in enumerate(watches)}


@pytest.mark.parametrize(
    ("kind", "dense", "quantized"),
    [
        ("mixtral", ["block_sparse_moe.gate"], 2 * (4 + 3 * EXPERTS)),
        ("qwen3_moe", ["mlp.gate"], 2 * 4 + 3 + 3 * EXPERTS),  # the first block has no experts
        ("qwen2_moe", ["mlp.gate", "mlp.shared_expert_gate"], 2 * (4 + 3 + 3 * EXPERTS)),
        ("deepseek_v3", ["mlp.gate"], 2 * 4 + 3 + 3 + 3 * EXPERTS),
    ],
)
def test_mixtures(kind: str, dense: list[str], quantized: int, tmp_path: Path) -> None:
    mix = mixture(kind)
    found = made(written(mix, tmp_path / "base"), tmp_path / "out")
    plan = qcore.open_checkpoint(found.paths[0]).plan
    assert len([scheme for scheme in plan.values() if scheme]) == quantized == len(found.errors) + len(found.unseen)
    assert all(0 < error < 0.02 for error in found.errors.values())
    kept = {module.split(".", 3)[3] for module, scheme in plan.items() if scheme is None and ".layers." in module}
    assert kept == set(dense)
    assert (kind == "deepseek_v3") == bool(found.unseen)  # its choice by groups leaves some experts out here
    model = qcore.load_model(found.paths[0], device="cpu", dtype="float32", kernel="reference_linear")
    torch.testing.assert_close(logits(model), as_written(mix, found.paths[0]), rtol=1e-4, atol=1e-4)


def test_an_expert_sees_the_tokens_that_are_sent_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose router's row is never chosen sees none: its layers are rounded to nearest, and named. In the second block, behind the first as it is quantized."""
    seen: dict[str, Seen] = {}
    real = Sums.seen

    def kept(self: Any) -> dict[str, Seen]:
        found = real(self)
        seen.update(found)
        return found

    monkeypatch.setattr(Sums, "seen", kept)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    mix = mixture("mixtral", num_experts_per_tok=1)
    for layer, expert in ((0, 2), (1, 1)):
        gate = mix.rest[f"model.layers.{layer}.mlp.gate.weight"]
        gate[expert] = gate[[other for other in range(EXPERTS) if other != expert]].mean(0)  # never the largest
    path = written(mix, tmp_path / "base")
    found = made(path, tmp_path / "out")
    prefix = "model.layers.{}.block_sparse_moe.experts.{}"
    unseen = {f"{prefix.format(*place)}.{part}" for place in ((0, 2), (1, 1)) for part in ("w1", "w2", "w3")}
    assert set(found.unseen) == unseen and not unseen & found.errors.keys()
    checkpoint = qcore.open_checkpoint(path)
    windows = windows_of(checkpoint, TEXT, 4, 64)
    for layer in range(2):
        for expert, own in routed(mix, windows, layer).items():
            for part in ("w1", "w3"):
                given = seen[f"{expert}.{part}"]
                assert given.rows == own.rows == seen[f"{expert}.w2"].rows
                if own.rows:
                    torch.testing.assert_close(given.gram, own.gram, rtol=1e-3, atol=1e-3 * float(own.gram.diagonal().mean()))  # fmt: skip
            assert (seen[f"{expert}.w1"] is seen[f"{expert}.w3"]) == bool(own.rows)
        if layer == 0:
            as_written(mix, found.paths[0], "model.layers.0.")  # the second block is calibrated behind this


def test_experts_have_one_input_scale(tmp_path: Path) -> None:
    """The largest of any of a part, so that experts without tokens have one that holds what others see."""
    mix = mixture("mixtral", num_experts_per_tok=1)
    gate = mix.rest["model.layers.0.mlp.gate.weight"]
    gate[0] = gate[1:].mean(0)
    found = made(written(mix, tmp_path / "base"), tmp_path / "out", "FP8")
    checkpoint = qcore.open_checkpoint(found.paths[0])
    prefix = "model.layers.0.block_sparse_moe.experts"
    assert set(found.unseen) == {f"{prefix}.0.{part}" for part in ("w1", "w2", "w3")}
    for part in ("w1", "w2", "w3"):
        scales = {float(checkpoint.layer(f"{prefix}.{expert}.{part}").input_scale or 0) for expert in range(EXPERTS)}
        assert len(scales) == 1 and min(scales) > 1e-4


def test_a_run_in_portions_gives_the_same_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their inputs are the same, whatever is watched beside them; the layers of an expert stay together."""
    path = written(mixture("qwen2_moe"), tmp_path / "base")
    whole = made(path, tmp_path / "whole").paths[0]
    counts: list[int] = []

    def small(layers: Any) -> Any:
        found = portions(layers)
        counts.append(len(found))
        assert [module for portion in found for module in portion if "experts." not in module] == [*found[-1]]
        return found

    monkeypatch.setattr(block, "portions", small)
    monkeypatch.setattr("qcore.calibration.experts._SLACK", -150_000)
    parted = made(path, tmp_path / "parted").paths[0]
    assert min(counts) > 2
    one, other = qcore.open_checkpoint(whole), qcore.open_checkpoint(parted)
    for module, scheme in one.plan.items():
        if scheme is not None and ".layers.0." in module:
            assert torch.equal(one.dequantize(module), other.dequantize(module))


def test_a_checkpoint_that_stacks_its_experts_keeps_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mix = mixture("gpt_oss")
    path = written(mix, tmp_path / "base")
    with caplog.at_level(logging.WARNING, "qcore"):
        found = made(path, tmp_path / "out")
    assert "all experts of 2 layers in one tensor each" in caplog.text
    assert len(found.errors) == 8 and not any("experts" in module for module in found.errors)
    model = qcore.load_model(found.paths[0], device="cpu", dtype="float32", kernel="reference_linear")
    torch.testing.assert_close(logits(model), as_written(mix, found.paths[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "needs more of its experts"),
        ("spare", "one too many"),
        ("stacked", "one too many"),
        ("apart", "as one tensor"),
    ],
)
def test_experts_that_do_not_fit_are_refused(change: str, message: str, tmp_path: Path) -> None:
    mix = mixture("qwen3_moe")
    tensors = mix.tensors()
    prefix = "model.layers.1.mlp.experts"
    if change == "missing":
        del tensors[f"{prefix}.3.up_proj.weight"]
    elif change == "spare":
        tensors[f"{prefix}.{EXPERTS}.up_proj.weight"] = torch.zeros(INNER, HIDDEN)
    elif change == "stacked":
        tensors[f"{prefix}.down_proj"] = torch.zeros(EXPERTS, HIDDEN, INNER)
    else:
        parts = {part: [tensors.pop(f"{prefix}.{e}.{part}.weight") for e in range(EXPERTS)] for part in mix.spelled}
        tensors |= {f"{prefix}.{part}": torch.stack(weights) for part, weights in parts.items()}
    path = mix.write(tmp_path / "base", tensors, None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "base" / name, path)
    with pytest.raises(Refused, match=message):
        made(path, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"base"}


def test_the_command_names_experts_that_no_token_reaches(tmp_path: Path) -> None:
    mix = mixture("mixtral", num_experts_per_tok=1, num_hidden_layers=1)
    gate = mix.rest["model.layers.0.mlp.gate.weight"]
    gate[3] = gate[:3].mean(0)
    path, text = written(mix, tmp_path / "base"), tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    done = command("quantize", path, "--scheme", "W4A16-g32-sym", "--calibration", text, "--samples", 2, "--seqlen", 64,
                   "-o", tmp_path / "out", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    unseen = {f"model.layers.0.block_sparse_moe.experts.3.{part}" for part in ("w1", "w2", "w3")}
    assert set(report["unseen"]) == unseen and not unseen & {layer["module"] for layer in report["layers"]}
    assert "3 layers of experts that no token of the text was sent to are rounded to nearest" in done.stderr
