"""Builds the wheels of the core and of every plugin, and tries each plugin in a fresh virtual environment of its own.

    python tools/try_wheels.py [--keep FOLDER] [PLUGIN ...]

Each has an environment of its own, above one that has the core and torch. The first plugin is installed as users do it, by the core's
extra; the others with --no-deps, for their vendors' SDKs cannot be installed everywhere and do not share an environment. In each,
`qcore doctor` and `qcore plugins` must answer, and the fast part of the conformance suite must pass. Last, `qcore plugins new` makes a package, which is built,
installed, run through its suite, and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLUGINS = ("cpu", "cuda", "rocm", "xpu", "gaudi", "tpu", "neuron")
QUIET = ("--quiet", "--disable-pip-version-check")
BUILD = (
    "--no-build-isolation",
    "--config-settings",
    f"build-dir={ROOT / 'build' / 'native'}",
)  # as the Makefile has it
SUITE = """
import pytest
from qcore.testing.capabilities import Capabilities
from qcore.testing.suite import *


@pytest.fixture(scope="session")
def vendor():
    return Capabilities({plugin!r})
"""


class Environment:
    """A virtual environment. base: another, whose packages it sees too."""

    def __init__(self, folder: Path, base: Environment | None = None) -> None:
        venv.create(folder, with_pip=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        if base is not None:
            (self.packages / "base.pth").write_text(str(base.packages))

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python3*/site-packages"))

    def pip(self, *arguments: object) -> None:
        self.run("-m", "pip", "install", *QUIET, "--constraint", ROOT / "constraints.txt", *arguments)

    def run(self, *arguments: object, **variables: str) -> str:
        """Standard output; ends the program where the command fails."""
        command = [str(self.python), *map(str, arguments)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "QCORE_"))}
        done = subprocess.run(command, capture_output=True, text=True, env=clean | variables, cwd=self.folder)
        if done.returncode:
            sys.exit(f"failed: {' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        return done.stdout


def build(folders: list[Path], dist: Path) -> None:
    """Wheels, built from the source as it stands."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        *QUIET,
        *BUILD,
        "--no-deps",
        "--wheel-dir",
        str(dist),
        *map(str, folders),
    ]
    subprocess.run(command, check=True)


def core(dist: Path, scratch: Path) -> Environment:
    """The core alone."""
    environment = Environment(scratch / "core")
    environment.pip(
        "torch", "pytest", "hatchling"
    )  # the pinned torch first, so that nothing takes a larger build of it
    environment.pip("--find-links", dist, "qcore>=2")
    return environment


def try_plugin(plugin: str, dist: Path, scratch: Path, base: Environment, by_extra: bool) -> None:
    environment = Environment(scratch / plugin, base)
    if by_extra:
        environment.pip("--find-links", dist, f"qcore[{plugin}]>=2")
    else:
        environment.pip("--find-links", dist, "--no-deps", f"qcore-{plugin}>=2")
    found = {row["name"]: row for row in json.loads(environment.run("-m", "qcore", "plugins", "--json"))}
    if found[plugin]["status"] != "loaded" or str(ROOT) in str(found[plugin]["evidence"]):
        sys.exit(f"{plugin}: not loaded from its wheel: {found[plugin]}")
    report = json.loads(environment.run("-m", "qcore", "doctor", "--json"))
    environment.run("-m", "qcore", "matrix", "--json")
    test = scratch / plugin / f"test_{plugin}_wheel.py"
    test.write_text(SUITE.format(plugin=plugin))
    summary = environment.run("-m", "pytest", "-q", "--qcore-fast", "-p", "no:cacheprovider", test).splitlines()[-1]
    devices = ", ".join(device["id"] for device in report["devices"]) or "no device"
    print(f"{plugin}: {found[plugin]['version']} loaded beside the core, {devices}; suite: {summary}", flush=True)


def try_template(scratch: Path, base: Environment) -> None:
    environment = Environment(scratch / "template", base)
    environment.run("-m", "qcore", "plugins", "new", "acme", "--title", "Acme NPU", "--out", scratch)
    made = scratch / "qcore-acme"
    environment.run("-m", "pip", "wheel", *QUIET, "--no-deps", "--no-build-isolation", "--wheel-dir", scratch, made)
    environment.pip("--find-links", scratch, "--no-deps", "qcore-acme")
    summary = environment.run(
        "-m", "pytest", "-q", "--qcore-fast", "-p", "no:cacheprovider", made / "tests"
    ).splitlines()[-1]
    environment.run("-m", "pip", "uninstall", *QUIET, "--yes", "qcore-acme")
    left = {row["name"] for row in json.loads(environment.run("-m", "qcore", "plugins", "--json"))}
    if "acme" in left:
        sys.exit("acme is still found after it was removed")
    print(f"template: made, built, installed, removed; suite: {summary}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plugins", nargs="*", default=PLUGINS, metavar="PLUGIN", help="default: all")
    parser.add_argument("--keep", type=Path, help="build the wheels into this folder and leave them there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        dist = (arguments.keep or scratch / "dist").absolute()
        build([ROOT, *(ROOT / "plugins" / plugin for plugin in arguments.plugins)], dist)
        base = core(dist, scratch)
        for plugin in arguments.plugins:
            began = time.monotonic()
            try_plugin(plugin, dist, scratch, base, by_extra=plugin == "cpu")
            print(f"  {time.monotonic() - began:.0f} s", flush=True)
        try_template(scratch, base)


if __name__ == "__main__":
    main()
