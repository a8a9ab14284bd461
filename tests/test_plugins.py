"""Discovery with real packages, good and broken, each in a fresh interpreter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcore.platform import PLATFORM_PLUGINS

GOOD = """
from qcore.hookspecs import hookimpl
from qcore.kernel import Accepts, Kernel
from qcore.platform import Device, Platform
QCORE_API = (1, 0)

@hookimpl
def qcore_platforms():
    return [Platform("toyland", "Toy")]

@hookimpl
def qcore_kernels():
    return [Kernel("toy_linear", "toy", "linear", ("toyland",), Accepts(("int4",)), ("bfloat16",), 1.0, "toy:Kernel")]

@hookimpl
def qcore_devices():
    return [Device("toy:0", "toyland", "a toy", "cpu")]
"""

BROKEN = {
    "raises": ("raise ImportError('libsycl.so.8: cannot open shared object file')", "broken", "libsycl"),
    "exits": ("import sys; sys.exit(3)", "broken", "SystemExit"),
    "no_api": (GOOD.replace("QCORE_API = (1, 0)", ""), "incompatible", "none stated"),
    "old_api": (GOOD.replace("(1, 0)", "(0, 9)"), "incompatible", "found 0.9"),
    "new_api": (GOOD.replace("(1, 0)", "(1, 99)"), "incompatible", "found 1.99"),
    "unknown_hook": (GOOD + "\n@hookimpl\ndef qcore_magic():\n    return 1\n", "broken", "qcore_magic"),
    "wrong_argument": (GOOD + "\n@hookimpl\ndef qcore_report(colour):\n    return {}\n", "broken", "colour"),
    "wrong_type": (GOOD.replace('[Platform("toyland", "Toy")]', "['toyland']"), "broken", "Platform"),
    "hook_raises": (
        GOOD.replace("return [Kernel(", "raise OSError('driver gone') or [Kernel("),
        "broken",
        "driver gone",
    ),
    "hook_exits": (GOOD.replace("return [Kernel(", "raise SystemExit(1) or [Kernel("), "broken", "SystemExit"),
    "devices_raise": (GOOD.replace("return [Device(", "raise OSError('no driver') or [Device("), "broken", "no driver"),
    "devices_hang": (
        GOOD.replace("return [Device(", "import time; time.sleep(3600); return [Device("),
        "broken",
        "did not answer",
    ),
    "devices_spin": (
        GOOD.replace("return [Device(", "while True: pass\n    return [Device("),
        "broken",
        "did not answer",
    ),
    "same_name_twice": (
        GOOD.replace("return [Kernel(", "return 2 * [Kernel("),
        "broken",
        "kernel toy_linear",
    ),
    "evidence_is_no_path": (
        GOOD + "\n@hookimpl\ndef qcore_evidence():\n    return 'evidence.json'\n",
        "broken",
        "pathlib.Path",
    ),
    "anothers_platform": (GOOD.replace("toyland", "hopper"), "broken", "belongs to the plugin cuda"),
    "same_kernel": (GOOD.replace("toy_linear", "reference_linear"), "broken", "reference_linear"),
}

PROBE = """
import json, sys
import qcore
from qcore.discovery import registry
devices = [device.id for device in qcore.devices()]
rows = [
    {"name": p.name, "status": p.status, "kernels": [k.name for k in p.kernels], "refusal": p.refusal and p.refusal.to_dict()}
    for p in qcore.plugins()
]
print(json.dumps({"plugins": rows, "devices": devices, "torch": "torch" in sys.modules}))
"""


def install(folder: Path, name: str, source: str) -> None:
    """A package as pip would leave it: a module and its dist-info."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[qcore.plugins]\n{name} = {name}\n")


