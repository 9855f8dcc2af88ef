"""The real `dvc repro` on a small data set: what it writes, and which change re-runs what."""

import csv

import numpy as np
import pytest
import torch
from scratch import ALL, EVERY_CATEGORY, RESULTS, Project, read_json, stages

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    assert project.repro(measured=True) == stages(ALL, EVERY_CATEGORY, ["bolt", "nut"])
    project.commit("first run")
    return project


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
