"""Real checkpoints on the stand-in for Neuron's chips."""

from __future__ import annotations

from pathlib import Path

import pytest
from neuron_goldens import logits_agree

from golden_checkpoints import goldens
from qcore_neuron.devices import stand_ins


@pytest.mark.parametrize("path", goldens(), ids=lambda path: path.name)
def test_logits_of_real_checkpoints(path: Path) -> None:
    (device,) = stand_ins()
    logits_agree(path, device)
