"""The real `dvc` on a small data set, in a scratch copy of the project."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_category
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

ALL = ["check", "fetch", "report"]
EVERY_CATEGORY = ("prepare", "train", "evaluate", "plot")


class Project:
    """A scratch copy of the project with a small data set and small parameters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tracked = self._run(
            "git", "ls-files", "--cached", "--others", "--exclude-standard", at=ROOT
        )
        for name in tracked.stdout.splitlines():
            if (ROOT / name).is_file() and not name.startswith(("metrics/", "dvc.lock")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        for category in ("bolt", "nut", "washer"):
            write_category(folder / "parts" / category, masks=category != "nut")
        self.change("data", root="parts", categories=["bolt", "nut"], image_size=64)
        self.change("training", num_epochs=2, batch_size=8)
        self.change("evaluation", false_reject_rate=0.25, synthetic_images=1)
        self.change("plots", gallery_size=2)
        (folder / ".gitignore").open("a").write("/parts\n")
        self.git("init", "-q")
        self.git("config", "user.email", "someone@example.com")
        self.git("config", "user.name", "Someone")
        self.commit("start")

    def _run(self, *command: str, at: Path | None = None, ok: bool = True):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": ""}
        done = subprocess.run(
            command, cwd=at or self.folder, env=environment, capture_output=True, text=True
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done

    def start(self, *command: str) -> subprocess.Popen:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(command, cwd=self.folder, env=os.environ | {"PATH": path})

    def git(self, *arguments: str) -> None:
        self._run("git", *arguments)

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", message, "--allow-empty")

    def dvc(self, *arguments: str, ok: bool = True) -> str:
        done = self._run("dvc", *arguments, ok=ok)
        return done.stdout + done.stderr

    def repro(self, *arguments: str) -> list[str]:
        """Run `dvc repro`; returns the stages that ran, sorted."""
        return sorted(re.findall(r"Running stage '(.*)'", self.dvc("repro", *arguments)))

    def change(self, section: str, **values) -> None:
        yaml = YAML()
        params = yaml.load(self.folder / "params.yaml")
        params[section].update(values)
        yaml.dump(params, self.folder / "params.yaml")

    def digests(self, *folders: str) -> dict[str, str]:
        return {
            path.relative_to(self.folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
            for folder in folders
            for path in sorted((self.folder / folder).rglob("*"))
            if path.is_file()
        }


RESULTS = ("checkpoints", "predictions", "metrics", "plots")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    assert project.repro() == stages(ALL, EVERY_CATEGORY, ["bolt", "nut"])
    project.commit("first run")
    return project


def stages(once: list[str], of_category: tuple[str, ...], categories: list[str]) -> list[str]:
    return sorted(once + [f"{stage}@{name}" for stage in of_category for name in categories])


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def test_the_pipeline_writes_what_it_promises(project):
    for category in ("bolt", "nut"):
        metrics = read_json(project.folder / "metrics" / category / "evaluate.json")
        assert metrics["num_normal"], metrics["num_anomalous"] == (4, 8)
        assert set(metrics["per_defect_type"]) == {"bright", "dark"}
        assert metrics["image_auroc"] > 0.5
        assert ("aupro" in metrics) == (category == "bolt")
        names = {path.name for path in (project.folder / "plots" / category).iterdir()}
        assert names == {
            "confusion_matrix.csv",
            "confusion_matrix.png",
            "detection.csv",
            "detection.png",
            "gallery.png",
            "loss.csv",
            "loss.png",
            "precision_recall.csv",
            "precision_recall.png",
            "roc.csv",
            "roc.png",
            "scores.png",
        }
    summary = read_json(project.folder / "metrics" / "summary.json")
    assert list(summary) == ["bolt", "nut", "mean"]
    aurocs = [summary[name]["image_auroc"] for name in ("bolt", "nut")]
    assert summary["mean"]["image_auroc"] == pytest.approx(np.mean(aurocs))


def test_verdicts_follow_from_the_scores_and_the_threshold(project):
    metrics = read_json(project.folder / "metrics" / "bolt" / "evaluate.json")
    with (project.folder / "predictions" / "bolt" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    maps = np.load(project.folder / "predictions" / "bolt" / "anomaly_maps.npy")
    assert maps.shape == (len(rows), 64, 64)
    for row in rows:
        assert int(row["pred_label"]) == (float(row["score"]) > metrics["threshold"])
    top = np.sort(maps.reshape(len(rows), -1))[:, -41:].mean(axis=1)
    assert [float(row["score"]) for row in rows] == pytest.approx(top, rel=1e-5)


def test_the_checkpoint_is_self_contained_and_has_no_other_file_beside_it(project):
    folder = project.folder / "checkpoints" / "bolt"
    assert [path.name for path in folder.iterdir()] == ["best_model.pth"]
    content = torch.load(folder / "best_model.pth", weights_only=True)
    assert content["metadata"]["image_size"] == 64
    assert content["metadata"]["params"]["training"]["batch_size"] == 8
    assert content["model"]["backbone"] == "tf_efficientnet_lite0"


def test_nothing_runs_when_nothing_changed(project):
    assert project.repro() == []
    path = project.folder / "params.yaml"
    path.write_text(path.read_text() + "\n# a comment\n")
    assert project.repro() == []


def test_a_second_run_of_everything_gives_the_same_bytes(project):
    before = project.digests(*RESULTS)
    assert len(before) > 20
    assert project.repro("--force") == stages(ALL, EVERY_CATEGORY, ["bolt", "nut"])
    assert project.digests(*RESULTS) == before


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("plots", {"colormap": "viridis"}, (["check", "report"], ("plot",), ["bolt", "nut"])),
        (
            "evaluation",
            {"threshold_method": "manual", "threshold": 0.1},
            (["check", "report"], ("evaluate", "plot"), ["bolt", "nut"]),
        ),
        (
            "training",
            {"learning_rate": 0.35},
            (["check", "report"], ("train", "evaluate", "plot"), ["bolt", "nut"]),
        ),
        (
            "overrides",
            {"nut": {"training": {"num_epochs": 3}}},
            (["check", "report"], ("train", "evaluate", "plot"), ["nut"]),
        ),
        ("data", {"image_size": 96}, (["check", "report"], EVERY_CATEGORY, ["bolt", "nut"])),
        (
            "data",
            {"categories": ["bolt", "nut", "washer"]},
            (["check", "report"], EVERY_CATEGORY, ["washer"]),
        ),
    ],
    ids=["plots", "evaluation", "training", "overrides", "image_size", "category"],
)
def test_a_change_re_runs_what_it_affects_and_nothing_else(project, section, values, expected):
    project.change(section, **values)
    assert project.repro() == stages(*expected)
    assert project.repro() == []


def test_a_bad_value_in_an_experiment_costs_nothing(project):
    project.commit("before the bad value")
    before = project.digests(*RESULTS, "checked")
    output = project.dvc("exp", "run", "-S", "training.learning_rate=abc", ok=False)
    assert "params.yaml: training.learning_rate must be a valid number, got 'abc'." in output
    assert "Traceback" not in output
    after = project.digests(*RESULTS)
    assert after == {name: digest for name, digest in before.items() if name in after}
    assert set(before) - set(after) <= {name for name in before if name.startswith("checked/")}
    # DVC changes the file twice within a second, and git may take it for unchanged.
    (project.folder / "params.yaml").touch()
    project.git("checkout", "-q", "HEAD", ".")
    assert project.repro() == []


def test_an_experiment_re_runs_training_and_what_follows(project):
    project.change("data", categories=["bolt"])
    project.repro()
    project.commit("before the experiment")
    output = project.dvc("exp", "run", "-S", "training.learning_rate=0.1", "-n", "slower")
    ran = sorted(re.findall(r"Running stage '(.*)'", output))
    assert ran == stages(["check", "report"], ("train", "evaluate", "plot"), ["bolt"])
    assert "image_auroc" in project.dvc("metrics", "diff")
    assert "slower" in project.dvc("exp", "show", "--csv")


def test_the_stages_work_in_the_shell_of_a_careless_user(project):
    done = project._run("python", "-m", "stages.prepare", "bolts", ok=False)
    assert done.stderr.startswith("parts/bolts must be a folder in the MVTec AD layout")
    assert done.stderr.strip().endswith("categories in parts: bolt, nut, washer.")
    assert not (project.folder / "data" / "prepared" / "bolts").exists()


def test_a_killed_dvc_leaves_a_trainer_that_is_noticed_and_then_resumed(project):
    project.change("training", num_epochs=60)
    project.repro("prepare@bolt")
    dvc = project.start("dvc", "repro", "train@bolt")
    states = project.folder / ".work"
    wait_until(lambda: list(states.glob("bolt-*/epoch_*.pth")) or dvc.poll() is not None)
    assert dvc.poll() is None
    dvc.kill()
    dvc.wait()
    output = project.dvc("repro", "train@bolt", ok=False)
    orphan = int(re.search(r"process (\d+) is at it", output)[1])
    assert "Traceback" not in output
    os.kill(orphan, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{orphan}").exists())
    output = project.dvc("repro", "train@bolt")
    assert "going on after epoch" in output
    assert not list(states.glob("bolt-*"))
    history = read_json(project.folder / "metrics" / "bolt" / "train.json")["history"]
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError
