"""Calibrated runs: what layers see, results beside the real tools', runs that are killed and go on, and what is refused."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import qcore
from commands import command
from golden_checkpoints import FOLDERS
from qcore.algorithms.seen import Seen
from qcore.calibration import precision, run
from qcore.calibration.block import Block
from qcore.calibration.run import BlockDone, quantize
from qcore.checkpoint.in_flight import UNTOUCHED
from qcore.evaluation import evaluate
from qcore.refusal import Refused

GOLDEN = FOLDERS[0]
BASE = GOLDEN / "base"
TEXT = (GOLDEN / "text.txt").read_text(encoding="utf-8")
READ, HELD = TEXT[:28_000], TEXT[28_000:]
"""What models are calibrated with, and what they are tried on."""


def made(out: Path, scheme: str = "W4A16-g128-sym", **others: Any) -> Path:
    return quantize(BASE, scheme, "gptq", READ, out=out, samples=16, seqlen=256, **others).paths[0]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@cache
def base_model() -> Any:
    return qcore.load_model(BASE, device="cpu", dtype="float32")


def divergence(path: Path, count: int = 4096) -> float:
    """From the model that it was made of, in nats, on so many tokens of a text that no run has seen."""
    base = base_model()
    tokens = qcore.open_checkpoint(BASE).load_tokenizer()(HELD)["input_ids"][:count]
    model = qcore.load_model(path, device="cpu", dtype="float32", kernel="reference_linear")
    return float(evaluate(model, tokens, reference=base, context=256).summary()["kld_mean"])


def whole_grams(model: Any, windows: torch.Tensor, modules: list[str]) -> dict[str, torch.Tensor]:
    """x^T x of the modules' inputs, summed over all tokens, of which the first of a window counts as half of all."""
    grams: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        weights = torch.ones(x.shape[1], 1)
        weights[0] = x.shape[1] / 2
        grams[name] = grams.get(name, torch.zeros(1)) + x[0].T @ (weights * x[0])

    for module in modules:
        model.get_submodule(module).register_forward_pre_hook(lambda _, given, module=module: add(module, given[0]))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    return grams


def test_nearer_than_the_real_tools(tmp_path: Path) -> None:
    """Of the same model with as many windows of the same text; GPTQModel 7.7 and LLM Compressor 0.14 made theirs."""
    own = divergence(made(tmp_path / "out"))
    assert own < 0.8 * divergence(GOLDEN / "gptqmodel-gptq-4bit-sym")
    assert own < 0.8 * divergence(GOLDEN / "llmcompressor-w4a16-gptq")
    assert not (tmp_path / "out.work").exists()


def test_layers_see_what_the_whole_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block's, of the model as it was; and the second's, behind the first as it is quantized."""
    found: list[dict[str, Seen]] = []
    real = Block._seen

    def kept(self: Any, layers: Any, states: Any) -> dict[str, Seen]:
        found.append(real(self, layers, states))
        return found[-1].copy()

    monkeypatch.setattr(Block, "_seen", kept)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    out = made(tmp_path / "out")
    tokens = torch.tensor(qcore.open_checkpoint(BASE).load_tokenizer()(READ)["input_ids"])
    count = min(16, len(tokens) // 256)
    windows = tokens[: len(tokens) // 256 * 256].view(-1, 256)[torch.arange(count) * (len(tokens) // 256) // count]
    for number, path in enumerate((BASE, out)):
        model = qcore.load_model(path, device="cpu", dtype="float32", kernel="reference_linear" if number else None)
        grams = whole_grams(model, windows, list(found[number]))
        assert len(grams) == 7
        for name, gram in grams.items():
            first = number == 0 or name.endswith(
                ("q_proj", "k_proj", "v_proj")
            )  # others come behind layers of the block
            if first:
                torch.testing.assert_close(
                    found[number][name].gram, gram, rtol=1e-3, atol=1e-3 * float(gram.diagonal().mean())
                )
            assert found[number][name].rows == windows.numel()


def _killed(out: Path) -> None:
    made(out, done=lambda _: os.kill(os.getpid(), signal.SIGKILL))


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # sums of several threads come in another order
    whole = digests(made(tmp_path / "whole"))
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path / "out",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.work" / "state.json").read_text())["blocks"] == 1
    with pytest.raises(Refused, match="--resume"):
        made(tmp_path / "out")
    with pytest.raises(Refused, match="found another scheme"):
        made(tmp_path / "out", "W3A16-g128-sym", resume=True)
    numbers: list[BlockDone] = []
    assert digests(made(tmp_path / "out", resume=True, done=numbers.append)) == whole
    assert [done.number for done in numbers] == [2]
    assert not (tmp_path / "out.work").exists()


def test_a_full_disk_loses_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is full from the beginning leaves nothing behind."""
    real, filled = safetensors.torch.save_file, ["block-00000"]

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if path.name.startswith(filled[0]):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for name, left in (("block-00000", set()), ("block-00001", {"out.work"})):
        filled[:] = [name]
        with pytest.raises(Refused, match="Free some space"):
            made(tmp_path / "out")
        assert {file.name for file in tmp_path.iterdir()} == left
    monkeypatch.setattr(safetensors.torch, "save_file", real)
    numbers: list[int] = []
    made(tmp_path / "out", resume=True, done=lambda done: numbers.append(done.number))
    assert numbers == [2] and {file.name for file in tmp_path.iterdir()} == {"out"}


