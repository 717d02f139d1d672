"""Benchmarks of Outrider."""
