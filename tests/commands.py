"""The command line as a user meets it: each command in a process of its own, from its arguments to its exit status.

Processes are forked from a server that has imported what takes seconds and run nothing; test_cli.py starts some from nothing too.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch", "transformers.models.llama.modeling_llama", "qcore.cli.main", "qcore.model.load", "qcore.model.generate",
     "qcore.model.kv_cache", "qcore.testing.verify"]
)  # fmt: skip


def _main(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name, mode in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        file = os.open(Path(folder, name), mode)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 (as long as the process)
    sys.argv = ["qcore", *arguments]
    from qcore.cli.main import main

    main()


def command(*arguments: object, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `qcore ARGUMENTS`. text: what it reads on its standard input. environment: variables besides this process's own."""
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("in", "out", "err")}
        for name, file in files.items():
            file.write_text(text or "" if name == "in" else "")
        process = _SERVER.Process(target=_main, args=(words, {**os.environ, **environment}, folder))
        process.start()
        process.join()
        status = process.exitcode or 0
        return subprocess.CompletedProcess(words, status, files["out"].read_text(), files["err"].read_text())
