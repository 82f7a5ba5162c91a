"""Checkpoints: written, read, resharded, and weights to start from."""
