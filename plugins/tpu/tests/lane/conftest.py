"""Tests that need jax, libtpu and torchax: `make test-tpu`. No TPU is needed, and none is used."""

from qcore_tpu.ahead import prepare

prepare()
