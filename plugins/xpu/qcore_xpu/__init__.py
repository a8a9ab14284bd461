"""qcore on Intel GPUs: the plugin `xpu`."""