def test_several_formats_of_one_run(tmp_path: Path) -> None:
    asked = {"format": ["gptq", "compressed-tensors"], "samples": 4, "seqlen": 128}
    found = quantize(BASE, "W4A16-g64-sym", "gptq", [READ[:9000], READ[9000:]], out=tmp_path / "out", **asked)
    written = found.paths
    assert len(found.errors) == 14 and all(0 < error < 0.01 for error in found.errors.values())
    assert [path.name for path in written] == ["gptq", "compressed-tensors"]
    one, other = map(qcore.open_checkpoint, written)
    assert (one.method, other.method) == ("gptq", "compressed-tensors")
    for module, scheme in other.plan.items():
        assert scheme is None or torch.equal(one.dequantize(module), other.dequantize(module))


@pytest.mark.parametrize("scheme", ["W8A8-int8-dyn", "W8A8-int8-static", "W3A16-g64-asym", "W4A16-g64-sym-actorder"])
def test_schemes(tmp_path: Path, scheme: str) -> None:
    """Static inputs have the scale of the largest that was seen."""
    path = quantize(BASE, scheme, "gptq", READ, out=tmp_path / "out", samples=4, seqlen=128).paths[0]
    checkpoint = qcore.open_checkpoint(path)
    assert {str(found) for found in checkpoint.plan.values() if found} == {scheme}
    layer = checkpoint.layer("model.layers.0.mlp.down_proj")
    assert (layer.input_scale is not None) == scheme.endswith("static")
    assert divergence(path) < 0.05


@pytest.mark.parametrize(
    ("scheme", "algorithm", "plain", "part"),
    [("W4A16-g128-asym", "awq", "rtn", 0.8), ("W4A16-g128-sym", "awq+gptq", "awq", 0.5), ("NVFP4A16", "gptq", "rtn", 0.5)],
)  # fmt: skip
def test_outputs_are_nearer_than_those_of_what_it_builds_on(
    tmp_path: Path, scheme: str, algorithm: str, plain: str, part: float
) -> None:
    one, other = (
        quantize(BASE, scheme, name, READ, out=tmp_path / name, samples=8, seqlen=128).errors
        for name in (algorithm, plain)
    )
    assert sum(one.values()) < part * sum(other.values())


@pytest.mark.parametrize("algorithm", ["smoothquant", "smoothquant+gptq"])
def test_rounded_inputs_are_nearer_with_columns_that_are_scaled(tmp_path: Path, algorithm: str) -> None:
    one, other = (
        quantize(BASE, "W8A8", name, READ, out=tmp_path / name, samples=8, seqlen=128).paths[0]
        for name in (algorithm, "rtn")
    )
    assert divergence(one, 2048) < 0.95 * divergence(other, 2048)


def test_an_algorithm_without_calibration_takes_input_scales_from_it(tmp_path: Path) -> None:
    path = quantize(BASE, "FP8", "", READ, out=tmp_path / "out", samples=4, seqlen=128).paths[0]
    scale = qcore.open_checkpoint(path).layer("model.layers.1.mlp.up_proj").input_scale
    assert scale is not None and 0 < float(scale) < 1
    assert divergence(path) < 0.01


def test_scales_of_run_time_are_not_stored(tmp_path: Path) -> None:
    """Not one scale for a whole input either, though it is shaped as a stored one is."""
    scheme = "W8A8-fp8-tensor/fp8-tensor-dyn"
    path = quantize(BASE, scheme, "rtn", READ, out=tmp_path / "out", format="fp8:tensor", samples=2, seqlen=64).paths[0]
    layer = qcore.open_checkpoint(path).layer("model.layers.1.mlp.up_proj")
    assert layer.input_scale is None and str(layer.weight.scheme) == scheme


