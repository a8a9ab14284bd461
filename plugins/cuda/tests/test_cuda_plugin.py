"""What the plugin declares."""

import json
import subprocess
import sys

from qcore.hooks import Hooks
from qcore.platform import PLATFORM_PLUGINS
from qcore_cuda import plugin


def test_it_owns_the_columns_that_the_core_says() -> None:
    owned = [name for name, owner in PLATFORM_PLUGINS.items() if owner == "cuda"]
    assert sorted(platform.id for platform in plugin.qcore_platforms()) == sorted(owned)
    assert all(platform.portable and platform.architectures for platform in plugin.qcore_platforms())


def test_an_architecture_has_one_column() -> None:
    architectures = [name for platform in plugin.qcore_platforms() for name in platform.architectures]
    assert len(set(architectures)) == len(architectures)


def test_the_hooks_keep_the_contract() -> None:
    hooks = Hooks()
    hooks.register("cuda", plugin)
    assert hooks.platforms("cuda") and hooks.report("cuda")()
    assert {device.platform for device in hooks.devices("cuda")()} <= {row.id for row in hooks.platforms("cuda")}
    evidence = hooks.evidence("cuda")
    assert evidence is not None and json.loads(evidence.read_text())["format"] == 1


def test_facts_import_no_torch() -> None:
    code = "import sys; from qcore_cuda import plugin as p; p.qcore_platforms(), p.qcore_evidence(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
