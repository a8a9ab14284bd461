"""qcore on NVIDIA GPUs: the plugin `cuda`."""
