"""Calibrated GGUF files: nearer than without a text and than by importance alone, runs that are killed and go on, and what is refused."""

import hashlib
import json
import multiprocessing
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from commands import command
from qcore.blocks.dequantize import dequantize_blocks
from qcore.blocks.quantize import quantize_blocks
from qcore.calibration.run import BlockDone, quantize
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.open import open_checkpoint
from qcore.evaluation import evaluate
from qcore.gguf.contents import contents_of, stored_rows
from qcore.gguf.make import save_gguf
from qcore.refusal import Refused
from test_calibration import BASE, GOLDEN, HELD, READ
from test_gguf_write_experts import made as mixture_of
from test_gguf_write_experts import written

BLOCKS = {"token_embd": "f32", "^output": "f32"}
"""So that what decoder blocks do is all that is measured."""


def made(out: Path, scheme: str = "Q4_K_M", algorithm: str = "", **others: Any) -> Path:
    asked: dict[str, Any] = {"format": "gguf", "samples": 2, "seqlen": 128, "overrides": BLOCKS, **others}
    return quantize(BASE, scheme, algorithm, READ, out=out, **asked).paths[0]


@cache
def reference() -> Any:
    return qcore.load_model(BASE, device="cpu", dtype="float32")


def divergence(path: Path) -> float:
    """From the model that it was made of, in nats, on a text that no run has seen."""
    tokens = open_checkpoint(BASE).load_tokenizer()(HELD)["input_ids"][:1536]
    model = qcore.load_model(path, device="cpu", dtype="float32", kernel="reference_linear")
    return float(evaluate(model, tokens, reference=reference(), context=256).summary()["kld_mean"])


def types(path: Path) -> dict[str, str]:
    source = open_checkpoint(path).files.source
    assert isinstance(source, GgufSource)
    return {name: info.dtype for name, info in source.tensors.items()}


def test_nearer_than_without_a_text_and_than_by_importance_alone(tmp_path: Path) -> None:
    gptq, imatrix = (made(tmp_path / f"{name}.gguf", algorithm=name, samples=16) for name in ("gptq", "imatrix"))
    plain = save_gguf(open_checkpoint(BASE), tmp_path / "plain.gguf", "Q4_K_M", overrides=BLOCKS)
    first, second, third = map(divergence, (gptq, imatrix, plain))
    assert first < 0.5 * second and second < third
    assert set(tmp_path.iterdir()) == {gptq, imatrix, plain}  # the run's folder is gone


def test_rotated_models_are_held_too(tmp_path: Path) -> None:
    """All tensors are those of the rotated model, which says the same."""
    assert divergence(made(tmp_path / "out.gguf", algorithm="hadamard+imatrix")) < 1e-3


def test_types_are_those_of_the_mixture_with_an_importance_matrix(tmp_path: Path) -> None:
    """Tensors outside decoder blocks are encoded as without a text."""
    calibrated = made(tmp_path / "own.gguf", "Q4_0", "imatrix", overrides={"attn_k": "q8_0", "blk.1.ffn_up": "f16"})
    source = open_checkpoint(calibrated).files.source
    assert isinstance(source, GgufSource)
    found = types(calibrated)
    assert found["blk.0.attn_k.weight"] == "Q8_0" and found["blk.1.ffn_up.weight"] == "F16"
    assert found["blk.1.attn_q.weight"] == "Q4_0" and source.metadata["general.file_type"] == 2
    embedding = open_checkpoint(BASE).parameter("model.embed_tokens.weight").float()
    kind = found["token_embd.weight"].lower()
    assert torch.equal(dequantize_blocks(kind, source.read("token_embd.weight")), dequantize_blocks(kind, quantize_blocks(kind, embedding)))  # fmt: skip


