"""convert: the same numbers in another format, read back before the folder appears; and nothing at all where it fails."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import qcore
import test_auto_round
import test_compressed_floats
import test_compressed_tensors
import test_gptq
from makers import dense_llama, gptq_tensors, write
from qcore.checkpoint.writer import AtomicFolder, SafetensorsWriter, atomic_file
from qcore.cli.main import app
from qcore.convert import convert, writer_of
from qcore.method import Method
from qcore.scheme import Scheme

GOLDEN = Path(__file__).parent / "golden"
DOWN = "model.layers.0.mlp.down_proj"


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def same(a: qcore.Checkpoint, b: qcore.Checkpoint) -> None:
    assert a.layers.keys() == b.layers.keys()
    for module in a.layers:
        assert torch.equal(a.dequantize(module), b.dequantize(module)), module
    assert {k: v for k, v in a.config.items() if k != "dtype"} == {k: v for k, v in b.config.items() if k != "dtype"}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("form", ["sym", "asym", "order"])
@pytest.mark.parametrize("size", [32, -1])
def test_integers_go_round_through_gptq_and_compressed_tensors(tmp_path: Path, bits: int, form: str, size: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (64, 96))
    groups = 3 if size > 0 else 1
    scale = (torch.rand(64, groups) * 0.01 + 0.001).half()
    parts = {
        "weight_packed": test_compressed_tensors.words(codes + half, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([64, 96]),
    }
    if form == "asym":
        parts["weight_zero_point"] = test_compressed_tensors.words(
            torch.randint(0, 2 * half, (64, groups)).t(), bits
        ).t()
    if form == "order" and size > 0:
        parts["weight_g_idx"] = (torch.arange(96) // 32)[torch.randperm(96)].int()
    given = test_compressed_tensors.arguments(
        num_bits=bits, symmetric=form != "asym", strategy="group" if size > 0 else "channel",
        group_size=size if size > 0 else None, actorder="group" if form == "order" and size > 0 else None,
    )  # fmt: skip
    first = qcore.open_checkpoint(test_compressed_tensors.checkpoint(tmp_path / "a", parts, given))
    second = qcore.open_checkpoint(convert(first.path, "gptq", tmp_path / "b"))
    third = qcore.open_checkpoint(convert(second.path, "compressed-tensors", tmp_path / "c"))
    same(first, second)
    same(first, third)
    assert first.plan[DOWN] == third.plan[DOWN]
    version = "gptq_p" if bits in (5, 6, 7) else "gptq_v2" if form == "asym" else "gptq"
    assert second.format_version == version


def test_parts_that_do_not_fit_together_are_refused_by_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a tensor that is read as a whole are."""
    source = qcore.open_checkpoint(GOLDEN / "base")

    def broken(_: Any, files: Any, name: str) -> Iterator[torch.Tensor]:
        yield files.source.read_rows(name, 0, 1)
        raise ValueError("no rows are left")

    whole = source.parameter("model.embed_tokens.weight")
    assert torch.equal(torch.cat(list(source.pieces("model.embed_tokens.weight"))), whole)
    monkeypatch.setattr(Method, "read_pieces", broken)
    pieces = source.pieces("model.embed_tokens.weight")
    assert torch.equal(next(pieces), whole[:1])
    with pytest.raises(qcore.Refused, match="do not fit together"):
        next(pieces)


