"""What our models and a peer's detect on the built-in images, and what they cost.

    python -m benchmarks.detection [--categories NAME ...] [--models NAME ...] [--peers NAME ...]
                                   [--peer-python PATH] [--json FILE]

Ours run as in the pipeline, by its stages, in a copy of the project: params.yaml as it is, but for
the model's name and the category. The peer is anomalib; its models get the same teacher and arrays.
Our evaluation judges their scores too, with a threshold by our rule: anomalib's own needs defects.
They have no use for validation images, so these are fitted as well.

Prints Markdown for README.md, with the costs on the first category. A fit is a whole process with
its imports, timed once: where other work runs too, CPU time says more than wall time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from anomaly_detection import models
from anomaly_detection.config import load_config
from anomaly_detection.data import elpv
from benchmarks.run import PEER_PYTHON, Command, install_peer, measured
from stages import run

PEERS = {"padim": "PaDiM, anomalib", "patchcore": "PatchCore, anomalib"}
BATCH_SIZE = 32
NUM_IMAGES, ROUNDS = 30, 3  # to time one image
DETECTION = ("image AUROC", "misses", "false rejects", "90 % of synthetic defects from")
COSTS = ("fit", "its CPU time", "its peak memory", "one image", "detector")
NOTE = """\
Intervals are at 95 %. Synthetic defects: the share of the image's side from which on 90 % are
detected. Fit: a process with its imports. One image: from memory to its score. Costs are those of
{category}. anomalib's models have the same teacher and arrays, and are fitted to the validation
images too, for which they have no other use. Their verdicts are by our threshold rule: anomalib's
own needs defects. Their scores are used as they are, before anomalib scales and clamps them."""

Result = dict[str, Any]
Results = dict[str, dict[str, Result]]  # by category, then by name in the table


def main(*arguments: str) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    choices = {"categories": elpv.CATEGORIES, "models": models.names(), "peers": list(PEERS)}
    for name, all_of in choices.items():
        number = "*" if name == "peers" else "+"
        parser.add_argument(f"--{name}", nargs=number, default=all_of, choices=all_of)
    parser.add_argument("--peer-python", type=Path, help="default: in .venv-anomalib")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args(arguments)
    os.environ["TQDM_DISABLE"] = "1"  # anomalib's progress bars, thousands of lines in a log
    if options.peers and not options.peer_python:
        install_peer()
    results: Results = {}
    report = {"image_size": load_config().data.image_size, "results": results}
    with tempfile.TemporaryDirectory() as name:
        project = Project(Path(name), options.peer_python or PEER_PYTHON)
        for category in options.categories:
            results[category] = project.results(category, options.models, options.peers)
            if options.json:  # hours of work, so as soon as there is something
                options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    note = NOTE.format(category=options.categories[0])
    print(conditions(report), table(results), note, sep="\n\n")


class Project:
    """A copy of this project.

    Args:
        folder: Where to write it.
        peer_python: The Python of an environment with anomalib.
    """

    def __init__(self, folder: Path, peer_python: Path) -> None:
        self.folder = folder
        self.peer_python = str(peer_python.absolute())  # not resolved: a link outside
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
        for name in filter(os.path.isfile, names.splitlines()):
            if name.startswith(("anomaly_detection/", "benchmarks/", "stages/", "params.yaml")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(name, folder / name)

    def results(self, category: str, names: list[str], peers: list[str]) -> dict[str, Result]:
        """The result of each of our models and of the peer's, by its name in the table."""
        folder = self.folder / "judged" / category  # detectors, the peer's input and its scores
        folder.mkdir(parents=True)
        self._choose(category, models.names()[0])  # any: only the category matters yet
        self._module("stages.fetch")
        self._module("stages.prepare", category)
        self._module("benchmarks.detection_work", "collect", category, str(folder))
        results = {f"`{name}`": self._ours(name, category, folder) for name in names}
        results |= {PEERS[name]: self._theirs(name, category, folder) for name in peers}
        for name, seconds in self._seconds_per_image(names, peers, folder).items():
            results[name]["seconds_per_image"] = seconds
        return results

    def _ours(self, name: str, category: str, folder: Path) -> Result:
        """Fit and evaluate a model of ours, and move its detector to `folder`."""
        self._choose(category, name)
        fit = self._module("stages.train", category)
        self._module("stages.evaluate", category)
        metrics = self.folder / "metrics" / category
        facts = json.loads((metrics / "train.json").read_text())
        detector = folder / f"{name}.detector"
        shutil.move(self.folder / "detectors" / f"{category}.pt", detector)
        return {
            "metrics": json.loads((metrics / "evaluate.json").read_text()),
            "fit": fit,
            "detector_bytes": detector.stat().st_size,
            **{key: facts[key] for key in ("versions", "hardware", "precision")},
        }

    def _theirs(self, name: str, category: str, folder: Path) -> Result:
        """Fit a model of the peer and judge its scores."""
        prepared = self.folder / "data" / "prepared" / category
        shared = {"name": name, "batch_size": BATCH_SIZE}
        fit = self._peer("fit", folder, prepared=str(prepared), **shared)
        versions = fit.pop("versions")
        self._peer("score", folder, **shared)
        scores = folder / f"{name}.npy"
        judged = self._module("benchmarks.detection_work", "measure", category, str(scores))
        return {
            "metrics": judged["metrics"],
            "fit": fit,
            "detector_bytes": (folder / f"{name}.pt").stat().st_size,
            "versions": versions,
        }

    def _seconds_per_image(
        self, names: list[str], peers: list[str], folder: Path
    ) -> dict[str, float]:
        """Median seconds from an image in memory to its score, by name in the table.

        Ours and the peer's take turns, and so do the models of each.
        """
        files = [str(folder / f"{name}.detector") for name in names]
        task = ["benchmarks.detection_work", "time_images", str(folder), str(NUM_IMAGES), *files]
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(ROUNDS):
            for name, values in self._module(*task)["seconds"].items():
                times[f"`{name}`"] += values
            if peers:
                theirs = self._peer("time_images", folder, names=peers, num_images=NUM_IMAGES)
                for name, values in theirs["seconds"].items():
                    times[PEERS[name]] += values
        return {name: statistics.median(values) for name, values in times.items()}

    def _choose(self, category: str, model: str) -> None:
        """Write model and category to params.yaml."""
        yaml, path = YAML(), self.folder / "params.yaml"
        params: dict[str, Any] = yaml.load(path)
        params["data"] |= {"root": elpv.ROOT, "categories": [category]}
        params["model"]["name"] = model
        params["overrides"] = {}
        yaml.dump(params, path)

    def _module(self, *arguments: str) -> Result:
        """Run a module of ours in this folder."""
        return self._run([sys.executable, "-m", *arguments])

    def _peer(self, task: str, folder: Path, **settings: Any) -> Result:
        """Run a task of `benchmarks.peer_anomalib`."""
        script = self.folder / "benchmarks" / "peer_anomalib.py"
        return self._run([self.peer_python, str(script), task, str(folder), json.dumps(settings)])

    def _run(self, command: Command) -> Result:
        """As `measured`, with the CPU time in seconds as `cpu`, and without the output."""
        print(*command[1:4], file=sys.stderr)
        before = os.times()
        result = measured(command, self.folder)
        after = os.times()
        del result["output"]
        spent = (after.children_user, after.children_system)
        return result | {"cpu": sum(spent) - before.children_user - before.children_system}


