"""The pipeline on a Ray cluster whose nodes are processes on this machine.

python -m benchmarks.cluster efficiency [--categories 32]
python -m benchmarks.cluster kills [--runs 20]
python -m benchmarks.cluster simulate --stages S --job S --driver S --megabytes MB

`efficiency` compares one worker with two, each with one core. `kills` kills a node at a random
moment of each run, and checks that the results are those of a run without Ray, that nothing was
trained twice at once, and that nothing is left running. `simulate` calculates how long a thousand
categories would take on more nodes, and what limits them.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from ruamel.yaml import YAML

from benchmarks.images import write_images
from stages import run
from tools.cluster.dvc import COMMAND, environment
from tools.cluster.runs import tracked_files
from tools.cluster.worker import jobs_folder

RESULTS = ("checkpoints", "detectors", "exports", "metrics", "plots", "predictions")
OURS = ("stages.", "tools.cluster.")
CATEGORIES, DRIVER_THREADS, LINK = 1000, 4, 125  # LINK: megabytes per second, a gigabit
ORPHAN_SECONDS = 60


def main(*arguments: str) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("what", choices=["efficiency", "kills", "simulate"])
    parser.add_argument("--categories", type=int, default=32)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--stages", type=float, help="seconds of a category's stages on a node")
    parser.add_argument("--job", type=float, help="seconds of a job besides its stages")
    parser.add_argument("--driver", type=float, help="seconds of a category in the driver")
    parser.add_argument("--megabytes", type=float, help="that a category brings back")
    options = parser.parse_args(arguments)
    if options.what == "simulate":
        simulate(options.stages, options.job, options.driver, options.megabytes)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "efficiency":
            efficiency(Path(folder), options.categories)
        else:
            kills(Path(folder), options.runs)


def efficiency(folder: Path, categories: int) -> None:
    """Print the time with one worker and with two."""
    seconds = {}
    for workers in (1, 2):
        own = project(folder / str(workers), categories, num_epochs=2)
        with cluster(workers) as (address, _):
            seconds[workers], output = timed(repro(own, address))
        costs = [read_json(path).get("seconds", 0) for path in (own / "times").glob("*/*.json")]
        jobs = [float(x.split("|")[3]) for x in output.splitlines() if " | done | " in x]
        print(
            f"{workers} workers: {seconds[workers]:.0f} s; {sum(costs) / categories:.1f} s of "
            f"stages and {sum(jobs) / categories:.1f} s in all for each category",
            flush=True,
        )
    print(f"Efficiency: {seconds[1] / (2 * seconds[2]):.2f}")


def simulate(stages: float, job: float, driver: float, megabytes: float) -> None:
    """Print hours for a thousand categories, one at a time on each node.

    All that comes back goes through the driver's link, and its threads work beside each other.
    """
    print("| nodes | hours | efficiency | limit |\n|---|---|---|---|")
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        transfer = megabytes / LINK
        limits = {
            "the nodes": math.ceil(CATEGORIES / nodes) * (stages + job + transfer),
            "the driver's DVC": CATEGORIES * driver / DRIVER_THREADS,
            "the driver's link": CATEGORIES * transfer,
        }
        limit = max(limits, key=limits.__getitem__)
        efficiency = CATEGORIES * stages / (nodes * limits[limit])
        print(f"| {nodes} | {limits[limit] / 3600:.1f} | {efficiency:.2f} | {limit} |")


def kills(folder: Path, runs: int) -> None:
    """Kill a node in each run; exits with 1 if a run does not end as it should."""
    template = project(folder / "template", 2, num_epochs=12)
    own = copied(template, folder / "local")
    subprocess.run([*COMMAND, "repro", "--quiet"], cwd=own, env=single(), check=True)
    expected = results(own)
    for number in range(runs):
        own = copied(template, folder / str(number))
        print(f"run {number}: {killed_run(own, expected, random.Random(number))}", flush=True)


def killed_run(own: Path, expected: dict[str, str], chance: random.Random) -> str:
    """Run a project on two nodes, of which one is killed at a random moment; says what happened.

    Raises:
        RuntimeError: The results are not as expected, something trained twice, or is left running.
    """
    with cluster(2) as (address, nodes), watched() as most:
        process = repro(own, address, "--save-every", "5")
        wait = chance.uniform(15, 75)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
        nodes.kill(chance.randrange(2))
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(output)
    if twice := [processes for processes in most.values() if len(processes) > 1]:
        raise RuntimeError(f"trained twice at once: {twice}")
    found = results(own)
    wrong = {name for name, digest in expected.items() if found.get(name) != digest}
    if wrong:
        raise RuntimeError(f"other bytes in {sorted(wrong)}")
    deadline = time.monotonic() + ORPHAN_SECONDS
    while left := ours():
        if time.monotonic() > deadline:
            raise RuntimeError(f"still running: {left}")
        time.sleep(1)
    return f"a node killed after {wait:.0f} s; {output.count('retries remaining')} retries"


class Nodes:
    """The workers of a cluster."""

    def __init__(self, cluster: Any, count: int) -> None:
        self.cluster = cluster
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(count)]

    def kill(self, index: int) -> None:
        """Kill a node as a power cut would, and start another."""
        self.cluster.remove_node(self.nodes[index], allow_graceful=False)
        self.nodes[index] = self.cluster.add_node(num_cpus=1)


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[tuple[str, Nodes]]:
    """A head without CPUs and some workers with one each: its address, and the workers."""
    of = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield of.address, Nodes(of, workers)
    finally:
        of.shutdown()


def repro(folder: Path, address: str, *options: str) -> subprocess.Popen[str]:
    """Start `tools.ray_repro`."""
    command = [sys.executable, "-m", "tools.ray_repro", "--address", address]
    return subprocess.Popen(
        [*command, "--cpus-per-category", "1", *options],
        cwd=folder,
        env=single(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_json(path: Path) -> Any:
    """A file's content."""
    return json.loads(path.read_text())


