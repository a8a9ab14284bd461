"""Every refusal code can be reached, and is documented."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qcore
from hostile import cases
from makers import dense_llama, gptq_tensors, write
from qcore.cli import evaluate, options
from qcore.convert import convert, writer_of
from qcore.integrations import ray
from qcore.integrations.lm_eval import _loaded
from qcore.method import Method
from qcore.model.devices import find_device
from qcore.model.probe import failed, wrong_answer
from qcore.platform import Device, known_platform
from qcore.refusal import CODES, Refusal, Refused
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.support.matrix import matrix
from qcore.support.rows import known_row
from qcore.testing.layers import random_layer
from sim import Sim, columns_of, kernel, sim_registry
from test_matrix import record

REQUEST = LayerRequest("linear", Scheme.parse("W4A16-g32-sym"), (64, 64), "bfloat16")
HOST = Device("sim:0", "hopper", "simulated", "cpu")
SMALL = replace(kernel("small", "hopper").accepts, elements=("int8",), inputs=("none",))


def chosen(request: LayerRequest = REQUEST, **facts: object) -> Refusal | None:
    """What selection says of one kernel with these facts."""
    row = kernel("k", *facts.pop("platforms", ("hopper",)), **facts)  # type: ignore[misc, arg-type]
    return select(request, "hopper", [(row, "sim")], HOST).candidates[0].refusal


def checkpoint(folder: Path, *, drop: str = "", extra: str = "", **config: object) -> Path:
    tensors = {name: tensor for name, tensor in dense_llama().items() if name != drop}
    if extra:
        tensors[extra] = torch.zeros(4, 4)
    return write(folder, tensors, **config)  # type: ignore[arg-type]


def gptq(folder: Path, **changes: object) -> Path:
    tensors, module = dense_llama(), "model.layers.0.mlp.up_proj"
    del tensors[f"{module}.weight"]
    codes, zeros = torch.zeros(96, 64, dtype=torch.int64), torch.full((96, 2), 8)
    scales = torch.full((96, 2), float("nan"), dtype=torch.float16)
    tensors |= {f"{module}.{n}": t for n, t in gptq_tensors(codes, zeros, scales, 4, None, v1=True).items()}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, **changes}
    return write(folder, tensors, settings)


def plugin(sim: Sim) -> Refusal | None:
    found = sim_registry(sim)
    found.devices()
    return next(p for p in found.plugins if p.name == sim.name).refusal


def disabled(folder: Path) -> Refusal | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCORE_DISABLE", "sim")
        return plugin(Sim("sim"))


def other_api(folder: Path) -> Refusal | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sim.API_VERSION", (0, 1))
        return plugin(Sim("sim"))


def no_memory(folder: Path) -> None:
    qcore.load_model(checkpoint(folder), device=Device("cpu", "x86_cpu", "a small one", "cpu", memory=1000))


def lie(folder: Path) -> Refusal | None:
    layer = random_layer(REQUEST.scheme, 64, 64)
    return wrong_answer(kernel("k", "hopper"), torch.nn.Linear(64, 64, bias=False), layer, torch.float32, "cpu")


def no_matplotlib(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "matplotlib", None)
        evaluate.evaluate_command(str(checkpoint(folder)), text=folder / "t.txt", plot=folder / "p.png")


def other_machine() -> object:
    return ray._task((iter, None), (), {**ray._facts(), "torch": "0.1"})


def offline() -> None:
    def load(names: list[str]) -> None:
        raise ConnectionError("the hub cannot be reached")

    _loaded(SimpleNamespace(load=load), ["hellaswag"])


def cell(folder: Path, *records: object) -> Refusal | None:
    sim = Sim("cuda", columns_of("cuda"), [kernel("fast", "hopper")], records=records, evidence=folder / "e.json")  # type: ignore[arg-type]
    return matrix(sim_registry(sim)).cell("gptq", "hopper").refusal


def no_number() -> object:
    """A weight with a NaN, on a kernel that reads every code as a number; it is refused before the library is asked for."""
    from qcore_cpu.packed_elements import element_parts

    layer = random_layer(Scheme.parse("W8A16-fp8-channel"), 16, 32)
    layer.weight.codes.view(torch.uint8)[0, 0] = 0x7F
    return element_parts(layer.weight)


def slower() -> Refusal:
    """Of the one kernel that has to be the quicker."""
    from qcore_cuda.kernels.bitblas import slower
    from qcore_cuda.race import Lap

    return slower(kernel("k", "ampere"), "64 x 64", [Lap(1, 2e-5, 1e-5, 0.0)])


STALE = "sha256:" + "0" * 64
TRIGGERS: dict[str, Callable[[Path], object]] = {
    "remote-code": lambda folder: qcore.load_model(
        checkpoint(folder, model_type="own", auto_map={"AutoConfig": "a.B"})
    ),
    "unknown-architecture": lambda folder: qcore.load_model(checkpoint(folder, model_type="own")),
    "not-enough-memory": no_memory,
    "missing-tensor": lambda folder: qcore.load_model(checkpoint(folder, drop="model.norm.weight")),
    "unexpected-tensor": lambda folder: qcore.load_model(checkpoint(folder, extra="model.layers.0.mystery.weight")),
    "unknown-variant": lambda folder: qcore.open_checkpoint(gptq(folder, checkpoint_format="gptq_x")).plan,
    "bad-scheme": lambda folder: Scheme.parse("W4A17-what"),
    "scheme-unsupported": lambda folder: chosen(accepts=SMALL),
    "shape-unsupported": lambda folder: chosen(multiples=(7, 7)),
    "contents-unsupported": lambda folder: no_number(),
    "dtype-unsupported": lambda folder: chosen(dtypes=("float16",)),
    "wrong-platform": lambda folder: chosen(platforms=("tpu",)),
    "wrong-device": lambda folder: chosen(features=(frozenset({"wgmma"}),)),
    "inexact": lambda folder: chosen(quantizes_input=True),
    "not-chosen": lambda folder: chosen(replace(REQUEST, kernel="other")),
    "not-quicker": lambda folder: slower(),
    "missing-requirement": lambda folder: chosen(requires=(("no-such-distribution", "1"),)),
    "no-kernel": lambda folder: select(REQUEST, "hopper", [], HOST).refusal,
    "no-device": lambda folder: find_device("abacus:0"),
    "kernel-wrong": lie,
    "kernel-failed": lambda folder: failed(kernel("k", "hopper"), KeyError("scales")),
    "unproved": lambda folder: cell(folder),
    "stale-evidence": lambda folder: cell(folder, record("gptq", "hopper", "fast", source=STALE)),
    "unknown-row": lambda folder: known_row("abacus"),
    "unknown-platform": lambda folder: known_platform("abacus"),
    "unknown-kernel": lambda folder: qcore.load_model(checkpoint(folder), kernel="abacus"),
    "unknown-format": lambda folder: writer_of("abacus"),
    "format-not-written": lambda folder: Method.encode_config(writer_of("dense")[0], {}),
    "not-representable": lambda folder: convert(checkpoint(folder), "gptq", folder / "out"),
    "output-exists": lambda folder: convert(checkpoint(folder), "dense", folder),
    "cannot-write": lambda folder: convert(checkpoint(folder), "dense", folder / "no" / "where"),
    "plugin-missing": lambda folder: matrix(sim_registry()).cell("gptq", "hopper").refusal,
    "plugin-broken": lambda folder: plugin(Sim("sim", devices=lambda: 1 / 0)),
    "plugin-api": other_api,
    "plugin-disabled": disabled,
    "bad-argument": lambda folder: options.checked_dtype("float7"),
    "task-unavailable": lambda folder: offline(),
    "engine-failed": lambda folder: other_machine(),
    "missing-package": no_matplotlib,
}
CORPUS = {case.code: case for case in reversed(cases())}


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_reached(code: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("words")
    try:
        if code in CORPUS:
            assert code not in TRIGGERS
            qcore.open_checkpoint(CORPUS[code].write(tmp_path))
            refusal = None
        else:
            refusal = TRIGGERS[code](tmp_path)
            assert refusal is None or isinstance(refusal, Refusal)
    except Refused as error:
        refusal = error.refusal
    assert refusal is not None and refusal.code == code
    assert refusal.subject and refusal.reason and refusal.fix, refusal
    assert json.loads(json.dumps(refusal.to_dict()))["code"] == code


def test_no_trigger_is_for_a_code_that_is_gone() -> None:
    assert TRIGGERS.keys() | CORPUS.keys() == CODES.keys()


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_documented(code: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "refusals.md").read_text()
    assert f"| `{code}` | {CODES[code]} |" in page
