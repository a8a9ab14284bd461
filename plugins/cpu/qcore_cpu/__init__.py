"""qcore on CPUs: the plugin `cpu`."""
