"""Errors, seeds, signals, progress, devices and checkpoints: the edge of a run."""
