"""From a checkpoint to a transformers model that runs."""
