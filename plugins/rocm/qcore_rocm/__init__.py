"""qcore on AMD GPUs: the plugin `rocm`."""
