"""The parts of `tools.ray_repro` that need no Ray nodes: leases, saves, progress, data."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders.projects import Project, environment, wait_until
from filelock import FileLock

from stages import LEASE
from tools.cluster.dvc import insist, write_settings
from tools.cluster.job import LEASED, STAGE_FAILED, Job
from tools.cluster.progress import Progress, summary
from tools.cluster.view import Project as Whole

pytest.importorskip("ray")

from tools.cluster import worker
from tools.cluster.runs import Run, tracked_data
from tools.cluster.worker import Board

CODE = {"PYTHONPATH": str(Path(__file__).parent.parent)}  # which a job has in its folder
STAGE = "import time\nfrom stages import run\nrun(lambda: time.sleep(600))\n"
PIPELINE = """\
stages:
  make:
    cmd: mkdir -p times/a && echo 1 > times/a/make.json && cp source result
    deps:
      - source
    outs:
      - result
"""


def make_job(folder: Path, store: Path) -> Path:
    """The folder of a job with one stage."""
    folder.mkdir()
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "source").write_text("2")
    core = {"no_scm": True, "analytics": False, "check_update": False, "remote": "store"}
    settings = {"core": core, 'remote "store"': {"url": str(store)}}
    write_settings(folder, settings)
    write_settings(folder / ".states", settings)
    return folder


def saved(output: str) -> list[str]:
    """The files that a job has saved last."""
    return json.loads(output.splitlines()[-1])["saved"]


def test_a_job_saves_the_times_of_its_stages_which_dvc_does_not_know(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(make_job(tmp_path / "job", tmp_path / "store"))
    Job(["make"], environment() | CODE).run(save_every=60)
    assert saved(capfd.readouterr().out) == ["dvc.lock", "times/a/make.json"]


def test_the_state_of_a_training_comes_back_with_the_times_of_its_files(
    tmp_path, monkeypatch, capfd
):
    one, other = (make_job(tmp_path / name, tmp_path / "store") for name in ("one", "other"))
    checkpoint = Path(".work/bolt-1/epoch_1.pth")
    monkeypatch.chdir(one)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"3")
    os.utime(checkpoint, (1e9, 1e9))
    Job(["make"], environment() | CODE).run(save_every=60)
    names = saved(capfd.readouterr().out)
    assert names == ["dvc.lock", "times/a/make.json", ".states/work.tar.dvc"]
    for name in names:
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, other / name)
    monkeypatch.chdir(other)
    Job(["make"], environment() | CODE).run(save_every=60)
    assert checkpoint.read_bytes() == b"3"
    assert checkpoint.stat().st_mtime == 1e9


def test_metrics_and_times_that_a_job_has_saved_come_back(tmp_path):
    project = Project(tmp_path / "project")
    parts = tmp_path / "parts"
    (project.folder / "parts").rename(parts)
    project.change("data", root=str(parts))
    project.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    run = Run(Whole(project.folder), threads=1, cpus=1, save_every=60)
    saved = {"times/bolt/train.json": b"1", "metrics/bolt/train.json": b"2", "params.yaml": b"3"}
    run.bases["bolt"] = b"1"
    run.save("bolt", saved)
    assert run.finish("bolt", {"failed": "export has failed"}) == "export has failed"
    assert (project.folder / "times/bolt/train.json").read_bytes() == b"1"
    assert (project.folder / "metrics/bolt/train.json").read_bytes() == b"2"
    assert (project.folder / "params.yaml").read_bytes() != b"3"


def test_data_must_be_at_hand_on_all_nodes(tmp_path):
    project = Project(tmp_path)  # whose folder parts is in .gitignore
    with pytest.raises(Exception, match="must be in git, in DVC or an absolute path"):
        tracked_data(Whole(tmp_path))
    (tmp_path / "parts").rename(tmp_path / "images")
    project.change("data", root="images")
    assert tracked_data(Whole(tmp_path)) == []  # in git, or about to be
    project.dvc("add", "images/bolt", "images/nut")
    assert tracked_data(Whole(tmp_path)) == ["images/bolt.dvc", "images/nut.dvc"]


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


def test_a_node_with_other_versions_is_told_apart():
    expected = worker.versions(["numpy"])
    assert worker.differences(expected, "node") == []
    (line,) = worker.differences(expected | {"numpy": "0.1"}, "node")
    assert line.startswith("node node must have numpy 0.1, as the driver, got ")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("ERROR: failed to reproduce 'x': failed to run: python -m stages.x, exited with 1", "1"),
        ("ERROR: failed to reproduce 'x': failed to run: python -m stages.x, exited with -9", "-9"),
    ],
)
def test_how_a_stage_has_ended_is_read_from_dvc(text, code):
    assert STAGE_FAILED.search(text)[1] == code


def test_a_job_that_hears_nothing_ends_with_its_stages(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    code = (
        "import os, subprocess, sys\n"
        "from filelock import FileLock\n"
        "from stages import LEASE\n"
        "from tools.cluster.job import end_without\n"
        "with FileLock('lease'):\n"
        "    subprocess.Popen([sys.executable, 'stage.py'], env=os.environ | {LEASE: 'lease'})\n"
        "    end_without(3)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment() | CODE, stdin=subprocess.PIPE
    )
    wait_until(lambda: stages_in(tmp_path))
    for _ in range(4):  # longer than without a line
        process.stdin.write(b"\n")
        process.stdin.flush()
        time.sleep(1)
    assert process.poll() is None
    assert stages_in(tmp_path)
    assert process.wait(timeout=60) == -signal.SIGKILL
    wait_until(lambda: not stages_in(tmp_path))


def test_a_stage_ends_with_its_job_although_the_next_attempt_has_begun_in_its_folder(tmp_path):
    folder = make_job(tmp_path / "job", tmp_path / "store")
    (folder / "stage.py").write_text(STAGE)
    command = f"exec {sys.executable} stage.py"
    (folder / "dvc.yaml").write_text(f"stages:\n  make:\n    cmd: {command}\n")

    def attempt() -> subprocess.Popen:
        module = [sys.executable, "-m", "tools.cluster.job"]
        options = ["--lease", "600", "--save-every", "600", "make"]
        return subprocess.Popen(
            [*module, *options], cwd=folder, env=environment() | CODE, stdin=subprocess.PIPE
        )

    first = attempt()
    wait_until(lambda: stages_in(folder))
    (slow,) = stages_in(folder)
    os.kill(int(slow), signal.SIGSTOP)
    first.kill()
    second = attempt()
    wait_until(lambda: len(stages_in(folder)) == 2)
    os.kill(int(slow), signal.SIGCONT)
    wait_until(lambda: slow not in stages_in(folder))
    assert len(stages_in(folder)) == 1
    second.kill()
    wait_until(lambda: not stages_in(folder))


def test_dvc_ends_with_the_job_and_starts_no_further_stage(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\nno_scm = true\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  wait:\n    cmd: touch begun && sleep 10\n")
    variables = environment() | CODE | {LEASE: str(tmp_path / "lease")}
    with FileLock(tmp_path / "lease"):
        process = subprocess.Popen([*LEASED, "repro"], cwd=tmp_path, env=variables)
        wait_until((tmp_path / "begun").exists)
        time.sleep(2)
        assert process.poll() is None
    assert process.wait(timeout=60) == 1
    assert not (tmp_path / "dvc.lock").exists()


def stages_in(folder: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-f", "stage.py"], capture_output=True, text=True).stdout
    return [pid for pid in found.split() if Path(f"/proc/{pid}/cwd").resolve() == folder]


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


def test_settings_with_secrets_are_for_the_owner_alone(tmp_path):
    write_settings(tmp_path, {'remote "store"': {"url": "s3://x", "secret_access_key": "k"}})
    mode = (tmp_path / ".dvc/config").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_an_action_is_insisted_on_with_growing_pauses_until_it_succeeds_or_is_given_up():
    answers, pauses = iter(["one", "two", None]), []
    assert insist(lambda: next(answers), lambda *pause: pauses.append(pause)) is None
    assert pauses == [(1, "one"), (2, "two")]
    assert insist(lambda: "no", lambda *_: True) == "no"
    pauses.clear()
    assert insist(lambda: "no", lambda *pause: pauses.append(pause)) == "no"
    assert [delay for delay, _ in pauses] == [1, 2, 4, 8, 16, 32]
