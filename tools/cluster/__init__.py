"""The pipeline by category: `tools.repro` on one machine, `tools.ray_repro` on a Ray cluster.

DVC parses and rewrites all of dvc.lock for each stage that it runs. Here each category is run with
a dvc.lock and a params.yaml of its own, and dvc.lock is written once, at the end.
"""