def test_awq_takes_integers_in_groups(tmp_path: Path) -> None:
    path, weight = test_gptq.checkpoint(tmp_path / "a")
    opened = qcore.open_checkpoint(convert(path, "awq", tmp_path / "b"))
    assert opened.method == "awq" and torch.equal(opened.dequantize(test_gptq.MODULE), weight)
    path, _ = test_gptq.checkpoint(tmp_path / "c", desc_act=True)
    with pytest.raises(qcore.Refused, match="not-representable"):
        convert(path, "awq", tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", list(test_compressed_floats.COMPRESSORS))
def test_small_floats_go_round(tmp_path: Path, name: str) -> None:
    scheme, parts, expected = test_compressed_floats.compressed(name)
    first = test_compressed_floats.checkpoint(tmp_path / "a", name, scheme, parts)
    opened = qcore.open_checkpoint(convert(first, "compressed-tensors", tmp_path / "b"))
    assert opened.plan[DOWN] == Scheme.parse(test_compressed_floats.SCHEMES[name])
    assert torch.equal(opened.dequantize(DOWN), expected)


def test_nvfp4_goes_between_tools_that_multiply_in_another_order(tmp_path: Path) -> None:
    parts, weight, config, scheme = test_auto_round.float_layer("NVFP4")
    layers = {test_auto_round.UP: {f"{test_auto_round.UP}.{part}": tensor for part, tensor in parts.items()}}
    first = test_auto_round.checkpoint(tmp_path / "a", layers, packing_format="auto_round:llm_compressor", **config)
    second = convert(first, "compressed-tensors", tmp_path / "b")
    third = convert(second, "auto-round", tmp_path / "c")
    ours, theirs, again = (qcore.open_checkpoint(path).layer(test_auto_round.UP) for path in (first, second, third))
    assert ours.weight.scheme == theirs.weight.scheme == Scheme.parse(scheme)
    assert torch.equal(ours.weight.codes, theirs.weight.codes)
    for one, other in zip(ours.weight.scales, theirs.weight.scales, strict=True):
        assert torch.equal(one.double(), other.double())
    assert (ours.order, theirs.order) == ("inverses", "dequantized")
    assert not torch.equal(theirs.weight.dequantize(), weight)  # one last bit, which is each tool's own
    assert torch.equal(again.weight.dequantize(), weight)
    dense = qcore.open_checkpoint(convert(first, "dense", tmp_path / "d"))
    assert torch.equal(dense.parameter(f"{test_auto_round.UP}.weight"), weight)


def test_layers_of_several_schemes_keep_theirs(tmp_path: Path) -> None:
    tensors, up = dense_llama(), "model.layers.0.mlp.up_proj"
    for module, bits, size in ((DOWN, 4, 32), (up, 8, 16)):
        rows, columns = tensors.pop(f"{module}.weight").shape
        codes = torch.randint(0, 1 << bits, (rows, columns))
        middle = torch.full((rows, columns // size), 1 << (bits - 1))
        scales = (torch.rand(rows, columns // size) * 0.01 + 0.001).half()
        parts = gptq_tensors(codes, middle, scales, bits, None, v1=True)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
              "dynamic": {r"+:.*up_proj": {"bits": 8, "group_size": 16}}}  # fmt: skip
    source = qcore.open_checkpoint(write(tmp_path / "source", tensors, config))
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    for format in ("compressed-tensors", "gptq"):
        opened = qcore.open_checkpoint(convert(source.path, format, tmp_path / format))
        assert opened.plan == source.plan
        same(source, opened)
    assert (tmp_path / "gptq" / "tokenizer.json").is_file()


def test_dense_is_what_the_weights_stand_for(tmp_path: Path) -> None:
    source = qcore.open_checkpoint(GOLDEN / "gptqmodel-gptq-4bit-sym")
    opened = qcore.open_checkpoint(convert(source.path, "dense", tmp_path / "out"))
    same(source, opened)
    assert opened.method == "dense" and opened.own_dtype == "float32"
    ids = torch.tensor([[1, 5, 9]])
    with torch.inference_mode():
        ours, theirs = (qcore.load_model(c, dtype=torch.float32)(ids).logits for c in (source, opened))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(tmp_path: Path) -> None:
    path = GOLDEN / "gguf-q4_0"
    opened = qcore.open_checkpoint(convert(path, "dense", tmp_path / "out"))
    same(qcore.open_checkpoint(path), opened)
    text = "The quick brown fox"
    assert qcore.load_tokenizer(path)(text)["input_ids"] == qcore.load_tokenizer(tmp_path / "out")(text)["input_ids"]


def test_kv_caches_and_their_scales_are_kept_or_refused(tmp_path: Path) -> None:
    codes = torch.randint(-8, 8, (64, 96))
    parts = {"weight_packed": test_compressed_tensors.words(codes + 8, 4), "weight_scale": torch.ones(64, 3).half(),
             "weight_shape": torch.tensor([64, 96])}  # fmt: skip
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    path = test_compressed_tensors.checkpoint(
        tmp_path / "a", parts, test_compressed_tensors.arguments(), kv_cache_scheme=cache
    )
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors |= {f"model.layers.0.self_attn.{part}_scale": torch.tensor([0.25]) for part in "kv"}
    save_file(tensors, path / "model.safetensors")
    opened = qcore.open_checkpoint(convert(path, "compressed-tensors", tmp_path / "b"))
    assert str(opened.kv_cache) == "fp8-tensor"
    assert opened.kv_scales["model.layers.0.self_attn"].k.scale.tolist() == [0.25]
    for format in ("gptq", "dense"):
        with pytest.raises(qcore.Refused, match="not-representable"):
            convert(path, format, tmp_path / format)


@pytest.mark.parametrize(
    ("format", "code"),
    [("abacus", "unknown-format"), ("gptq", "not-representable")],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, format: str, code: str) -> None:
    with pytest.raises(qcore.Refused) as caught:
        convert(write(tmp_path / "a", dense_llama()), format, tmp_path / "b")
    assert caught.value.refusal.code == code and caught.value.refusal.fix
    assert names_in(tmp_path) == ["a"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path, _ = test_gptq.checkpoint(tmp_path / "a")
    (tmp_path / "b").mkdir()
    convert(path, "gptq", tmp_path / "b")  # an empty folder is as good as none
    before = sorted(file.read_bytes() for file in (tmp_path / "b").iterdir())
    with pytest.raises(qcore.Refused, match="output-exists"):
        convert(path, "gptq", tmp_path / "b")
    assert sorted(file.read_bytes() for file in (tmp_path / "b").iterdir()) == before
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(qcore.Refused, match="output-exists"):
        convert(path, "gptq", tmp_path / "link")


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path, _ = test_gptq.checkpoint(tmp_path / "a")
    first, second = (convert(path, "compressed-tensors", tmp_path / name) for name in "bc")
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}


def test_shards_have_an_index(tmp_path: Path) -> None:
    tensors = dense_llama()
    with AtomicFolder(tmp_path / "out") as target:
        writer = SafetensorsWriter(target.folder, shard_bytes=40_000)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].startswith("model-00001-of-")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        with safe_open(tmp_path / "out" / index["weight_map"][name], "pt") as held:
            assert torch.equal(held.get_tensor(name), tensor)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(0, 3), torch.tensor(3.5), torch.zeros(3, 2).t(), torch.ones(4).to(torch.float8_e4m3fn), torch.zeros(2, dtype=torch.bool)],
    ids=["empty", "scalar", "strided", "fp8", "bool"],
)  # fmt: skip
def test_every_kind_of_tensor_is_written(tmp_path: Path, tensor: torch.Tensor) -> None:
    with AtomicFolder(tmp_path / "out") as target:
        writer = SafetensorsWriter(target.folder)
        writer.add("t", tensor)
        writer.close()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as held:
        assert torch.equal(held.get_tensor("t").float(), tensor.float()) and held.get_tensor("t").dtype == tensor.dtype


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), AtomicFolder(tmp_path / "out") as target:
        (target.folder / "half").write_text("x")
        raise KeyError
    with pytest.raises(KeyError):
        atomic_file(tmp_path / "file", lambda path: {}["no"])
    assert names_in(tmp_path) == []


