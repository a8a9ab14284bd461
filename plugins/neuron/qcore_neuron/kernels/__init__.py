"""Kernels for AWS Neuron, in torch's own operators: those that torch-xla lowers to HLO, and of them those that qcore_neuron/operators.py lists."""
