"""Experiments, mistakes and accidents with the real `dvc`."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from builders.projects import RESULTS, ROOT, Project, ran, stages, wait_until

README = (ROOT / "README.md").read_text()
AFTER_FIT = ("train", "evaluate", "export", "plot")


@pytest.fixture
def project(finished, tmp_path) -> Project:
    """A finished project of one category."""
    project = finished.copy(tmp_path / "project")
    project.change("data", categories=["bolt"])
    assert project.repro() == ["check", "report"]
    project.commit("one category")
    return project


def test_a_bad_value_in_an_experiment_costs_nothing(project):
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


def test_the_command_in_readme_restores_what_was_before_a_category_failed(project):
    for folder in ("checkpoints", "metrics"):
        shutil.rmtree(project.folder / folder / "nut")
    project.commit("nothing of the other category")
    before = project.digests(*RESULTS)
    project.change("data", categories=["bolt", "nut"])
    project.change("overrides", nut={"training": {"learning_rate": 1e30}})
    assert "the loss must be finite" in project.dvc("repro", ok=False)
    assert (project.folder / "metrics" / "nut" / "audit.json").exists()
    (command,) = re.findall(r"^git checkout HEAD \. && git clean .*$", README, re.M)
    project.run("bash", "-c", command)
    assert project.git("status", "--porcelain") == ""
    assert project.digests(*RESULTS) == before
    assert project.repro() == []


def test_an_experiment_re_runs_training_and_what_follows(project):
    output = project.dvc("exp", "run", "-S", "training.learning_rate=0.1", "-n", "slower")
    assert ran(output) == stages(["check", "report"], AFTER_FIT, ["bolt"])
    changed = project.dvc("metrics", "diff")
    assert "mean.pixel_auroc" in changed
    assert "mean.test_images" not in changed
    assert "slower" in project.dvc("exp", "show", "--csv")
    (command,) = re.findall(r"^git checkout HEAD \. && dvc checkout", README, re.M)
    project.run("bash", "-c", command)
    assert project.git("status", "--porcelain") == ""
    assert project.repro() == []


def test_a_category_that_is_not_there_is_one_line_with_those_that_are(project):
    done = project.run("python", "-m", "stages.prepare", "bolts", ok=False)
    assert done.stderr.startswith("parts/bolts must be a folder with samples.csv (csv), or ")
    assert done.stderr.strip().endswith("categories in parts: bolt, nut, washer.")
    assert not (project.folder / "data" / "prepared" / "bolts").exists()


def test_a_killed_dvc_leaves_a_trainer_that_is_noticed_and_then_resumed(project):
    project.change("training", num_epochs=60)
    project.repro("check")
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
    history = project.json("metrics/bolt/train.json")["history"]
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