def timed(process: subprocess.Popen[str]) -> tuple[float, str]:
    """Wait for it; the seconds that it took, and what it printed."""
    started = time.monotonic()
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(output)
    return time.monotonic() - started, output


def project(folder: Path, categories: int, num_epochs: int) -> Path:
    """A small project with generated images and a DVC remote beside it."""
    folder.mkdir(parents=True)
    for name in tracked_files(Path.cwd()):
        if name != "dvc.lock" and not name.startswith(("metrics/", "tests/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(Path(name).read_bytes())
    names = [f"part{number:03}" for number in range(categories)]
    parts = folder.parent / "parts"
    for name in names:
        if not (parts / name).exists():
            write_images(parts / name, 40, 8, 64)
    yaml = YAML()
    params: dict[str, Any] = yaml.load(folder / "params.yaml")
    params["data"] |= {"root": str(parts), "categories": names, "image_size": 64}
    params["model"] |= {"backbone": "test_resnet", "weights": "random"}
    params["training"] |= {"num_epochs": num_epochs, "batch_size": 4}
    params["evaluation"] |= {"threshold_method": "quantile", "synthetic_images": 1}
    params["export"]["formats"] = []
    params["plots"]["gallery_size"] = 1
    yaml.dump(params, folder / "params.yaml")
    for command in (
        ("git", "init", "-q"),
        ("git", "config", "user.email", "someone@example.com"),
        ("git", "config", "user.name", "Someone"),
        (*COMMAND, "remote", "add", "--quiet", "--default", "store", f"{folder}-store"),
        ("git", "add", "-A"),
        ("git", "commit", "-qm", "start"),
    ):
        subprocess.run(command, cwd=folder, env=environment(), check=True)
    return folder


def copied(template: Path, folder: Path) -> Path:
    """A copy with a remote of its own."""
    shutil.copytree(template, folder)
    command = [*COMMAND, "remote", "modify", "--local", "store", "url", f"{folder}-store"]
    subprocess.run(command, cwd=folder, env=environment(), check=True)
    return folder


def single() -> dict[str, str]:
    """The environment with one thread for each process: the number changes the last digits."""
    return environment() | {"OMP_NUM_THREADS": "1"}


def results(folder: Path) -> dict[str, str]:
    """The hash of each file of the results."""
    files = [path for name in RESULTS for path in (folder / name).rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
        for path in files
    }


def ours() -> list[str]:
    """Jobs that are running, and their stages: "stages.NAME CATEGORY (process ID of PARENT)"."""
    found, jobs = {}, str(jobs_folder())
    for process in psutil.process_iter(["cmdline", "cwd", "ppid"]):
        line, folder = process.info["cmdline"] or [], process.info["cwd"] or ""
        if folder.startswith(jobs) and "-m" in line and any(x.startswith(OURS) for x in line):
            found[process.pid] = " ".join(line[line.index("-m") + 1 :]), process.info["ppid"]
    return [
        f"{line} (process {process} of {parent})"
        for process, (line, parent) in found.items()
        if found.get(parent, ("", 0))[0] != line  # which a child's is until it executes its own
    ]


@contextlib.contextmanager
def watched() -> Iterator[dict[str, list[str]]]:
    """The processes that have trained each category when they were most at the same time."""
    most: dict[str, list[str]] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            now: dict[str, list[str]] = {}
            for process in ours():
                if process.startswith("stages.train"):
                    now.setdefault(process.partition(" (")[0], []).append(process)
            for training, processes in now.items():
                most[training] = max(most.get(training, []), processes, key=len)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    run(main)
