"""The emulator's programs take longer to compile than to run: the tests' processes share them, and compile its header once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcore_cuda import cpp

_FIBERS = Path(__file__).with_name("fibers.h")


@pytest.fixture(autouse=True, scope="session")
def shared_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    folder.mkdir(exist_ok=True)

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        source, library = Path(command[-3]), Path(command[-1])
        made = folder / f"{hashlib.sha256(source.read_bytes()).hexdigest()}.so"
        if not made.exists():
            done = subprocess.run([command[0], "-include", str(_header(folder, command)), *command[1:]], **options)
            if done.returncode:
                return done
            shutil.copyfile(library, part := made.with_suffix(f".{os.getpid()}"))
            part.rename(made)
        shutil.copyfile(made, library)
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp, "subprocess", SimpleNamespace(run=run))
        yield


def _header(folder: Path, command: list[str]) -> Path:
    """fibers.h as the compiler has it made before, with the options of the command: it takes no other."""
    header = folder / "fibers.h"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not header.exists():
            options = [part for part in command[:-3] if part != "-shared"]
            subprocess.run([*options, "-x", "c++-header", str(_FIBERS), "-o", f"{header}.gch"], check=True)
            header.write_text('#error "the compiler does not take the header that it has made"\n')
    return header
