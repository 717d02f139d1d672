"""Planted checkpoints and the sizes of known models."""
