"""Measurements of whole pieces of work, as ratios within one run."""
