"""Writers under a hostile system: a disk that is full at any moment, kills, other writers of the same name, links."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qcore
import test_gptq
from qcore.checkpoint.open import open_checkpoint
from qcore.checkpoint.writer import AtomicFolder, atomic_file
from qcore.convert import convert
from qcore.gguf.make import save_gguf

GOLDEN = Path(__file__).parent / "golden" / "gguf-q4_0" / "tiny-q4_0.gguf"
Writer = Callable[[Path], object]
WRITERS: dict[str, Writer] = {
    "gguf to gguf": lambda out: convert(GOLDEN, "gguf", out),
    "quantized to gguf": lambda out: save_gguf(open_checkpoint(GOLDEN), out, "q8_0"),
    "gguf to dense": lambda out: convert(GOLDEN, "dense", out, verify=False),
}


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("call", ["fsync", "rename", "link", "open", "mkdir"])
def test_a_disk_that_is_full_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, call: str
) -> None:
    """Each call that may meet a full disk does so once, from the first to the last."""
    real, failed = getattr(os, call), 0
    for moment in range(100):
        count = 0

        def full(*arguments: object, moment: int = moment, **named: object) -> object:
            nonlocal count
            place = str(arguments[0])
            ours = call == "fsync" or str(tmp_path) in place
            if ours and (call != "open" or int(str(arguments[1])) & os.O_CREAT):
                count += 1
                if count == moment + 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        out = tmp_path / f"out{moment}"
        with monkeypatch.context() as patched:
            patched.setattr(os, call, full)
            try:
                WRITERS[writer](out)
            except qcore.Refused as error:
                assert error.refusal.code == "cannot-write" and "space" in error.refusal.fix, error
                assert names_in(tmp_path) == []
                failed += 1
                continue
        assert names_in(tmp_path) == [out.name] and qcore.open_checkpoint(out).layers
        if count <= moment:
            break
        shutil.rmtree(out) if out.is_dir() else out.unlink()  # it went another way: a rename in place of a hard link
    assert failed or call == "link" or (call == "rename" and "dense" not in writer)


@pytest.mark.parametrize("folder", [True, False])
def test_who_comes_second_changes_nothing(tmp_path: Path, folder: bool) -> None:
    out = tmp_path / "out"

    def write(text: str, between: Callable[[], None] = lambda: None) -> None:
        if folder:
            with AtomicFolder(out) as target:
                (target.folder / "text").write_text(text)
                between()
        else:

            def made(path: Path) -> None:
                path.write_text(text)
                between()

            atomic_file(out, made)

    with pytest.raises(qcore.Refused) as caught:
        write("second", lambda: write("first"))
    assert caught.value.refusal.code == "output-exists" and names_in(tmp_path) == ["out"]
    assert (out / "text" if folder else out).read_text() == "first"


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("folder", [True, False])
def test_of_several_processes_one_writes(
    tmp_path: Path, folder: bool, hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", no)
    for turn in range(10):
        out, children = tmp_path / f"out{turn}", []
        for _ in range(4):
            if not (child := os.fork()):
                code = 1
                try:
                    if folder:
                        with AtomicFolder(out) as target:
                            (target.folder / "text").write_text("whole")
                    else:
                        atomic_file(out, lambda path: path.write_text("whole") and None)
                    code = 0
                except qcore.Refused as error:
                    code = 2 if error.refusal.code == "output-exists" else 3
                finally:
                    os._exit(code)
            children.append(child)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes == [0, 2, 2, 2] or (not hard_links and set(codes) <= {0, 2}), codes
        assert (out / "text" if folder else out).read_text() == "whole"
    assert all(not name.startswith(".") for name in names_in(tmp_path))


def test_out_is_the_source_or_lies_in_it(tmp_path: Path) -> None:
    path, weight = test_gptq.checkpoint(tmp_path / "a")
    before = {name: (path / name).read_bytes() for name in names_in(path)}
    for out in (path, path / "config.json", path / ".." / "a"):
        with pytest.raises(qcore.Refused, match="output-exists"):
            convert(path, "compressed-tensors", out)
    inside = convert(path, "compressed-tensors", path / "inside")
    assert qcore.open_checkpoint(inside).dequantize(test_gptq.MODULE).equal(weight)
    assert {name: (path / name).read_bytes() for name in before} == before
    assert names_in(path) == sorted([*before, "inside"]) and qcore.open_checkpoint(path).method == "gptq"
    gguf = shutil.copy(GOLDEN, tmp_path / "one.gguf")
    for out in (gguf, tmp_path / "." / "one.gguf"):
        with pytest.raises(qcore.Refused, match="output-exists"):
            convert(gguf, "gguf", out)
    assert Path(gguf).read_bytes() == GOLDEN.read_bytes()


def test_links_out_of_the_folder_are_not_carried_over(tmp_path: Path) -> None:
    path, _ = test_gptq.checkpoint(tmp_path / "a")
    (tmp_path / "secret").write_text("mine")
    (path / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(qcore.Refused, match="shard-unsafe"):
        convert(path, "compressed-tensors", tmp_path / "b")
    (path / "LICENSE").unlink()
    (path / "README.md").symlink_to("config.json")
    assert (convert(path, "compressed-tensors", tmp_path / "b") / "README.md").read_text().startswith("{")


def test_paths_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), tmp_path / "a\0b", tmp_path / "config.json" / "x", Path("x" * 5000)):
        with pytest.raises(qcore.Refused, match="path-not-found"):
            qcore.open_checkpoint(path)


def test_folders_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*arguments: object, **named: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for writer in WRITERS.values():
        with pytest.raises(qcore.Refused, match="cannot-write"):
            writer(tmp_path / ("x" * 300))
        with monkeypatch.context() as patched:
            patched.setattr(os, "mkdir", no)
            with pytest.raises(qcore.Refused, match="cannot-write") as caught:
                writer(tmp_path / "out")
        assert "may write" in caught.value.refusal.fix and names_in(tmp_path) == []


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs root, to mount a small disk"
)
def test_a_small_disk_and_a_read_only_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for options in ("size=64k", "size=400k", "ro"):
            subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)
            for writer in WRITERS.values():
                with pytest.raises(qcore.Refused, match="cannot-write"):
                    writer(disk / "out")
                assert names_in(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_hundred_kills_leave_no_gguf_file_or_a_whole_one(tmp_path: Path) -> None:
    """Killed at random moments, from the first call to after the last."""
    chance, whole = random.Random(0), convert(GOLDEN, "gguf", tmp_path / "whole.gguf").read_bytes()
    began = time.perf_counter()
    convert(GOLDEN, "gguf", tmp_path / "again.gguf", verify=False)
    length, out = time.perf_counter() - began, tmp_path / "out"
    out.mkdir()
    for turn in range(200):
        if not (child := os.fork()):
            try:
                convert(GOLDEN, "gguf", out / f"{turn}.gguf", verify=False)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, 3 * length))
        os.kill(child, 9)
        os.waitpid(child, 0)
    kept = [name for name in names_in(out) if not name.startswith(".")]
    assert all((out / name).read_bytes() == whole for name in kept) and 0 < len(kept) < 200
    left = [name for name in names_in(out) if name.startswith(".")]
    for name in left:  # as old as a real leftover would be
        os.utime(out / name, (time.time() - 3600,) * 2)
    for name in {name.split(".partial-")[0][1:] for name in left}:  # the next run of the same name tidies up
        if not (out / name).exists():
            convert(GOLDEN, "gguf", out / name, verify=False)
    assert {name.split(".partial-")[0][1:] for name in names_in(out) if name.startswith(".")} <= set(kept)
