"""Experts that a kernel holds as one, on Triton's interpreter, against the same experts one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
import qcore.testing.interpreter
from mixtures import EXPERTS, HIDDEN, TOKENS, Mixture, logits
from qcore.discovery import registry
from qcore.kernels.triton.integers import IntegerLinear
from qcore.kernels.triton.routing import blocks_of, routed_tiling, routed_tilings
from qcore.kernels.triton.tilings import tilings_on
from qcore.method import is_expert
from qcore.model.experts import QuantizedExperts
from qcore.model.linear import QuantizedLinear, StackedLinear
from qcore.model.load import kernel_counts
from qcore.platform import Device
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from test_experts import FORMATS, GPTQ, quantized
from test_mxfp4 import CONFIG as MXFP4
from test_mxfp4 import quantized as mxfp4_experts

GOLDEN = Path(__file__).with_name("golden")
GPU = Device("gpu", "amd", "Triton's interpreter", "cpu", "gfx942", simulated=True)


def written(folder: Path, kind: str, form: str) -> Path:
    if kind == "golden":
        return GOLDEN / form
    mixture = Mixture(kind)
    if form == "mxfp4":
        return mixture.write(folder, mxfp4_experts(mixture), MXFP4)
    make, config = FORMATS[form]
    return mixture.write(folder, quantized(mixture, make), config)


def experts_of(model: Any) -> list[QuantizedExperts]:
    return [module for module in model.modules() if isinstance(module, QuantizedExperts)]


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("golden", "transformers-mxfp4"),
        ("mixtral", "gptq"),
        ("phimoe", "compressed-tensors"),
        ("mixtral", "fp8"),
        ("qwen3_moe", "fp8-block"),
        ("deepseek_v3", "gptq"),
        ("gpt_oss", "mxfp4"),
    ],
)
def test_models_compute_what_experts_one_by_one_do(
    tmp_path: Path, kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, kind, form)
    together = qcore.load_model(path, GPU, torch.float16)
    monkeypatch.setattr(StackedLinear, "stackable", lambda layers: False)
    one_by_one = qcore.load_model(path, GPU, torch.float16)
    parts = [part for experts in experts_of(together) for part in experts.parts.values()]
    assert parts and all(isinstance(part, StackedLinear) for part in parts)
    assert not any(isinstance(module, StackedLinear) for module in one_by_one.modules())
    assert kernel_counts(together) == kernel_counts(one_by_one)
    tokens = TOKENS % one_by_one.config.vocab_size
    with torch.inference_mode():
        found, expected = (model(tokens).logits.float() for model in (together, one_by_one))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.std()))
    held = [
        sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) for model in (together, one_by_one)
    ]
    assert held[0] == held[1], "the experts' weights are held once"


def test_a_stack_that_is_wrong_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = IntegerLinear.forward

    def wrong(self: IntegerLinear, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        return right(self, x, experts if experts is None else torch.zeros_like(experts))

    monkeypatch.setattr(IntegerLinear, "forward", wrong)
    mixture = Mixture("mixtral")
    path = mixture.write(tmp_path, quantized(mixture, FORMATS["gptq"][0]), GPTQ)
    model = qcore.load_model(path, GPU, torch.float16)
    assert not any(experts.stacked for experts in experts_of(model)) and "kernel-wrong" in caplog.text
    expected = mixture.logits()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.05 * float(expected.std()))


def test_a_token_alone_and_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "gpt_oss", "mxfp4")
    together = experts_of(qcore.load_model(path, GPU, torch.float16))[0]
    monkeypatch.setattr(StackedLinear, "stackable", lambda layers: False)
    one_by_one = experts_of(qcore.load_model(path, GPU, torch.float16))[0]
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2)).to(torch.float16)
    chosen, weights = torch.tensor([[3, 1], [0, 3], [3, 0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])
    for tokens in (0, 1, 3):  # nobody chooses the third expert
        given = hidden[:tokens], chosen[:tokens], weights[:tokens]
        torch.testing.assert_close(together(*given), one_by_one(*given), rtol=2e-3, atol=2e-3)
    assert torch.equal(together(hidden, chosen, weights), together(hidden, chosen, weights))


@pytest.mark.parametrize(("kind", "form"), [("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8-block"), ("mixtral", "fp8")])
def test_a_graph_holds_all_of_it(tmp_path: Path, kind: str, form: str) -> None:
    """Nothing asks the device for a number: that would break the graph."""
    experts = experts_of(qcore.load_model(written(tmp_path, kind, form), GPU, torch.float16))[0]
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2)).to(torch.float16)
    chosen, weights = torch.tensor([[0, 3]] * 4 + [[2, 3]]), torch.full((5, 2), 0.5)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(hidden, chosen, weights), experts(hidden, chosen, weights))


def test_experts_of_different_schemes_run_one_by_one(tmp_path: Path) -> None:
    mixture = Mixture("qwen3_moe")
    wide = [module for module in mixture.parts if ".experts.1.up_proj" in module]
    tensors = quantized(mixture, FORMATS["gptq"][0])
    make = FORMATS["gptq"][0]
    for module in wide:
        parts, mixture.parts[module] = make(mixture.parts[module], 8)  # type: ignore[call-arg]
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    config = {**GPTQ, "dynamic": {r"+:.*\.experts\.1\.up_proj": {"bits": 8}}}
    model = qcore.load_model(mixture.write(tmp_path, tensors, config), GPU, torch.float16)
    (experts,) = experts_of(model)
    assert not experts.stacked and all(isinstance(layer, QuantizedLinear) for layer in experts.parts["up"].children())
    expected = mixture.logits()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.05 * float(expected.std()))


def test_kernels_that_hold_one_weight_run_experts_one_by_one(tmp_path: Path) -> None:
    model = qcore.load_model(written(tmp_path, "mixtral", "gptq"), GPU, torch.float16, kernel="reference_linear")
    for experts in experts_of(model):
        assert not experts.stacked and [len(list(part.children())) for part in experts.parts.values()] == [EXPERTS] * 3


def test_experts_run_on_kernels_that_hold_them_as_one() -> None:
    """Before those that cost little less and do not; `explain` says so too, of experts by their names."""
    kernels = [(kernel, plugin) for kernel, plugin in registry().kernels if "xpu" in kernel.platforms]
    request = LayerRequest("linear", Scheme.parse("W4A16-g128-sym"), (64, 256), "bfloat16")
    alone, held = (select(replace(request, expert=expert), "xpu", kernels).kernel for expert in (False, True))
    assert alone is not None and not alone.experts and held is not None and held.experts and held.cost > alone.cost
    names = ["model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.gate_up_proj"]
    others = ["model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.mlp.up_proj"]
    assert all(map(is_expert, names)) and not any(map(is_expert, others))


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("counts", [(1, 0, 0), (5, 0, 17, 4), (0, 0, 40), (1,) * 33])
def test_a_table_has_every_row_once(counts: tuple[int, ...], rows: int) -> None:
    """In blocks of one expert's rows; and behind them, blocks without rows."""
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(torch.int32)
    table = blocks_of(experts, len(counts), rows).tolist()
    filled = [(begin, end, expert) for begin, end, expert in table if begin < end]
    assert [row for begin, end, _ in filled for row in range(begin, end)] == list(range(len(experts)))
    assert all(end - begin <= rows and set(experts[begin:end].tolist()) == {expert} for begin, end, expert in filled)
    assert table[len(filled) :] == [[0, 0, 0]] * (len(table) - len(filled))


def test_tilings_go_by_the_rows_of_an_expert() -> None:
    tilings = routed_tilings(tilings_on(torch.device("cpu")), True)
    assert [tiling.rows for tiling in tilings] == [1, 16, 64]
    found = [routed_tiling(tilings, rows, 8).rows for rows in (1, 4, 5, 128, 129, 5000)]
    assert found == [1, 1, 16, 16, 64, 64]
