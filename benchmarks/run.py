"""Time the library against a lower bound and against a peer.

    python -m benchmarks.run [--peer anomalib] [--json FILE] [--repeats N] [--only NAME ...]

Each comparison runs the two sides in turn, each time in a new process, and gives the median and
spread of the pairwise ratios: single times mean little on a machine that does other work too. The
comparison with an empty pipeline needs the results of `dvc repro` in this folder.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_detection.errors import UserError
from benchmarks.images import write_images
from stages import run

SETTINGS = {
    "backbone": "resnet18",
    "weights": "random",
    "image_size": 256,
    "batch_size": 32,
    "evaluation_precision": "float32",
}
NUM_TRAIN, SIDE = 128, 512  # and three quarters as many test images
PEER_PYTHON = Path(".venv-anomalib/bin/python")
PEER_PACKAGES = (
    "anomalib[openvino]==2.7.0",
    *(f"{x}=={version(x)}" for x in ("torch", "torchvision")),
)

LIBRARY = "import anomaly_detection.evaluator, anomaly_detection.models.stfpm.spec"
ANOMALIB = "from anomalib.engine import Engine; from anomalib.models import Stfpm"
TORCH = "import torch"

Command = list[str]


def main(*arguments: str) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--peer", choices=["anomalib"], help="installed into .venv-anomalib")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=NUM_TRAIN, help="to train on; more on a GPU")
    for name in ("backbone", "weights", "evaluation_precision"):
        parser.add_argument(f"--{name.replace('_', '-')}", default=SETTINGS[name])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    options = parser.parse_args(arguments)
    settings = {name: getattr(options, name, value) for name, value in SETTINGS.items()}
    settings |= {"images": options.images, "epochs": 1}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("writing images", file=sys.stderr)
        write_images(folder / "raw", options.images, options.images * 3 // 4, SIDE)
        work("prepare_once", folder, settings)
        sides = comparisons(folder, settings)
        if options.peer:
            install_peer()
            layers = work("layers", folder, settings)["layers"]
            sides |= peer_comparisons(folder, settings | {"layers": layers})
        chosen = options.only or list(sides)
        if unknown := set(chosen) - set(sides):
            raise UserError(f"--only must be of {', '.join(sides)}; got {', '.join(unknown)}.")
        results = {name: compare(name, sides[name], options.repeats) for name in chosen}
    # A child's peak memory is at least its parent's, so PyTorch is imported after all children ran.
    report = {"machine": machine(), "settings": settings, "results": results}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_table(report)


Side = Callable[[], dict[str, float]]


class Comparison(NamedTuple):
    """What is measured, and against what."""

    what: str
    ours: Side
    against: str
    other: Side


def ours_of(folder: Path, settings: dict[str, Any], name: str) -> Side:
    """A deferred task of `benchmarks.work`."""
    return lambda: work(name, folder, settings)


def comparisons(folder: Path, settings: dict[str, Any]) -> dict[str, Comparison]:
    """The comparisons with a lower bound, by name."""
    ours = partial(ours_of, folder, settings)

    library, torch = whole([sys.executable, "-c", LIBRARY]), whole([sys.executable, "-c", TORCH])
    script = Path(__file__).with_name("bare_step.py")
    bare_step = [sys.executable, str(script), json.dumps(settings)]
    forward, empty = ours("bare_forward"), empty_pipeline(folder / "empty")
    rows = {
        "training": ("STFPMTrainer.fit", ours("training"), "bare loop", ours("bare_training")),
        "evaluation": ("evaluate, all metrics", ours("evaluation"), "bare forward", forward),
        "prepare": ("prepare", ours("prepare"), "decoding alone", ours("decoding")),
        "one_image": ("bytes to verdict", ours("one_image"), "forward in batches", forward),
        "import": ("import of the library", library, TORCH, torch),
        "first_step": (
            "start to first step",
            ours("first_step"),
            "bare program",
            lambda: measured(bare_step),
        ),
        "no_op": ("dvc repro, nothing changed", no_op, "empty pipeline", empty),
    }
    return {name: Comparison(*row) for name, row in rows.items()}


def peer_comparisons(folder: Path, settings: dict[str, Any]) -> dict[str, Comparison]:
    """The same work by anomalib, in its own environment."""
    ours = partial(ours_of, folder, settings)
    names = {
        "training": "STFPMTrainer.fit",
        "evaluation": "evaluate, all metrics",
        "one_image": "bytes to verdict",
        "exported_image": "file to verdict, exported",
    }

    def theirs(name: str) -> Side:
        script = Path(__file__).with_name("peer_anomalib.py")
        command = [str(PEER_PYTHON), str(script), name, str(folder), json.dumps(settings)]
        return lambda: measured(command)

    rows = {
        f"peer_{name}": Comparison(what, ours(name), "anomalib", theirs(name))
        for name, what in names.items()
    }
    library = whole([sys.executable, "-c", LIBRARY])
    peer = whole([str(PEER_PYTHON), "-c", ANOMALIB])
    return rows | {"peer_import": Comparison("import of the library", library, "anomalib", peer)}


def compare(name: str, comparison: Comparison, repeats: int) -> dict[str, Any]:
    """Run both sides in turn, `repeats` times."""
    rows = []
    for i in range(repeats):
        print(f"{name}: {i + 1} of {repeats}", file=sys.stderr)
        rows.append((comparison.ours(), comparison.other()))
    ratios = [per_item(a) / per_item(b) for a, b in rows]
    return {
        "what": comparison.what,
        "against": comparison.against,
        "ratio": statistics.median(ratios),
        "ratio_from": min(ratios),
        "ratio_to": max(ratios),
        **{
            f"{side}_{key}": statistics.median(value(row[i]) for row in rows)
            for i, side in enumerate(("ours", "other"))
            for key, value in (("seconds", per_item), ("peak_memory", lambda x: x["peak_memory"]))
        },
    }


def per_item(result: dict[str, float]) -> float:
    """Seconds per image, or in total if there are no images."""
    return result["seconds"] / result.get("items", 1)


def work(name: str, folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Run a task of `benchmarks.work`."""
    command = [sys.executable, "-m", "benchmarks.work", name, str(folder), json.dumps(settings)]
    return measured(command)


