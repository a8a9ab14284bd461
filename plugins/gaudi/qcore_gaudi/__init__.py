"""qcore on Intel Gaudi: the plugin `gaudi`."""