def conditions(report: dict[str, Any]) -> str:
    """What the results hold for."""
    first = next(iter(report["results"].values()))
    ours = next(row for row in first.values() if "hardware" in row)
    versions = {", ".join(map(" ".join, row["versions"].items())) for row in first.values()}
    side = report["image_size"]
    return "; ".join(
        [
            f"{os.cpu_count()} cores of {', '.join(ours['hardware'].values())}",
            f"{side} x {side} pixels",
            *sorted(versions, key=len),
        ]
    )


def table(results: Results) -> str:
    """The results in Markdown, a row for each model; its costs are those of the first category."""
    first = next(iter(results.values()))
    heads = ["", *(f"{category}: {head}" for category in results for head in DETECTION), *COSTS]
    lines = [heads, ["---"] * len(heads)]
    for name, row in first.items():
        detected = [cell for rows in results.values() for cell in detection(rows[name]["metrics"])]
        lines.append([name, *detected, *costs(row)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def detection(metrics: dict[str, Any]) -> list[str]:
    """The cells of a category."""
    low, high = metrics["intervals"]["image_auroc"]
    size = metrics["synthetic"]["size_detected_in_90_percent"]
    return [
        f"{metrics['image_auroc']:.3f} ({low:.3f} to {high:.3f})",
        f"{metrics['num_misses']} of {metrics['num_anomalous']}",
        f"{metrics['num_false_rejects']} of {metrics['num_normal']}",
        "none" if size is None else f"{size:.1%}".replace("%", " %"),
    ]


def costs(row: Result) -> list[str]:
    """The cells of what a model costs."""
    fit = row["fit"]
    return [
        f"{fit['wall']:.0f} s",
        f"{fit['cpu']:.0f} s",
        f"{fit['peak_memory'] / 1e9:.1f} GB",
        f"{1000 * row['seconds_per_image']:.0f} ms",
        f"{row['detector_bytes'] / 1e6:.1f} MB",
    ]


if __name__ == "__main__":
    run(main)
