"""`tools.ray_repro`: leases, saves, progress and data; then runs on Ray nodes of this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from builders.pipeline import running_in, simplify
from builders.projects import Project, environment, read_json, wait_until
from builders.remote import unreliable_remote
from filelock import FileLock

from anomaly_detection.errors import UserError
from stages import LEASE
from tools.cluster.dvc import write_settings
from tools.cluster.job import LEASED, STAGE_FAILED, Job
from tools.cluster.progress import Progress, summary
from tools.cluster.view import Project as Whole

pytest.importorskip("ray")

from benchmarks.cluster import cluster, ours, results, watched
from tools.cluster import sweep, worker
from tools.cluster.runs import Run, tracked_data
from tools.cluster.worker import Board

CODE = {"PYTHONPATH": str(Path(__file__).parent.parent)}  # which a job has in its folder
STAGE = "import time\nfrom stages import run\nrun(lambda: time.sleep(600))\n"
MAKE = "mkdir -p times/a && echo 1 > times/a/make.json && cp source result"
NAMES = ["a", "b", "c"]


def make_job(folder: Path, command: str = MAKE) -> Path:
    """The folder of a job with one stage, which all have the same remote."""
    folder.mkdir()
    stage = {"cmd": command, "deps": ["source"], "outs": ["result"]}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": {"make": stage}}))
    (folder / "source").write_text("2")
    core = {"no_scm": True, "analytics": False, "check_update": False, "remote": "store"}
    settings = {"core": core, 'remote "store"': {"url": str(folder.parent / "store")}}
    write_settings(folder, settings)
    write_settings(folder / ".states", settings)
    return folder


def test_a_job_saves_its_results_its_times_and_the_state_of_a_training(
    tmp_path, monkeypatch, capfd
):
    one, other = (make_job(tmp_path / name) for name in ("one", "other"))

    def saved_by_a_job_in(folder: Path) -> list[str]:
        monkeypatch.chdir(folder)
        Job(["make"], environment() | CODE).run(save_every=60)
        return json.loads(capfd.readouterr().out.splitlines()[-1])["saved"]

    names = ["dvc.lock", "times/a/make.json"]  # times, which DVC does not know
    assert saved_by_a_job_in(one) == names
    checkpoint = Path(".work/bolt-1/epoch_1.pth")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"3")
    os.utime(checkpoint, (1e9, 1e9))
    names.append(".states/work.tar.dvc")
    assert saved_by_a_job_in(one) == names
    for name in names:
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(one / name, other / name)
    saved_by_a_job_in(other)
    assert checkpoint.read_bytes() == b"3"
    assert checkpoint.stat().st_mtime == 1e9


def test_a_lease_goes_to_one_attempt_at_a_time(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(worker.time, "monotonic", lambda: now)
    board = Board()
    assert board.lease("bolt", "first")
    assert not board.lease("bolt", "second")
    assert not board.renew("bolt", "second")
    now += worker.GRACE - 1
    assert board.renew("bolt", "first")
    now += worker.GRACE - 1
    assert not board.lease("bolt", "second")
    now += 2
    assert board.lease("bolt", "second")
    assert not board.renew("bolt", "first")
    board.save("bolt", "first", {"dvc.lock": b"late"})
    assert board.saved("bolt") == {}
    board.save("bolt", "second", {"dvc.lock": b"own"})
    assert board.saved("bolt") == {"dvc.lock": b"own"}
    board.release("bolt", "first")
    assert not board.lease("bolt", "third")
    board.release("bolt", "second")
    assert board.lease("bolt", "third")


def test_a_job_has_ended_before_its_lease_can_be_given_away():
    longest = 2 * worker.ANSWER + worker.LEASE + 2  # a late answer, the wait, the stages' poll
    assert longest < worker.GRACE


def test_a_job_that_hears_nothing_ends_with_its_stages(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    code = (
        "import os, subprocess, sys\n"
        "from filelock import FileLock\n"
        "from stages import LEASE\n"
        "from tools.cluster.job import end_without\n"
        "with FileLock('lease'):\n"
        "    subprocess.Popen([sys.executable, 'stage.py'], env=os.environ | {LEASE: 'lease'})\n"
        "    end_without(2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment() | CODE, stdin=subprocess.PIPE
    )
    wait_until(lambda: running_in(tmp_path, "stage.py"))
    for _ in range(6):  # longer than without a line
        process.stdin.write(b"\n")
        process.stdin.flush()
        time.sleep(0.5)
    assert process.poll() is None
    assert running_in(tmp_path, " stage.py")
    assert process.wait(timeout=60) == -signal.SIGKILL
    wait_until(lambda: not running_in(tmp_path))


def test_a_stage_ends_with_its_job_although_the_next_attempt_has_begun_in_its_folder(tmp_path):
    folder = make_job(tmp_path / "job", f"exec {sys.executable} stage.py")
    (folder / "stage.py").write_text(STAGE)

    def attempt() -> subprocess.Popen:
        module = [sys.executable, "-m", "tools.cluster.job"]
        options = ["--lease", "600", "--save-every", "600", "make"]
        return subprocess.Popen(
            [*module, *options], cwd=folder, env=environment() | CODE, stdin=subprocess.PIPE
        )

    def stages_there() -> list:
        return running_in(folder, f"{sys.executable} stage.py")

    first = attempt()
    wait_until(stages_there)
    (slow,) = stages_there()
    slow.suspend()
    first.kill()
    second = attempt()
    wait_until(lambda: len(stages_there()) == 2)
    slow.resume()
    wait_until(lambda: slow not in stages_there())
    assert len(stages_there()) == 1
    second.kill()
    wait_until(lambda: not stages_there())


def test_dvc_ends_with_the_job_and_starts_no_further_stage(tmp_path):
    folder = make_job(tmp_path / "job", "touch begun && sleep 8")
    variables = environment() | CODE | {LEASE: str(tmp_path / "lease")}
    with FileLock(tmp_path / "lease"):
        process = subprocess.Popen([*LEASED, "repro"], cwd=folder, env=variables)
        wait_until((folder / "begun").exists)
        time.sleep(1.5)  # longer than between two looks at the lease
        assert process.poll() is None
    assert process.wait(timeout=60) == 1
    assert not (folder / "dvc.lock").exists()


@pytest.mark.parametrize("code", ["1", "-9"])
def test_how_a_stage_has_ended_is_read_from_dvc(code):
    text = f"ERROR: failed to reproduce 'x': failed to run: python -m stages.x, exited with {code}"
    assert STAGE_FAILED.search(text)[1] == code


def test_a_node_with_other_versions_is_told_apart():
    expected = worker.versions(["numpy"])
    assert worker.differences(expected, "node") == []
    (line,) = worker.differences(expected | {"numpy": "0.1"}, "node")
    assert line.startswith("node node must have numpy 0.1, as the driver, got ")


def test_progress_in_a_log_is_rare_and_says_how_all_ended(capsys):
    progress = Progress(3)
    progress.tell("bolt", "n1", "Running stage 'train@bolt':")
    progress.tell("bolt", "n1", "> python -m stages.train bolt")
    for epoch in range(50):
        progress.tell("bolt", "n1", f"epoch {epoch}")
    progress.end("bolt", "done")
    progress.end("nut", "failed", "train/good/000.png: no image")
    progress.end("washer", "unchanged")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["bolt (n1): Running stage 'train@bolt':", "bolt (n1): epoch 0"]
    assert len(lines) == 5
    assert lines[-1] == "washer: unchanged; 1 done, 1 failed, 1 unchanged"
    table = summary(progress.outcomes).splitlines()
    assert table[2].startswith("| bolt | done |")
    assert table[-1] == "nut: train/good/000.png: no image"
    assert "1 unchanged." in table


def simple(folder: Path) -> Project:
    """A project with a pipeline that costs nothing, with data and a DVC remote beside it."""
    project = Project(folder)
    parts = folder.with_name("parts")
    project.change("data", root=str(parts))
    project.dvc("remote", "add", "--default", "store", str(folder.with_name("store")))
    simplify(project, parts, NAMES)
    return project


def test_metrics_and_times_that_a_job_has_saved_come_back_and_a_remote_must_be_set(tmp_path):
    project = simple(tmp_path / "project")
    options = {"threads": 1, "cpus": 1, "save_every": 60}
    run = Run(Whole(project.folder), **options)
    saved = {"times/a/train.json": b"1", "metrics/a/train.json": b"2", "params.yaml": b"3"}
    run.bases["a"] = b"1"
    run.save("a", saved)
    assert run.finish("a", {"failed": "export has failed"}) == "export has failed"
    back = {name: (project.folder / name).read_bytes() for name in saved}
    assert [name for name in saved if back[name] == saved[name]] == list(saved)[:2]
    project.dvc("remote", "remove", "store")
    with pytest.raises(UserError, match="dvc remote add --default"):
        Run(Whole(project.folder), **options)


def test_data_must_be_at_hand_on_all_nodes(tmp_path):
    project = Project(tmp_path)  # whose folder parts is in .gitignore
    with pytest.raises(UserError, match="must be in git, in DVC or an absolute path"):
        tracked_data(Whole(tmp_path))
    (tmp_path / "parts").rename(tmp_path / "images")
    project.change("data", root="images")
    assert tracked_data(Whole(tmp_path)) == []  # in git, or about to be
    project.dvc("add", "images/bolt", "images/nut")
    assert tracked_data(Whole(tmp_path)) == ["images/bolt.dvc", "images/nut.dvc"]


def test_a_bad_sweep_is_refused_and_without_a_cluster_it_says_how_to_start_one(tmp_path):
    project = simple(tmp_path / "project")
    with pytest.raises(UserError, match="--sweep must be NAME=VALUE"):
        sweep.variants(Whole(project.folder), ["training.rate=1,2"])
    status, _, errors = finish(start(project, "127.0.0.1:1"))
    assert status == 1
    assert "ray start --head" in errors
    assert "Traceback" not in errors


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


def complete(project: Project, address: str, *options: str) -> str:
    """Run it to the end, one category at a time on each node; what it prints."""
    status, output, errors = finish(start(project, address, *options))
    assert status == 0, output + errors
    categories: dict[str, list[str]] = {}
    for node, stage in begun(output):
        categories.setdefault(node, []).append(stage.split("@")[1])
    for names in categories.values():
        assert len(list(groupby(names))) == len(set(names)), output  # one, then the other
    return output


def begun(output: str) -> list[tuple[str, str]]:
    """Nodes and category stages whose start the driver has told, in order."""
    lines = [line for line in output.splitlines() if "): Running stage '" in line]
    return [(line.split(")")[0].split()[-1], line.split("'")[1]) for line in lines]


def copy(project: Project, folder: Path) -> Project:
    twin = object.__new__(Project)
    twin.folder = shutil.copytree(project.folder, folder, symlinks=True)
    return twin


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple]:
    """The address of a cluster, and its two workers with one CPU each."""
    with cluster(2) as both:
        yield both


@pytest.fixture(scope="module")
def reproduced(nodes, tmp_path_factory) -> tuple[Project, Project, Project, str]:
    """Projects: as it was, after a local run, after one on the cluster; and what that printed."""
    fresh = simple(tmp_path_factory.mktemp("simple") / "fresh")
    for name in NAMES:
        (fresh.folder.with_name("parts") / name / "text").write_text(f"slow {name}")
    here, there = (copy(fresh, fresh.folder.with_name(name)) for name in ("here", "there"))
    here.repro()
    return fresh, here, there, complete(there, nodes[0])


@pytest.mark.cluster
def test_it_leaves_what_a_local_run_leaves_and_a_node_runs_as_many_at_once_as_it_has_cpus(
    reproduced,
):
    _, here, there, output = reproduced
    assert len(results(there.folder)) == 2 * len(NAMES)
    assert results(there.folder) == results(here.folder)
    assert there.dvc("status").strip() == "Data and pipelines are up to date."
    assert there.repro() == []
    assert (there.folder / "times/plots/a.json").exists()
    assert "| a | done |" in output
    assert "| processor |" in output
    assert len({node for node, _ in begun(output)}) < len(NAMES)  # so two shared a node


@pytest.mark.cluster
def test_only_what_is_stale_runs(reproduced, nodes, tmp_path):
    project = copy(reproduced[2], tmp_path / "project")
    project.change("plots", gallery_size=5)
    shutil.rmtree(project.folder / ".dvc/cache")  # what the job needs must come from the remote
    output = complete(project, nodes[0])
    assert sorted(stage for _, stage in begun(output)) == ["plot@a", "plot@b", "plot@c"]
    assert project.repro() == []
    output = complete(project, nodes[0])
    assert begun(output) == []
    assert "3 unchanged." in output


@pytest.mark.cluster
def test_a_category_that_fails_is_named_with_its_reason_and_the_others_finish(
    reproduced, nodes, tmp_path
):
    project = copy(reproduced[2], tmp_path / "project")
    parts = shutil.copytree(reproduced[0].folder.with_name("parts"), tmp_path / "parts")
    (parts / "a/text").write_text("broken")
    (parts / "b/text").write_text("changed")
    project.change("data", root=str(parts))
    status, output, _ = finish(start(project, nodes[0]))
    assert status == 1
    assert "| b | done |" in output
    assert "| a | failed |" in output
    assert f"{parts}/a must be whole." in output.split("| a | failed |")[1]
    assert "retries remaining" not in output
    assert (project.folder / "plots/b").read_text() == "changed"


@pytest.mark.cluster
def test_a_remote_that_fails_every_third_request_is_asked_again(reproduced, nodes, tmp_path):
    project = copy(reproduced[0], tmp_path / "project")
    with unreliable_remote(tmp_path / "files") as (url, answers):
        project.dvc("remote", "modify", "--local", "store", "url", url)
        project.dvc("remote", "modify", "--local", "store", "method", "PUT")
        complete(project, nodes[0])
    assert results(project.folder) == results(reproduced[1].folder)
    assert answers["PUT", 503] > 0
    assert answers["GET", 503] > 5


@pytest.mark.cluster
def test_a_sweep_makes_experiments(reproduced, nodes, tmp_path, monkeypatch):
    for name in ("AUTHOR", "COMMITTER"):  # clones have no settings of the project's own repository
        monkeypatch.setenv(f"GIT_{name}_NAME", "Someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.com")
    project = copy(reproduced[2], tmp_path / "project")
    project.commit("reproduced")
    complete(project, nodes[0], "--sweep", "plots.gallery_size=3,4", "data.categories=[a]")
    table = json.loads(project.dvc("exp", "show", "--json"))
    sizes = {
        one["revs"][0]["data"]["params"]["params.yaml"]["data"]["plots"]["gallery_size"]
        for one in table[1]["experiments"]
    }
    assert sizes == {3, 4}
    assert not list((project.folder / ".work/repro/sweep").glob("*"))
    assert project.dvc("status").strip() == "Data and pipelines are up to date."


@pytest.mark.cluster
def test_resources_that_no_node_has_are_refused(nodes, tmp_path):
    project = simple(tmp_path / "project")
    status, _, errors = finish(start(project, nodes[0], "--gpus-per-category", "1"))
    assert status == 1
    assert "must be what some node has" in errors
    assert "Traceback" not in errors


EPOCHS = 60


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Project, Project]:
    """A project with the whole pipeline as it was before it ran, and after a local run."""
    folder = tmp_path_factory.mktemp("whole")
    fresh = Project(folder / "fresh")
    (fresh.folder / "parts").rename(folder / "parts")
    fresh.change("data", root=str(folder / "parts"), image_size=32)
    fresh.change("model", backbone="test_resnet", weights="random")
    fresh.change("training", num_epochs=EPOCHS, batch_size=4, early_stopping_patience=None)
    fresh.change("plots", gallery_size=1)
    fresh.dvc("remote", "add", "--default", "store", str(folder / "store"))
    fresh.commit("start")
    ran = copy(fresh, folder / "ran")
    ran.repro()
    return fresh, ran


@pytest.mark.cluster
def test_a_killed_node_changes_no_byte_and_trains_nothing_twice(local, nodes, tmp_path):
    address, workers = nodes
    project = copy(local[0], tmp_path / "project")
    with watched() as most:
        process = start(project, address, "--save-every", "1")
        output = ""
        while "Running stage 'train@bolt'" not in output:
            output += process.stdout.readline() or pytest.fail(output)
        wait_until(lambda: any(line.startswith("stages.train bolt") for line in ours()))
        node = dict((stage, node) for node, stage in begun(output))["train@bolt"]
        workers.kill([x.node_id[:6] for x in workers.nodes].index(node))
        status, rest, errors = finish(process)
    assert status == 0, output + rest + errors
    assert begun(rest)[-1][0] != node
    assert {len(processes) for processes in most.values()} == {1}
    assert results(project.folder) == results(local[1].folder)
    wait_until(lambda: not ours())


@pytest.mark.cluster
def test_a_driver_that_is_interrupted_or_killed_goes_on_when_it_is_started_again(
    local, nodes, tmp_path
):
    project = copy(local[0], tmp_path / "project")
    process = start(project, nodes[0], "--save-every", "1")
    wait_until(lambda: any("stages.train" in line for line in ours()), seconds=300)
    process.send_signal(signal.SIGINT)
    status, _, errors = finish(process)
    assert status == 130
    assert "Traceback" not in errors
    wait_until(lambda: not ours())
    assert project.dvc("status")  # dvc.lock, if there is one, can be read
    process = start(project, nodes[0], "--save-every", "1")
    saved = project.folder / ".work/repro/saves/bolt/.states/work.tar.dvc"

    def has_an_epoch() -> bool:
        return saved.exists() and "size: 10240\n" not in saved.read_text()  # that of a small file

    wait_until(has_an_epoch, seconds=300)
    process.kill()
    finish(process)
    wait_until(lambda: not ours())
    output = complete(project, nodes[0])
    assert "prepare@bolt" not in [stage for _, stage in begun(output)]
    assert "going on after epoch" in output
    history = read_json(project.folder / "metrics/bolt/train.json")["history"]
    assert [row["epoch"] for row in history] == list(range(1, EPOCHS + 1))
    assert results(project.folder) == results(local[1].folder)