def test_a_disk_that_says_no_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = test_gptq.checkpoint(tmp_path / "a")
    with pytest.raises(qcore.Refused, match="cannot-write") as caught:
        convert(path, "gptq", tmp_path / "no" / "such" / "folder")
    assert "Create the folder" in caught.value.refusal.fix
    full = shutil.copyfileobj

    def no_space(*arguments: Any) -> None:
        full(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", no_space)
    with pytest.raises(qcore.Refused, match="cannot-write") as caught:
        convert(path, "gptq", tmp_path / "b")
    assert "space" in caught.value.refusal.fix and names_in(tmp_path) == ["a"]


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_small_disk_and_a_read_only_one(tmp_path: Path) -> None:
    """Real file systems, where this machine lets us mount them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path, _ = test_gptq.checkpoint(tmp_path / "a")
        with pytest.raises(qcore.Refused, match="cannot-write"):
            convert(path, "dense", disk / "out")
        assert names_in(disk) == []
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(qcore.Refused, match="cannot-write") as caught:
            convert(path, "dense", disk / "out")
        assert "can be written" in caught.value.refusal.fix
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_hundred_kills_leave_nothing_or_all_of_it(tmp_path: Path) -> None:
    """Killed at random moments of writing: every folder under its own name is whole, and the next run tidies up."""
    path, weight = test_gptq.checkpoint(tmp_path / "source")
    out, kills, whole = tmp_path / "out", 0, 0
    out.mkdir()
    chance = random.Random(0)
    while kills < 200:
        child = subprocess.Popen([sys.executable, "-c", _FORKING, str(path), str(out), str(200 - kills), str(chance.random())],
                                 stdout=subprocess.PIPE, text=True)  # fmt: skip
        report = json.loads(child.communicate(timeout=300)[0].splitlines()[-1])
        kills += report["kills"]
        assert report["kills"] > 0
    names = [name for name in names_in(out) if not name.startswith(".")]
    for name in names:
        opened = qcore.open_checkpoint(out / name)
        assert torch.equal(opened.dequantize(test_gptq.MODULE), weight)
        whole += 1
    assert whole < 200  # some were killed in the midst of it
    left = [name for name in names_in(out) if name.startswith(".")]
    for name in left:  # as old as a real leftover would be
        os.utime(out / name, (time.time() - 3600,) * 2)
    convert(path, "gptq", out / f"out{chance.randrange(200)}x")
    for name in {name.split(".partial-")[0][1:] for name in left}:
        if not (out / name).exists():
            convert(path, "gptq", out / name)
    assert [name for name in names_in(out) if name.startswith(".")] == []


_FORKING = """
import json, os, random, signal, sys, time
from qcore.convert import convert
import qcore.methods.compressed_tensors, qcore.methods.gptq, qcore.tensor, torch
torch.set_num_threads(1)
path, out, wanted, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
chance, kills = random.Random(seed), 0
begun = time.time()
convert(path, "compressed-tensors", f"{out}/warm{seed}", verify=False)
convert(path, "compressed-tensors", f"{out}/timed{seed}", verify=False)
begun = time.time()
convert(path, "compressed-tensors", f"{out}/again{seed}", verify=False)
length = time.time() - begun
for i in range(wanted):
    child = os.fork()
    if child == 0:
        convert(path, "compressed-tensors", f"{out}/out{seed}-{i}", verify=False)
        os._exit(0)
    time.sleep(chance.uniform(0, 1.2 * length))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print(json.dumps({"kills": kills}))
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = test_gptq.checkpoint(tmp_path / "a")
    app(["convert", str(path), "--format", "compressed-tensors", "--out", str(tmp_path / "b"), "--json"],
        standalone_mode=False)  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    assert document["method"] == "compressed-tensors" and document["schemes"]["W4A16-g32-asym"] == 1


def test_formats_are_known_by_name() -> None:
    assert writer_of("gptq")[0].name == "gptq"
    with pytest.raises(qcore.Refused, match="compressed-tensors"):
        writer_of("gptq2")
    with pytest.raises(qcore.Refused, match="unknown-format"):
        writer_of("gptq:gptq_v9")
