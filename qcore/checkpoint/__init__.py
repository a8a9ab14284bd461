"""Checkpoints on disk: bounded readers, and open_checkpoint, which finds out what a path holds."""