def test_of_a_gguf_file(tmp_path: Path) -> None:
    """Its rows of q and k are in another order than transformers': the same numbers come of either file."""
    torch.set_num_threads(1)
    dense = save_gguf(open_checkpoint(BASE), tmp_path / "dense.gguf", "f32")
    asked: dict[str, Any] = {"format": "gguf", "samples": 2, "seqlen": 64}
    of_file = quantize(dense, "Q4_K_M", "imatrix", READ, out=tmp_path / "of-file.gguf", **asked).paths[0]
    of_folder = quantize(BASE, "Q4_K_M", "imatrix", READ, out=tmp_path / "of-folder.gguf", **asked).paths[0]
    ours, theirs = open_checkpoint(of_file), open_checkpoint(of_folder)
    assert types(of_file) == types(of_folder)
    for module, found in ours.plan.items():
        assert found is not None and torch.equal(ours.weight(module).codes, theirs.weight(module).codes), module


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_experts_come_in_their_order(tmp_path: Path, name: str) -> None:
    """Those that no token reaches too, and those that the checkpoint has stacked; each near to its own weights and to no other's."""
    mixture = mixture_of(name)
    tensors = mixture.rest if name == "gpt-oss" else mixture.tensors()
    path = written(tmp_path / "model", mixture, tensors)
    out = quantize(path, "Q5_0", "", READ, out=tmp_path / "out.gguf", format="gguf", samples=2, seqlen=32).paths[0]
    held, contents = open_checkpoint(out).files.source, contents_of(open_checkpoint(path))
    assert isinstance(held, GgufSource)
    for tensor, kind in types(out).items():
        if kind in ("Q5_0", "Q5_1", "Q8_0"):
            for made_rows, rows in zip(stored_rows(held, tensor), contents.rows(tensor), strict=True):
                assert (made_rows - rows).norm() < 0.15 * rows.norm(), tensor


def _killed(out: Path) -> None:
    made(out, done=lambda _: os.kill(os.getpid(), signal.SIGKILL))


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = made(tmp_path / "whole.gguf")
    out = tmp_path / "out.gguf"
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(out,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    assert json.loads((tmp_path / "out.gguf.work" / "state.json").read_text())["blocks"] == 1
    with pytest.raises(Refused, match="--resume"):
        made(out)
    for other in ({"scheme": "Q3_K_M"}, {"overrides": {"attn_k": "q8_0"}}):
        with pytest.raises(Refused, match=r"found another .*types"):
            made(out, resume=True, **other)
    numbers: list[BlockDone] = []
    made(out, resume=True, done=numbers.append)
    assert [done.number for done in numbers] == [2]
    assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256(whole.read_bytes()).digest()


def test_a_disk_that_is_full_when_the_file_is_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import qcore.gguf.make as make

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    real, out = make.write_tensors, tmp_path / "out.gguf"
    monkeypatch.setattr(make, "write_tensors", full)
    with pytest.raises(Refused, match="Free some space"):
        made(out, algorithm="imatrix")
    assert {file.name for file in tmp_path.iterdir()} == {"out.gguf.work"}
    monkeypatch.setattr(make, "write_tensors", real)
    made(out, algorithm="imatrix", resume=True, done=lambda _: pytest.fail("all blocks are done"))
    assert {file.name for file in tmp_path.iterdir()} == {"out.gguf"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "W4A16-g128-sym"}, "no GGUF mixture or type of this name"),
        ({"scheme": "Q9_K"}, "no GGUF mixture or type of this name"),
        ({"scheme": "F16"}, "no layer of the model is stored in blocks"),
        ({"model": GOLDEN / "gguf-q4_0"}, "no layer of the model is stored in blocks"),
        ({"algorithm": "rtn"}, "Name one of: gptq, imatrix"),
        ({"algorithm": "awq+gptq"}, "Name one of: gptq, imatrix"),
        ({"kv_cache": "fp8"}, "kv cache"),
        ({"format": ["gguf", "gptq"]}, "no scheme of other formats"),
        ({"overrides": {"attn_k": "q9"}}, "no GGUF type of this name"),
        ({"target_bpw": 4.25}, "for integer weights alone"),
        ({"out": BASE}, "something under this name"),
        ({"calibration": "a"}, "too short"),
    ],
)
def test_refused_before_anything_is_calibrated(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"model": BASE, "scheme": "Q4_K_M", "calibration": READ, "format": "gguf", "out": tmp_path / "out.gguf", **given}  # fmt: skip
    with pytest.raises(Refused) as caught:
        quantize(**asked, samples=2, seqlen=64, done=lambda _: pytest.fail("a block was quantized"))
    assert message in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    text.write_text(READ, encoding="utf-8")
    asked = ("quantize", BASE, "--scheme", "Q4_K_M", "-o", out, "--calibration", text)
    done = command(*asked, "--samples", 4, "--seqlen", 64, "--tensor-type", "attn_k=q8_0", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["out"] == str(out) and report["format"] == "gguf" and len(report["layers"]) == 14
    assert types(out)["blk.0.attn_k.weight"] == "Q8_0"
    assert qcore.load_model(out, device="cpu", dtype="float32")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    refused = command(*asked, "--imatrix", text)
    assert refused.returncode not in (0, 1) and "Leave one of --imatrix and --calibration out" in refused.stderr