def whole(command: Command, at: Path | None = None) -> Side:
    """The time of a whole process."""
    return lambda: {"seconds": (result := measured(command, at))["wall"], **result}


def measured(command: Command, at: Path | None = None) -> dict[str, float]:
    """What a process reports in its last line, plus its peak memory, and its time as `wall`."""
    started, clock = time.time(), time.perf_counter()
    process = subprocess.Popen(command, cwd=at, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - clock
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"failed: {' '.join(command)}")
    lines = output.strip().splitlines()
    result = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if "done" in result:
        result["seconds"] = result["done"] - started
    return {**result, "wall": wall, "peak_memory": usage.ru_maxrss * 1024, "output": output}


def no_op() -> dict[str, float]:
    """Time `dvc repro` when nothing has changed."""
    result = whole(["dvc", "repro"])()
    if "Running stage" in result["output"]:
        return no_op()  # the first run has brought everything up to date
    return result


def empty_pipeline(folder: Path) -> Side:
    """A pipeline of as many stages as ours that copy a word from file to file."""
    listed = subprocess.run(["dvc", "stage", "list", "--name-only"], capture_output=True, text=True)
    count = len(listed.stdout.split())

    def prepared() -> dict[str, float]:
        if not folder.exists():
            folder.mkdir()
            (folder / "0").write_text("word")
            stages = [
                f"  s{i}:\n    cmd: cp {i} {i + 1}\n    deps: ['{i}']\n    outs: ['{i + 1}']\n"
                for i in range(count)
            ]
            (folder / "dvc.yaml").write_text("stages:\n" + "".join(stages))
            for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "repro", "-q"]):
                subprocess.run(command, cwd=folder, check=True)
        return whole(["dvc", "repro"], folder)()

    return prepared


def install_peer() -> None:
    """Install anomalib in its own environment, unless it is there already."""
    if not PEER_PYTHON.exists():
        environment = PEER_PYTHON.parent.parent
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(PEER_PYTHON), "-m", "pip", "install", "-q", *PEER_PACKAGES], check=True)


def machine() -> dict[str, Any]:
    """The machine that was measured."""
    import torch

    from anomaly_detection.trainer import choose_device, choose_dtype, dtype_name

    device = choose_device()
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []:
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "precision": dtype_name(choose_dtype("auto", device)),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def print_table(report: dict[str, Any]) -> None:
    """Print Markdown for docs/performance.md."""
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(", ".join(f"{key} {value}" for key, value in report["settings"].items()), end="\n\n")
    print("| what | against | ratio | from, to | ours, ms | other, ms | ours, MB | other, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in report["results"].values():
        print(
            f"| {row['what']} | {row['against']} | {row['ratio']:.2f} | "
            f"{row['ratio_from']:.2f}, {row['ratio_to']:.2f} | "
            f"{1000 * row['ours_seconds']:.1f} | {1000 * row['other_seconds']:.1f} | "
            f"{row['ours_peak_memory'] / 1e6:.0f} | {row['other_peak_memory'] / 1e6:.0f} |"
        )


if __name__ == "__main__":
    run(main)