def probe(folder: Path, **environment: str) -> dict[str, object]:
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def by_name(answer: dict[str, object]) -> dict[str, dict[str, object]]:
    return {plugin["name"]: plugin for plugin in answer["plugins"]}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_a_broken_plugin_is_reported_and_harms_nobody(tmp_path: Path, kind: str) -> None:
    source, status, clue = BROKEN[kind]
    install(tmp_path, "bad_vendor", source)
    if kind != "same_kernel":  # two good ones would claim the same names
        install(tmp_path, "zz_good", GOOD.replace("toy_linear", "good_linear").replace("toyland", "goodland"))
    began = time.perf_counter()
    answer = probe(tmp_path, QCORE_HOST_SECONDS="1")
    assert time.perf_counter() - began < 10
    plugins = by_name(answer)
    bad = plugins["bad_vendor"]
    assert bad["status"] == status and clue in json.dumps(bad["refusal"])
    assert bad["refusal"]["fix"]  # type: ignore[index]
    assert plugins["core"]["status"] == "loaded" and plugins["cpu"]["status"] == "loaded"
    assert "reference_linear" in plugins["core"]["kernels"]  # type: ignore[operator]
    assert not answer["torch"]
    if kind != "same_kernel":
        assert plugins["zz_good"]["kernels"] == ["good_linear"]
        assert "toy:0" in answer["devices"]  # type: ignore[operator]


@pytest.mark.parametrize("name", ["cpu", "cuda", "rocm", "xpu", "gaudi", "tpu", "neuron"])
@pytest.mark.parametrize(
    ("source", "clue"),
    [("raise ImportError('libvendor.so: cannot open')", "libvendor"), ("raise SystemExit(1)", "SystemExit")],
)
def test_each_of_ours_may_break_and_the_others_go_on(tmp_path: Path, name: str, source: str, clue: str) -> None:
    """The plugin's own package, shadowed by a broken one."""
    (tmp_path / f"qcore_{name}").mkdir()
    (tmp_path / f"qcore_{name}" / "__init__.py").write_text(source)
    # An editable install of a package with compiled parts has a finder of its own, which comes before PYTHONPATH.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
    )
    plugins = by_name(probe(tmp_path))
    assert plugins[name]["status"] == "broken" and clue in json.dumps(plugins[name]["refusal"])
    assert all(row["status"] == "loaded" for other, row in plugins.items() if other != name)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    matrix = subprocess.run(
        [sys.executable, "-m", "qcore", "matrix", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    cells = json.loads(matrix.stdout)["cells"]
    own = {platform for platform, owner in PLATFORM_PLUGINS.items() if owner == name}
    refused = {cell["refusal"]["code"] for cell in cells if cell["platform"] in own}
    assert refused == {"plugin-broken"} and all(
        f"QCORE_DISABLE={name}" in c["refusal"]["fix"] for c in cells if c["platform"] in own
    )
    assert name == "cpu" or any(cell["supported"] for cell in cells)


def test_a_stranger_under_a_known_name_does_not_push_the_plugin_out(tmp_path: Path) -> None:
    """Two distributions name a plugin `cpu`; that the stranger's module sorts first must not matter."""
    install(tmp_path, "aaa", GOOD)
    (tmp_path / "aaa-1.2.dist-info" / "entry_points.txt").write_text("[qcore.plugins]\ncpu = aaa\n")
    found = {(p["name"], p["status"], tuple(p["kernels"])) for p in probe(tmp_path)["plugins"]}  # type: ignore[attr-defined]
    assert ("cpu", "broken", ()) in found
    assert any(name == "cpu" and status == "loaded" and "onednn_int8" in kernels for name, status, kernels in found)


def test_a_good_plugin_is_found(tmp_path: Path) -> None:
    install(tmp_path, "toy", GOOD)
    answer = probe(tmp_path)
    assert by_name(answer)["toy"]["status"] == "loaded"
    assert "toy:0" in answer["devices"]  # type: ignore[operator]


def test_the_environment_restricts_and_blocks(tmp_path: Path) -> None:
    install(tmp_path, "toy", GOOD)
    only = by_name(probe(tmp_path, QCORE_PLUGINS="toy"))
    assert (only["core"]["status"], only["toy"]["status"], only["cpu"]["status"]) == ("loaded", "loaded", "disabled")
    blocked = by_name(probe(tmp_path, QCORE_DISABLE="toy,core"))
    assert (blocked["core"]["status"], blocked["toy"]["status"], blocked["cpu"]["status"]) == (
        "loaded",
        "disabled",
        "loaded",
    )
    assert blocked["toy"]["refusal"]["code"] == "plugin-disabled"  # type: ignore[index]


def test_a_disabled_plugin_is_not_even_imported(tmp_path: Path) -> None:
    install(tmp_path, "toy", f"open({str(tmp_path / 'touched')!r}, 'w').close()\n" + GOOD)
    probe(tmp_path, QCORE_DISABLE="toy")
    assert not (tmp_path / "touched").exists()
    probe(tmp_path)
    assert (tmp_path / "touched").exists()
