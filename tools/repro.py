"""`dvc repro` for any number of categories: one after the other, each with a dvc.lock of its own.

python -m tools.repro

It leaves what `dvc repro` would leave. A category that fails does not keep the others from running.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stages import run
from tools.cluster.view import Project, View

FEW = 4  # categories up to which DVC's own way takes no longer


def main(*arguments: str) -> None:
    """Run what is stale; exits with 1, and says which, if categories have failed."""
    argparse.ArgumentParser(
        prog="python -m tools.repro",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    project = Project(Path.cwd())
    with project.exclusively():
        if len(project.categories) <= FEW:
            sys.exit(project.dvc("repro").returncode)
        view = View(project)
        if not reproduce(view, None, project.first):
            sys.exit(1)
        failed = [
            category
            for category in project.categories
            if not reproduce(view, category, project.stages_of(category))
        ]
        if failed:
            sys.exit(f"{len(failed)} of {len(project.categories)} failed: {', '.join(failed)}.")
        if not reproduce(view, None, project.last):
            sys.exit(1)


def reproduce(view: View, category: str | None, stages: Sequence[str]) -> bool:
    """Run those stages of a category, or of all, that are stale; returns whether all succeeded."""
    view.open(category)
    try:
        return view.dvc("repro", "--single-item", *stages).returncode == 0
    finally:
        view.close()


if __name__ == "__main__":
    run(main)
