"""qcore on AWS Neuron: the plugin `neuron`."""
