"""Time and memory of each stage for 1, 4 and 16 times as many images, and of `prepare` at extremes.

python -m benchmarks.scale [--plot FILE] [--extremes]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.images import write_images
from benchmarks.run import measured
from stages import run

FACTORS = (1, 4, 16)
NUM_TRAIN, NUM_TEST, SIDE = 64, 32, 256
STAGES = ("prepare", "pretrain", "train", "evaluate", "export", "plot", "report")
EXTREMES = {"20,000 of 64 x 64": (19_998, 2, 64), "200 of 4096 x 4096": (198, 2, 4096)}


def main(*arguments: str) -> None:
    """Measure, print tables and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--plot", type=Path, help="PNG to draw to")
    parser.add_argument("--extremes", action="store_true", help="needs 4 GB of disk")
    options = parser.parse_args(arguments)
    rows = {factor: stages(factor) for factor in FACTORS}
    print_table(rows)
    if options.plot:
        draw(rows, options.plot)
    if options.extremes:
        print("\n| prepare | seconds | images/s | peak memory, MB |\n|---|---|---|---|")
        for name, (num_train, num_test, side) in EXTREMES.items():
            with tempfile.TemporaryDirectory() as folder:
                project(Path(folder), num_train, num_test, side)
                cost = stage(Path(folder), "prepare")
            per_second = (num_train + num_test) / cost["wall"]
            memory = cost["peak_memory"] / 1e6
            print(f"| {name} | {cost['wall']:.1f} | {per_second:.0f} | {memory:.0f} |")


def stages(factor: int) -> dict[str, dict[str, float]]:
    """The cost of each stage for `factor` times the images; training lasts two epochs."""
    with tempfile.TemporaryDirectory() as folder:
        project(Path(folder), factor * NUM_TRAIN, factor * NUM_TEST, SIDE)
        return {name: stage(Path(folder), name) for name in STAGES}


def stage(folder: Path, name: str, category: str = "raw") -> dict[str, float]:
    """Run a stage in its own process."""
    of = () if name in ("fetch", "report") else (category,)
    return measured([sys.executable, "-m", f"stages.{name}", *of], folder)


def copy_project(folder: Path) -> None:
    """Copy what the stages need of this project, and fetch the built-in photographs."""
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if name.startswith(("anomaly_detection/", "stages/", "params.yaml")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, folder / name)
    stage(folder, "fetch")


def project(folder: Path, num_train: int, num_test: int, side: int) -> None:
    """Copy this project, with generated images and small parameters."""
    copy_project(folder)
    yaml = YAML()
    params: dict[str, Any] = yaml.load(folder / "params.yaml")
    params["data"] |= {"root": "parts", "categories": ["raw"]}
    params["training"]["num_epochs"] = 2
    params["evaluation"]["threshold_method"] = "quantile"  # works with any number of images
    yaml.dump(params, folder / "params.yaml")
    write_images(folder / "parts" / "raw", num_train, num_test, side)


def print_table(rows: dict[int, dict[str, dict[str, float]]]) -> None:
    """Print seconds and peak memory by stage, in Markdown."""
    head = " | ".join(f"{factor * (NUM_TRAIN + NUM_TEST)} images" for factor in rows)
    print(f"| stage | {head} |\n|---|{'---|' * len(rows)}")
    for name in STAGES:
        cells = [
            f"{row[name]['wall']:.1f} s, {row[name]['peak_memory'] / 1e6:.0f} MB"
            for row in rows.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def draw(rows: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    """Plot both against the number of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    images = [factor * (NUM_TRAIN + NUM_TEST) for factor in rows]
    for name, marker in zip(STAGES, "ox^vDPs", strict=True):
        costs = [row[name] for row in rows.values()]
        time.plot(images, [cost["wall"] for cost in costs], marker=marker, label=name)
        memory.plot(images, [cost["peak_memory"] / 1e6 for cost in costs], marker=marker)
    time.set(title="Time", xlabel="Images", ylabel="Seconds", ylim=(0, None))
    memory.set(title="Peak memory", xlabel="Images", ylabel="MB", ylim=(0, None))
    for axes in (time, memory):
        axes.grid(alpha=0.25)
        axes.set_xticks(images)
    time.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    run(main)
