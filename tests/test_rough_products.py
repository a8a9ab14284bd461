"""Products in bfloat16 while blocks are looked at: how near they are, what stays float32, and that layers are as before behind them."""

import pytest
import torch

from qcore.calibration import precision
from qcore.calibration.precision import Roughly


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("able", [False, True])
def test_products(bias: bool, able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processors that multiply bfloat16, and of others, which keep float32's."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: able)
    torch.manual_seed(0)
    layer, other, x = torch.nn.Linear(256, 64, bias=bias), torch.nn.Linear(256, 64), torch.randn(1, 128, 256)
    inputs: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    exact, beside = layer(x), other(x)
    with Roughly([layer]):
        rough = layer(x)
        assert torch.equal(other(x), beside)
    assert rough.dtype == torch.float32 and inputs[-1] is x  # what is looked at is not rounded
    apart = float((rough - exact).norm() / exact.norm())
    assert (1e-4 < apart < 4e-3) if able else apart == 0
    assert torch.equal(layer(x), exact)
    with pytest.raises(ValueError, match="ends"), Roughly([layer]):
        raise ValueError("ends")
    assert torch.equal(layer(x), exact)
