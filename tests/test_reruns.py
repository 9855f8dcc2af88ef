"""Which change re-runs what, with the real `dvc` on a small data set."""

import numpy as np
import pytest
from builders.images import write_image
from builders.projects import ALL, EVERY_CATEGORY, Project, stages

pytestmark = pytest.mark.slow

OF_MODEL = ("train", "evaluate", "export")  # the stages that use a model's code
AFTER_FIT = (*OF_MODEL, "plot")


def distilled(**steps: int) -> dict:
    """A model that is pretrained."""
    return {"model": {"name": "efficientad"}, "efficientad": {"teacher": "distilled", **steps}}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """Run once, and changed from test to test."""
    project = Project(tmp_path_factory.mktemp("project"))
    assert project.repro() == stages(ALL, EVERY_CATEGORY, ["bolt", "nut"])
    project.commit("first run")
    return project


def test_nothing_runs_when_nothing_changed(project):
    assert project.repro() == []
    path = project.folder / "params.yaml"
    path.write_text(path.read_text() + "\n# a comment\n")
    assert project.repro() == []


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("plots", {"colormap": "viridis"}, (["check", "report"], ("plot",), ["bolt", "nut"])),
        (
            "evaluation",
            {"threshold_method": "manual", "threshold": 0.1},
            (["check", "report"], ("evaluate", "export", "plot"), ["bolt", "nut"]),
        ),
        (
            "training",
            {"learning_rate": 0.35},
            (["check", "report"], AFTER_FIT, ["bolt", "nut"]),
        ),
        (
            "export",
            {"allow_changed_verdicts": 1},
            (["check"], ("export",), ["bolt", "nut"]),  # which finds what it found before
        ),
        ("hardware", {"feature_cache": 0, "num_workers": 1}, (["check"], (), [])),
        ("patchcore", {"bank_size": 300}, (["check"], (), [])),
        ("stfpm", {"hard_fraction": 0.1}, (["check"], (), [])),
        (
            "stfpm",
            {"hard_fraction": 0.2},
            (["check", "report"], AFTER_FIT, ["bolt", "nut"]),
        ),
        (
            "overrides",
            {"nut": {"training": {"num_epochs": 3}}},
            (["check", "report"], AFTER_FIT, ["nut"]),
        ),
        (
            "overrides",
            {"nut": distilled(num_steps=2, distillation_steps=2)},
            (["check", "report"], ("pretrain", *AFTER_FIT), ["nut"]),
        ),
        (
            "overrides",
            {"nut": distilled(num_steps=3, distillation_steps=2)},
            (["check", "report"], AFTER_FIT, ["nut"]),
        ),
        (
            "overrides",
            {"nut": distilled(num_steps=3, distillation_steps=3)},
            (["check", "report"], ("pretrain", *AFTER_FIT), ["nut"]),
        ),
        (
            "overrides",
            {"nut": {"model": {"name": "patchcore"}}},
            # That there is nothing to pretrain was so before, and DVC has kept it.
            (["check", "report"], AFTER_FIT, ["nut"]),
        ),
        (
            "patchcore",
            {"bank_size": 200},
            (["check", "report"], AFTER_FIT, ["nut"]),
        ),
        ("evaluation", {"folds": 3}, (["check"], ("evaluate",), ["bolt", "nut"])),
        ("data", {"layout": "mvtec"}, (["check"], ("prepare",), ["bolt", "nut"])),
        ("data", {"pixel_size": 0.1}, (["check", "report"], ("evaluate", "plot"), ["bolt", "nut"])),
        ("data", {"image_size": 48}, (["check", "report"], EVERY_CATEGORY, ["bolt", "nut"])),
        (
            "data",
            {"categories": ["bolt", "nut", "washer"]},
            (["check", "report"], EVERY_CATEGORY, ["washer"]),
        ),
    ],
    ids=[
        "plots",
        "evaluation",
        "training",
        "export",
        "hardware",
        "model not used",
        "the value that auto is",
        "model used",
        "overrides",
        "pretraining",
        "after pretraining",
        "pretraining changed",
        "another model",
        "model of one category",
        "folds that are not used",
        "layout",
        "pixel_size",
        "image_size",
        "category",
    ],
)
def test_a_change_re_runs_what_it_affects_and_nothing_else(project, section, values, expected):
    project.change(section, **values)
    assert project.repro() == stages(*expected)
    assert project.repro() == []


@pytest.mark.parametrize("path", ["nut/test/good/new.png", "nut/test/scratch/new.png"])
def test_a_test_image_trains_nothing(project, path):
    write_image(project.folder / "parts" / path, np.full((64, 64, 3), len(path), np.uint8))
    after = ("prepare", "evaluate", "export", "plot")
    assert project.repro() == stages(["report"], after, ["nut"])
    assert project.repro() == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        # A comment changes no output, so that what only follows evaluate or export does not run.
        ("models/stfpm/model.py", (["check"], OF_MODEL, ["bolt", "washer"])),
        ("models/patchcore/spec.py", (["check"], OF_MODEL, ["nut"])),
        ("export/parity.py", ([], ("export",), ["bolt", "nut", "washer"])),
        ("report/trend.py", (["report"], ("plot",), ["bolt", "nut", "washer"])),
    ],
)
def test_an_edit_re_runs_the_categories_that_it_concerns(project, path, expected):
    """After the changes above: `nut` has PatchCore, the others STFPM."""
    file = project.folder / "anomaly_detection" / path
    file.write_text(file.read_text() + "# a comment\n")
    assert project.repro() == stages(*expected)
