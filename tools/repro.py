"""`dvc repro` for any number of categories: one after the other, each with a dvc.lock of its own.

python -m tools.repro

It leaves what `dvc repro` would leave. A category that fails does not keep the others from running.
"""

import argparse
import sys
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
        if not view.reproduce(None, project.first):
            sys.exit(1)
        failed = [
            category
            for category in project.categories
            if not view.reproduce(category, project.stages_of(category))
        ]
        if failed:
            sys.exit(f"{len(failed)} of {len(project.categories)} failed: {', '.join(failed)}.")
        if not view.reproduce(None, project.last):
            sys.exit(1)


if __name__ == "__main__":
    run(main)
