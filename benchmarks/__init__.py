"""Benchmarks of whole tasks, as ratios within one run."""
