"""`make test-gaudi`: what needs an environment of its own, in which optimum-habana and Intel Neural Compressor are installed, and what takes minutes.

pytest plugins/gaudi/tests/lane.py; Intel's software is not needed, and must not be there.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import inspect
import json
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

import qcore
from qcore.kernel import Kernel
from qcore.layouts import inc_scales
from qcore.platform import Device
from qcore.testing.capabilities import Capabilities
from qcore.testing.suite import *  # noqa: F403
from qcore_gaudi import stand_in, whole_models
from qcore_gaudi.devices import stand_ins
from qcore_gaudi.operators import SCHEMAS

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"


class OnTheStandIn(Capabilities):
    """The whole catalogue of schemes, on the double. Of portable kernels a CPU shows nothing here."""

    @property
    def kernels(self) -> list[Kernel]:
        return [kernel for kernel in super().kernels if kernel.name.startswith("gaudi_")]

    @property
    def device(self) -> Device | None:
        return stand_ins()[0]


@pytest.fixture(scope="session")
def vendor() -> Capabilities:
    return OnTheStandIn("gaudi")


# --- Who else calls the operators ---


def folder(package: str) -> Path:
    found = find_spec(package)
    assert found and found.submodule_search_locations, f"{package} is not installed"
    return Path(next(iter(found.submodule_search_locations)))


def calls(package: Path) -> Iterator[tuple[str, ast.Call]]:
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            words = ast.unparse(node.func).split(".") if isinstance(node, ast.Call) else []
            if isinstance(node, ast.Call) and words[:-1] == ["torch", "ops", "hpu"] and words[-1] in SCHEMAS:
                yield words[-1], node


@pytest.mark.parametrize("package", ["neural_compressor", "optimum/habana"])
def test_operators_are_called_as_others_call_them(package: str) -> None:
    """Arguments by number and by name; convert_from_uint4 takes a further one in later versions."""
    root = folder(package.partition("/")[0]).joinpath(*package.split("/")[1:])
    found = list(calls(root))
    assert found
    for name, call in found:
        schema = torch._C.parse_schema(f"hpu::{name}{SCHEMAS[name]}")
        names = [argument.name for argument in schema.arguments]
        most = len(names) + (name == "convert_from_uint4")
        assert len(call.args) <= most and {word.arg for word in call.keywords} <= set(names), ast.unparse(call)
        required = [a.name for a in schema.arguments if not a.has_default_value()]
        assert {*names[: len(call.args)], *(word.arg for word in call.keywords)} >= set(required), ast.unparse(call)


# --- Intel Neural Compressor's scales ---


@pytest.fixture(scope="module")
def inc() -> Any:
    from neural_compressor.torch.algorithms.fp8_quant._core import fp_utils
    from neural_compressor.torch.algorithms.fp8_quant._core.scale_methods import round_scales_function as rounding
    from neural_compressor.torch.algorithms.fp8_quant._core.scale_methods import scale_method_config as methods
    from neural_compressor.torch.utils.auto_accelerator import INCAcceleratorType

    chips = {"GAUDI2": INCAcceleratorType.GAUDI2, "GAUDI3": INCAcceleratorType.GAUDI3}
    return types.SimpleNamespace(fp=fp_utils, rounding=rounding, methods=methods, chips=chips)


def test_all_of_incs_methods_are_read(inc: Any) -> None:
    roundings = {
        "SCALE_UNIT": "one",
        "HW_ALIGNED_FIXED": "single",
        "HW_ALIGNED": "hw",
        "POW2": "pow2",
        "IDENTITY": "none",
    }
    mapping = inc.methods.scale_method_config_mapping
    assert {method.name for method in mapping} == set(inc_scales.METHODS)
    for method, parts in mapping.items():
        weight, given = parts[inc.methods.CfgStr.WEIGHT], parts[inc.methods.CfgStr.ACTIVATION]
        own = inc_scales.METHODS[method.name]
        assert (own.weight, own.input) == (
            roundings[weight.rounding_method.name],
            roundings[given.rounding_method.name],
        )
        assert (own.channels, own.tokens) == (weight.granularity.name == "PCS", given.granularity.name == "PCS")
        assert bool(own.search) == (weight.scale_value_type.name == "OPT")
        if weight.scale_value_type.name == "MAXABS":
            assert weight.backoff == 0.5 and (given.backoff == 0.25 or own.tokens)
        if own.search and own.search != "hw":
            assert weight.params["weight_scales"] == [2.0**power for power in own.search]


@pytest.mark.parametrize("chip", ["GAUDI2", "GAUDI3"])
def test_a_chips_scales_are_incs(inc: Any, chip: str) -> None:
    bounds = inc_scales.RANGES[chip]
    ladder = [2.0**power for power in range(bounds.high, bounds.low - 1, -bounds.step)]
    assert ladder == inc.fp.get_fp8_hw_alligned_scales_by_device(torch.float8_e4m3fn, inc.chips[chip])
    assert bounds.largest == inc.fp.get_fullscale(torch.float8_e4m3fn, inc.chips[chip])
    largest = torch.logspace(-12, 6, 400).to(torch.bfloat16)
    for what, backoff in (("weight", 0.5), ("input", 0.25)):
        scale = inc.fp.calc_scale_from_maxabs(largest, bounds.largest, backoff)
        for how, calc in (
            ("hw", inc.rounding.ScaleToHwAligned(inc.chips[chip]).calc), ("pow2", inc.rounding.ScaleToPow2().calc), ("none", lambda x: x)
        ):  # fmt: skip
            assert torch.equal(inc_scales.rounded(largest, how, what, bounds.largest, bounds), calc(scale))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [name for name, method in inc_scales.METHODS.items() if method.search])
@pytest.mark.parametrize("seed", range(5))
def test_searched_scales_are_incs(inc: Any, method: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """INC's own search, whose casts the double does, for Gaudi2."""
    stand_in.load()
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: x if a == ("hpu",) else to(x, *a, **k))
    bounds, own = inc_scales.RANGES["GAUDI2"], inc_scales.METHODS[method]
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16) * 0.05
    weight[3, 5], weight[7] = 4.0, weight[7] * 30
    largest = weight.abs().amax(1, keepdim=True) if own.channels else weight.abs().amax().reshape(1, 1)
    start = inc_scales.rounded(largest, own.weight, "weight", 240.0, bounds)
    found = inc_scales.searched(weight, own, start, 240.0, bounds, torch.float8_e4m3fn)
    if own.channels:
        powers = [2.0**power for power in own.search]  # type: ignore[union-attr]
        expected = inc.fp.mmse_scale_multi(weight.t(), start.flatten(), powers, torch.float8_e4m3fn, torch.bfloat16)
        assert torch.equal(found.flatten(), expected.flatten())
    else:
        ladder = inc.fp.get_fp8_hw_alligned_scales_by_device(torch.float8_e4m3fn, inc.chips["GAUDI2"])
        candidates = ladder if own.search == "hw" else [2.0**power for power in own.search]
        assert float(found) == float(inc.fp.mmse_scale(weight, candidates, torch.float8_e4m3fn, torch.bfloat16))


