"""INC's scales that are searched, and those of run time."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import dense_llama, write
from qcore.kernels.activations import quantize_input
from qcore.scheme import Scheme
from test_inc import QUERY, UP, measured, saved


def errors(weight: torch.Tensor, scales: list[torch.Tensor], top: float) -> torch.Tensor:
    """float32 [candidates, N]: what each candidate leaves of each row."""
    wide = weight.float()
    left = [wide - (wide / s).clamp(-top, top).to(torch.float8_e4m3fn).float() * s for s in scales]
    return torch.stack([part.square().sum(1) for part in left])


@pytest.mark.parametrize(
    ("method", "device", "powers"),
    [
        ("MAXABS_HW_OPT_WEIGHT", None, range(-55, 8)),
        ("MAXABS_HW_OPT_WEIGHT", "GAUDI2", (-8, -4, 0, 4)),
        ("MAXABS_POW2_OPT_WEIGHT", "GAUDI2", range(-10, 10)),
    ],
)
def test_the_scale_that_leaves_the_least_error_is_searched(
    tmp_path: Path, method: str, device: str | None, powers: Any
) -> None:
    config = {"device_for_scales": device} if device else {}
    layer = qcore.open_checkpoint(measured(tmp_path, scale_method=method, **config)).layer(UP)
    weight = dense_llama()[f"{UP}.weight"].to(torch.bfloat16)
    left = errors(weight, [torch.tensor(2.0**p) for p in powers], 240.0 if device else 448.0).sum(1)
    found = list(powers).index(round(math.log2(float(layer.weight.scales[0]))))
    assert left[found] <= 1.02 * left.min()  # INC compares them in bfloat16
    assert float((layer.weight.dequantize() - weight.float()).square().sum()) == pytest.approx(
        float(left[found]), rel=1e-4
    )
    assert float(layer.input_scale) == (2.0**-4 if device else 2.0**-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", ["HW", "POW2"])
def test_scales_of_rows_are_searched_from_that_of_the_largest_magnitude(tmp_path: Path, inputs: str) -> None:
    plain = dense_llama()
    plain[f"{UP}.weight"][3, 5] = 40.0  # far from all others of its row, which a smaller scale serves better
    opened = qcore.open_checkpoint(measured(tmp_path, plain, scale_method=f"ACT_MAXABS_{inputs}_WEIGHTS_PCS_OPT_POW2"))
    weight, scales = plain[f"{UP}.weight"].to(torch.bfloat16), opened.weight(UP).scales[0]
    first = (weight.float().abs().amax(1, keepdim=True) / 224).log2().ceil().exp2()
    left = errors(weight, [first * 2.0**p for p in range(-3, 5)], 448.0)
    found = ((scales / first).log2() + 3).round().long().T
    assert bool((left.gather(0, found) <= 1.05 * left.amin(0)).all()) and not torch.equal(scales, first)


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw", "W8A8-fp8-tensor/fp8-g64:e8m0ceil-dyn"),
        ("MAXABS_PCS_POW2", "W8A8-fp8-channel/fp8-g64:e8m0ceil-dyn"),
        ("MAXABS_POW2", "W8A8-fp8-tensor/fp8-tensor:e8m0ceil-dyn"),
        ("MAXABS_ARBITRARY", "W8A8-fp8-tensor/fp8-tensor-dyn"),
        ("ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2", "W8A8-fp8-channel/fp8-tensor:e8m0ceil-dyn"),
    ],
)
@pytest.mark.parametrize("device", ["GAUDI2", "GAUDI3"])
def test_scales_of_run_time_need_no_measurements(tmp_path: Path, method: str, scheme: str, device: str) -> None:
    config = {"scale_method": method, "device_for_scales": device, "dynamic_quantization": "true"}
    opened = qcore.open_checkpoint(measured(tmp_path, name="", dump_stats_path="", **config))
    assert opened.plan[UP] == Scheme.parse(scheme) == opened.weight(UP).scheme and opened.plan["lm_head"] is None
    assert opened.layer(UP).input_scale is None and opened.kv_cache is None
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [9], [0.01], [0.5], [3]])
    given = opened.plan[UP].input
    assert given is not None
    got = quantize_input(x, given)
    # INC's own: half of the range is used, of rows or of all, and scales are powers of two or not.
    largest = (
        x.abs().amax(1, keepdim=True) if "PCS_POW2" in method.upper().replace("WEIGHTS_PCS", "") else x.abs().amax()
    )
    scale = largest / (0.5 * (240 if device == "GAUDI2" else 448))
    scale = scale if method == "MAXABS_ARBITRARY" else scale.log2().ceil().exp2()
    own = (x / scale).to(torch.float8_e4m3fn).float() * scale
    normal = (x / scale).abs() >= 2.0**-5
    if method != "MAXABS_ARBITRARY" or device == "GAUDI3":  # of 240 and 448 the grids differ
        assert torch.equal(got[normal], own[normal])
    assert bool(
        ((got - own).abs() <= scale * (2.0**-4 if method == "MAXABS_ARBITRARY" else 2.0**-9) + x.abs() / 8).all()
    )
    logits = qcore.load_model(opened, dtype="float32")(torch.tensor([[1, 5, 9]])).logits
    whole = qcore.load_model(write(tmp_path / "plain", dense_llama()), dtype="float32")(
        torch.tensor([[1, 5, 9]])
    ).logits
    assert 0 < float((logits - whole).norm() / whole.norm()) < 0.09


def test_a_saved_model_with_scales_of_run_time_has_none_of_inputs(tmp_path: Path) -> None:
    change = {f"{module}.{part}": None for module in (UP, QUERY) for part in ("scale_input", "quant_input.scale_inv")}
    config = {"dynamic_quantization": True, "scale_method": "MAXABS_PCS_POW2"}
    opened = qcore.open_checkpoint(saved(tmp_path, change, channels=True, **config))
    assert str(opened.plan[UP]) == "W8A8-fp8-channel/fp8-g64:e8m0ceil-dyn" and opened.layer(UP).input_scale is None
