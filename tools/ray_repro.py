"""`dvc repro` on a Ray cluster: each category with stale stages runs on some node.

python -m tools.ray_repro --address auto [--cpus-per-category C] [--gpus-per-category G]
    [--sweep NAME=VALUE,... ...]

It leaves the workspace as a local `dvc repro` would. A category that fails does not keep the others
from running. With --sweep, each combination becomes an experiment instead, as with `dvc exp run`.
"""

import argparse
import sys
from pathlib import Path

from anomaly_detection.cli.arguments import positive
from anomaly_detection.errors import UserError
from stages import run
from tools.cluster.view import Project


def main(*arguments: str) -> None:
    """Run what is stale; exits with 1, and says which, if categories have failed."""
    options = parsed(arguments)
    try:
        from tools.cluster import driver, runs, sweep
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} must be installed: pip install -e '.[ray]'.") from None
    project = Project(Path.cwd())
    with project.exclusively():
        resources = driver.Resources(
            options.cpus_per_category,
            options.gpus_per_category,
            options.retries,
            options.save_every,
        )
        cluster = driver.Cluster(options.address, resources, runs.archive(project.root))
        print(driver.nodes_table(cluster.nodes), flush=True)
        if options.sweep:
            complete = sweep.experiments(project, options.sweep, cluster)
        else:
            complete = bool(driver.reproduce({"": project}, cluster))
    sys.exit(not complete)


def gpus(text: str) -> float:
    """A share of a GPU, or a number of them."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not (0.01 <= value <= 1 or value in range(1, 1000) or value == 0):
        raise argparse.ArgumentTypeError(f"must be from 0.01 to 1 or a whole number, got {text!r}")
    return value


def parsed(arguments: tuple[str, ...]) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.ray_repro",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--address",
        default="auto",
        help="of the cluster: auto, a head on this machine; HOST:PORT; local, no other machine",
    )
    parser.add_argument("--cpus-per-category", type=positive, default=2, metavar="C")
    parser.add_argument("--gpus-per-category", type=gpus, default=0, metavar="G")
    parser.add_argument(
        "--retries",
        type=positive,
        default=10,
        help="of a category that loses its node",
    )
    parser.add_argument(
        "--save-every",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="between saves of finished stages and of a training's state in the DVC remote",
    )
    parser.add_argument("--sweep", nargs="+", metavar="NAME=VALUE,...")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(main)
