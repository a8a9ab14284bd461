"""Tests that need torch-xla with the jax that it takes, and libtpu: `make test-tpu-xla`. No TPU is needed, and none is used."""

import os

from qcore_tpu import lazy
from qcore_tpu.ahead import prepare

prepare()
os.environ["PJRT_DEVICE"] = "CPU"
lazy.start()
