"""Tests that need jax, libtpu and torchax: `make test-tpu`. No TPU is needed, and none is used."""

import os

from qcore_tpu.ahead import prepare

prepare()
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # chips of a CPU
