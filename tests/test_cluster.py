"""`tools.ray_repro` on Ray nodes that are processes on this machine."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path

import pytest
from builders.projects import Project, environment, wait_until

pytest.importorskip("ray")

from benchmarks.cluster import Nodes, cluster, ours, results
from tools.cluster.view import Project as Whole

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def make(folder: Path, num_epochs: int = 2) -> Project:
    """A project with data beside it, and a DVC remote."""
    project = Project(folder)
    parts = folder.with_name(f"{folder.name}-parts")
    shutil.move(folder / "parts", parts)
    project.change("data", root=str(parts))
    project.change("model", backbone="test_resnet", weights="random")
    project.change("training", num_epochs=num_epochs, batch_size=4)
    project.change("evaluation", synthetic_images=1)
    project.change("plots", gallery_size=1)
    project.dvc(
        "remote", "add", "--default", "store", str(folder.with_name(f"{folder.name}-store"))
    )
    project.commit("start")
    return project


def copy(project: Project, folder: Path) -> Project:
    """The same commit in another folder, with a remote of its own."""
    shutil.copytree(project.folder, folder, symlinks=True)
    twin = object.__new__(Project)
    twin.folder = folder
    store = str(folder.with_name(f"{folder.name}-store"))
    twin.dvc("remote", "modify", "--local", "store", "url", store)
    return twin


def start(project: Project, address: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.ray_repro", "--address", address]
    return subprocess.Popen(
        [*command, "--cpus-per-category", "1", *options],
        cwd=project.folder,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate()
    return process.returncode, output, errors


def running_stages(output: str) -> list[str]:
    """The category stages whose start the driver has told, in order."""
    lines = output.splitlines()
    return [line.split("'")[1] for line in lines if "): Running stage '" in line]


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, Nodes]]:
    with cluster(2) as both:
        yield both


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Project]:
    """A project as it was before it ran, and the same after a local run."""
    folder = tmp_path_factory.mktemp("local")
    fresh = make(folder / "fresh")
    ran = copy(fresh, folder / "ran")
    ran.repro()
    return fresh, ran


@pytest.fixture(scope="module")
def reproduced(local, nodes, tmp_path_factory) -> tuple[Project, str]:
    """The project after a run on the cluster, and what was printed."""
    project = copy(local[0], tmp_path_factory.mktemp("ray") / "project")
    status, output, errors = finish(start(project, nodes[0]))
    assert status == 0, output + errors
    return project, output


def test_it_leaves_what_a_local_run_leaves(local, reproduced):
    project, output = reproduced
    assert results(project.folder) == results(local[1].folder)
    assert project.dvc("status").strip() == "Data and pipelines are up to date."
    assert project.repro() == []
    assert "| bolt | done |" in output
    assert "| processor |" in output


def test_only_what_is_stale_runs(reproduced, nodes):
    project, _ = reproduced
    project.change("plots", gallery_size=2)
    shutil.rmtree(project.folder / ".dvc/cache")  # what the job needs must come from the remote
    status, output, errors = finish(start(project, nodes[0]))
    assert status == 0, output + errors
    assert sorted(running_stages(output)) == ["plot@bolt", "plot@nut"]
    assert project.repro() == []
    status, output, _ = finish(start(project, nodes[0]))
    assert (status, running_stages(output)) == (0, [])
    assert "2 unchanged." in output


def test_a_node_runs_no_more_categories_at_once_than_its_cpus_allow(local, tmp_path):
    project = copy(local[0], tmp_path / "project")
    with cluster(1) as (address, _):
        status, output, errors = finish(start(project, address))
    assert status == 0, output + errors
    by_category = groupby(running_stages(output), lambda stage: stage.split("@")[1])
    assert len(list(by_category)) == 2  # one, then the other


def test_a_category_that_fails_is_named_with_its_reason_and_the_others_finish(
    reproduced, nodes, tmp_path
):
    project = copy(reproduced[0], tmp_path / "project")
    project.change("evaluation", threshold_method="manual", threshold=0.5)
    parts = tmp_path / "parts"
    shutil.copytree(Whole(project.folder).params["data"]["root"], parts)
    (parts / "bolt" / "train/good/000.png").write_bytes(b"no picture")
    project.change("data", root=str(parts))
    status, output, _ = finish(start(project, nodes[0]))
    assert status == 1
    assert "| nut | done |" in output
    assert "| bolt | failed |" in output
    assert "train/good/000.png" in output.split("| bolt | failed |")[1]
    assert "retries remaining" not in output
    assert (project.folder / "detectors/nut.pt").exists()


def test_a_killed_node_changes_no_byte_and_trains_nothing_twice(local, tmp_path):
    for number in range(int(os.environ.get("KILLS", "1"))):
        project = copy(local[0], tmp_path / str(number))
        kille.run(project.folder, results(local[1].folder), random.Random(number))


def test_a_driver_that_is_killed_and_started_again_goes_on(local, nodes, tmp_path):
    project = copy(local[0], tmp_path / "project")
    project.change("training", num_epochs=100)
    process = start(project, nodes[0], "--save-every", "5")
    saved = project.folder / ".work/repro/saves/bolt/.states/work.tar.dvc"

    def has_an_epoch() -> bool:
        return saved.exists() and "size: 10240\n" not in saved.read_text()  # that of a small file

    wait_until(has_an_epoch, seconds=300)
    process.send_signal(signal.SIGKILL)
    finish(process)
    wait_until(lambda: not ours())
    status, output, errors = finish(start(project, nodes[0]))
    assert status == 0, output + errors
    assert "prepare@bolt" not in running_stages(output)
    assert "going on after epoch" in output
    history = json.loads((project.folder / "metrics/bolt/train.json").read_text())["history"]
    assert [row["epoch"] for row in history] == list(range(1, 101))


def test_an_interrupted_driver_keeps_what_was_saved_and_leaves_nothing_running(
    local, nodes, tmp_path
):
    project = copy(local[0], tmp_path / "project")
    process = start(project, nodes[0], "--save-every", "5")
    wait_until(lambda: any("stages.train" in line for line in ours()), seconds=300)
    process.send_signal(signal.SIGINT)
    status, _, errors = finish(process)
    assert status == 130
    assert "Traceback" not in errors
    wait_until(lambda: not ours())
    assert project.dvc("status")  # dvc.lock, if there is one, can be read


@contextlib.contextmanager
def unreliable_remote(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """An HTTP server of files that refuses every third request; its URL, and all its answers.

    Each method is counted by itself: in DVC's own rhythm, every third request is a PUT.
    """
    answers: list[int] = []
    counts: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def is_refused(self) -> bool:
            counts[self.command] += 1
            return counts[self.command] % 3 == 0

        def answer(self, status: int, content: bytes = b"") -> None:
            answers.append(status)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            path = folder / self.path.strip("/")
            if self.is_refused():
                self.answer(503)
            elif path.is_file():
                self.answer(200, path.read_bytes())
            else:
                self.answer(404)

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            content = self.body()
            if self.is_refused():
                self.answer(503)
                return
            path = folder / self.path.strip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.answer(201)

        def body(self) -> bytes:
            if "Content-Length" in self.headers:
                return self.rfile.read(int(self.headers["Content-Length"]))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", answers
    finally:
        server.shutdown()
        server.server_close()


def test_a_remote_that_fails_every_third_request_is_asked_again(local, nodes, tmp_path):
    project = copy(local[0], tmp_path / "project")
    with unreliable_remote(tmp_path / "files") as (url, answers):
        project.dvc("remote", "modify", "--local", "store", "url", url)
        project.dvc("remote", "modify", "--local", "store", "method", "PUT")
        status, output, errors = finish(start(project, nodes[0]))
    assert status == 0, output + errors
    assert results(project.folder) == results(local[1].folder)
    assert answers.count(503) > 20


def test_a_sweep_makes_experiments(reproduced, nodes, tmp_path):
    project = copy(reproduced[0], tmp_path / "project")
    project.commit("reproduced")
    sweep = ("--sweep", "training.learning_rate=0.1,0.2", "data.categories=[bolt]")
    status, output, errors = finish(start(project, nodes[0], *sweep))
    assert status == 0, output + errors
    table = json.loads(project.dvc("exp", "show", "--json"))
    experiments = table[1]["experiments"]
    rates = {
        one["revs"][0]["data"]["params"]["params.yaml"]["data"]["training"]["learning_rate"]
        for one in experiments
    }
    assert rates == {0.1, 0.2}
    assert not list((project.folder / ".work/repro/sweep").glob("*"))
    assert project.dvc("status").strip() == "Data and pipelines are up to date."


def test_a_bad_sweep_is_refused_at_once(local, nodes):
    status, _, errors = finish(start(local[0], nodes[0], "--sweep", "training.rate=1,2"))
    assert status == 1
    assert "--sweep must be NAME=VALUE" in errors
    assert "Traceback" not in errors


def test_without_a_cluster_it_says_how_to_start_one(local):
    status, _, errors = finish(start(local[0], "127.0.0.1:1"))
    assert status == 1
    assert "ray start --head" in errors
    assert "Traceback" not in errors


def test_without_a_remote_it_says_how_to_add_one(local, nodes, tmp_path):
    project = copy(local[0], tmp_path / "project")
    project.dvc("remote", "remove", "store")
    status, _, errors = finish(start(project, nodes[0]))
    assert status == 1
    assert "dvc remote add --default" in errors


def test_resources_that_no_node_has_are_refused(local, nodes):
    status, _, errors = finish(start(local[0], nodes[0], "--gpus-per-category", "1"))
    assert status == 1
    assert "must be what some node has" in errors