def test_the_output_layer_is_quantized_where_nothing_keeps_it(tmp_path: Path) -> None:
    path = made(tmp_path / "out", ignore=())
    assert qcore.open_checkpoint(path).plan["lm_head"] is not None
    nearest = quantize(BASE, "W4A16-g128-sym", "rtn", out=tmp_path / "rtn", ignore=()).paths[0]
    assert divergence(path) < 0.3 * divergence(nearest)


def test_layers_may_be_left_out_by_an_expression(tmp_path: Path) -> None:
    path = made(tmp_path / "out", ignore=(*UNTOUCHED, r"re:.*layers\.1\."))
    plan = qcore.open_checkpoint(path).plan
    assert {module.split(".")[2] for module, scheme in plan.items() if scheme} == {"0"}
    with pytest.raises(Refused, match="no regular expression"):
        made(tmp_path / "other", ignore=("re:(",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": ""}, "too short to calibrate"),
        ({"calibration": "a"}, "too short to calibrate"),
        ({"samples": 0}, "nothing to calibrate"),
        ({"algorithm": "magic"}, "no algorithm of this name"),
        ({"scheme": "W4A16-nf4-flat64"}, "does not make weights of this scheme"),
        ({"scheme": "W4A16-g96-sym"}, "cannot hold this layer"),
        ({"scheme": "W8A8-int8-channel-sym/int8-tensor-asym"}, "not found by calibration"),
        ({"ignore": ("re:.*",)}, "no layer of it is left"),
        ({"format": "magic"}, "no checkpoint format of this name"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"scheme": "W4A16-g128-sym", "algorithm": "gptq", "calibration": READ, "out": tmp_path / "out", "samples": 2, "seqlen": 64}  # fmt: skip
    with pytest.raises(Refused, match=message):
        quantize(BASE, **{**given, **changes})
    assert not any(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    tensors = safetensors.torch.load_file(BASE / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(Refused, match="not finite"):
        quantize(tmp_path / "base", "W4A16-g128-sym", "gptq", READ, out=tmp_path / "out", samples=2, seqlen=64)
    assert not (tmp_path / "out").exists()


def test_a_format_that_cannot_hold_the_scheme_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="bitsandbytes"):
        made(tmp_path / "out", format=["gptq", "bitsandbytes"])
    assert not any(tmp_path.iterdir())


def test_several_formats_go_on_at_the_one_that_was_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.convert

    def stopped(source: Any, format: str, out: Path) -> Path:
        if format == "gptq":
            raise KeyboardInterrupt
        return real(source, format, out)

    both: dict[str, Any] = {"format": ["compressed-tensors", "gptq"]}
    monkeypatch.setattr(run, "convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "out", **both)
    monkeypatch.setattr(run, "convert", real)
    made(tmp_path / "out", **both, resume=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compressed-tensors", "gptq"}


def test_without_a_text_layers_are_rounded_to_nearest(tmp_path: Path) -> None:
    found = quantize(BASE, "W4A16", out=tmp_path / "out")
    assert not found.errors and divergence(found.paths[0]) < 0.01


def test_the_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(READ, encoding="utf-8")
    asked = ("quantize", BASE, "--scheme", "W4A16", "-o", tmp_path / "out")
    done = command(
        *asked, "--calibration", text, "--samples", 4, "--seqlen", 128, "--json", "--plot", tmp_path / "errors.png"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["out"] == str(tmp_path / "out") and len(report["layers"]) == 14 and report["size_bytes"] > 0
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert "block 2 of 2: error" in done.stderr and "MiB at most" in done.stderr
    assert qcore.open_checkpoint(tmp_path / "out").plan["model.layers.0.mlp.up_proj"] is not None
    for more, message in (
        (("--algorithm", "gptq"), "by --calibration FILE"),
        (("--resume",), "goes with calibration"),
        (("--plot", tmp_path / "other.png"), "goes with calibration"),
        (("-f", "gptq", "-f", "awq"), "of a calibrated run alone"),
        (("-f", "gguf", "--calibration", text), "no GGUF mixture or type"),
        (("--calibration", text), "something under this name already"),
        (("--calibration", tmp_path / "none.txt"), "cannot be read"),
    ):
        refused = command(*asked, *more)
        assert refused.returncode not in (0, 1) and message in refused.stderr and "Traceback" not in refused.stderr
