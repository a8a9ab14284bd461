"""What all tests share."""

import gc
import os

# What is expected here was computed on a CPU. `QCORE_DEVICE=cuda:0 pytest tests/test_goldens.py` asks another device.
os.environ.setdefault("QCORE_DEVICE", "cpu")

# Triton is either an interpreter or a compiler, which is settled when it is first imported; here it is the first.
os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """Nine thousand tests stay until the end: the collector need not look at them again and again."""
    gc.freeze()
