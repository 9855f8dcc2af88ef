"""Tools beside the pipeline: `python -m tools.NAME` from the project's root."""
