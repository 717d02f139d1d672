"""Benchmarks of Outrider: ``outrider bench``."""
