"""qcore on Google TPUs: the plugin `tpu`."""
