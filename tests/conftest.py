"""What all tests share."""

import os

# What is expected here was computed on a CPU. `QCORE_DEVICE=cuda:0 pytest tests/test_goldens.py` asks another device.
os.environ.setdefault("QCORE_DEVICE", "cpu")