# --- optimum-habana ---


def test_optimum_habana_is_of_the_range_that_is_declared() -> None:
    assert tuple(map(int, version("optimum-habana").split(".")[:2])) >= (1, 19)
    assert version("transformers").startswith("4.55.")


def test_caches_in_8_bits_need_a_newer_transformers() -> None:
    """Of the range that optimum-habana takes."""
    with pytest.raises(qcore.Refused) as caught:
        qcore.load_model(GOLDEN / "llmcompressor-kvfp8-only", stand_ins()[0])
    assert caught.value.refusal.code == "missing-package" and "kv_cache='none'" in caught.value.refusal.fix
    assert qcore.load_model(GOLDEN / "llmcompressor-kvfp8-only", stand_ins()[0], kv_cache="none")


def test_without_intels_software_it_fails_as_devices_py_says() -> None:
    done = subprocess.run([sys.executable, "-c", "import optimum.habana"], capture_output=True, text=True, check=False)
    assert done.returncode and "IndexError" in done.stderr.splitlines()[-1], done.stderr
    with pytest.raises(qcore.Refused) as caught:
        whole_models.load_model(GOLDEN / "gptqmodel-gptq-4bit-sym")
    assert caught.value.refusal.code == "missing-package" and caught.value.refusal.fix


class Hollow(types.ModuleType):
    """A module of Intel's that has every name, and does nothing; but for fused kernels, without which optimum-habana's models run on torch."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "RotaryPosEmbedding", "FusedRMSNorm")):
            raise AttributeError(name)
        return MagicMock(name=name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Of habana_frameworks, and of torchvision, which optimum-habana imports and does not ask for."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        words = name.split(".")
        ours = words[0] in ("habana_frameworks", "torchvision") and not words[-1][0].isupper()
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Hollow(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


TOOLS = {"pip list": "habana-torch-plugin 1.24.0.1\n", "hl-smi": "-\n-\n| Driver Version: 1.24.0-1 |\n"}


def whole_model(path: str) -> dict[str, Any]:
    """Runs in a process of its own: optimum-habana's class on the double, with Intel's Python packages hollow."""
    device = stand_ins()[0]
    sys.meta_path.insert(0, Finder())
    run = subprocess.run

    def told(command: Any, *given: Any, **named: Any) -> Any:
        said = next((text for tool, text in TOOLS.items() if tool in str(command)), None)
        return (
            run(command, *given, **named)
            if said is None
            else types.SimpleNamespace(stdout=said, stderr="", returncode=0)
        )

    subprocess.run = told  # type: ignore[assignment]
    model = whole_models.load_model(path, device, dtype="bfloat16")
    tokens = load_file(Path(path) / "expected.safetensors")["input_ids"]
    places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    config = model.generation_config
    for name, value in {
        "max_new_tokens": 8, "do_sample": False, "use_cache": True, "static_shapes": True, "ignore_eos": True, "attn_softmax_bf16": False, "bucket_size": -1,
        "reuse_cache": False, "pad_token_id": 0, "eos_token_id": None,
    }.items():  # fmt: skip
        setattr(config, name, value)
    with torch.inference_mode():
        logits = model(tokens, position_ids=places).logits.float()
        made = model.generate(tokens, generation_config=config, lazy_mode=False, hpu_graphs=False)
    from qcore.model.load import kernel_counts

    return {"class": type(model).__name__, "kernels": kernel_counts(model), "logits": logits.tolist(), "made": made[:, tokens.shape[1] :].tolist()}  # fmt: skip


@pytest.mark.parametrize("name", ["gptqmodel-gptq-4bit-sym", "llmcompressor-w8a8-int8-dynamic", "gguf-q4_k_m", "llmcompressor-fp8-block"])  # fmt: skip
def test_whole_models_of_optimum_habana(name: str) -> None:
    """Its own class and static shapes give what transformers' class gives, with the same layers inside."""
    path = GOLDEN / name
    code = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import lane; print(json.dumps(lane.whole_model({str(path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"] == "GaudiLlamaForCausalLM" and all(
        k.startswith("gaudi_") for k in found["kernels"] if "embedding" not in k
    )
    model = qcore.load_model(path, stand_ins()[0], dtype="bfloat16")
    tokens = load_file(path / "expected.safetensors")["input_ids"]
    made = torch.tensor(found["made"])
    with torch.inference_mode():
        logits = model(torch.cat([tokens, made], 1)).logits.float()
    given, got = logits[:, : tokens.shape[1]].log_softmax(-1), torch.tensor(found["logits"]).log_softmax(-1)
    assert torch.nn.functional.kl_div(got, given, log_target=True, reduction="none").sum(-1).max() < 2e-3
    following = logits[:, tokens.shape[1] - 1 : -1]
    chosen = following.gather(2, made.unsqueeze(2)).squeeze(2)  # the best, or one that is as good in bfloat16
    assert bool((following.amax(2) - chosen <= 0.03 * following.std()).all())


def test_the_double_does_not_load_beside_intels_software() -> None:
    """Where habana_frameworks can be imported, `qcore verify --simulate` refuses."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import lane; sys.meta_path.insert(0, lane.Finder())\n"
        "from qcore_gaudi import stand_in\ntry: stand_in.load()\nexcept RuntimeError as fault: print(fault)\n"
        "from qcore.cli.main import main\nsys.argv = ['qcore', 'verify', '--plugin', 'gaudi', '--simulate']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "nothing stands in" in done.stdout, done.stdout + done.stderr
    assert inspect.signature(stand_in.load.__wrapped__).parameters == {}
