"""Which change re-runs what: DVC itself on the real dvc.yaml, with commands that only write files.

Each such command writes something new, so that all that follows runs too. The last tests here, and
those of `test_pipeline.py`, run the real commands.
"""

import numpy as np
import pytest
from builders.images import write_image
from builders.projects import ALL, EVERY_CATEGORY, Project, in_folder, stages
from dvc.repo import Repo
from ruamel.yaml import YAML

BOTH = ["bolt", "nut"]
REPORTED = ["check", "report"]
OF_MODEL = ("train", "evaluate", "export")  # the stages that use a model's code
AFTER_FIT = (*OF_MODEL, "plot")
AFTER_EVALUATION = ("evaluate", "export", "plot")
CHECK_ALONE = (["check"], (), [])


def write_stubs(project: Project) -> None:
    """Let the stages, but for `check`, write the time to each of their outputs instead."""
    yaml, path = YAML(), project.folder / "dvc.yaml"
    content = yaml.load(path)
    for name, stage in content["stages"].items():
        if name != "check":
            listed = [*stage["outs"], *stage.get("plots", []), *stage.get("metrics", [])]
            outs = [next(iter(out)) if isinstance(out, dict) else out for out in listed]
            write = 'mkdir -p "$(dirname "$out")"; date +%s%N > "$out"'
            stage["cmd"] = f"for out in {' '.join(outs)}; do {write}; done"
    yaml.dump(content, path)


def repro(project: Project) -> list[str]:
    """The stages that `dvc repro` runs, sorted."""
    with in_folder(project.folder), Repo() as repo:
        return sorted(stage.addressing for stage in repo.reproduce())


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory) -> Project:
    """A project of stubs in which everything has run."""
    project = Project(tmp_path_factory.mktemp("stubs") / "project")
    write_stubs(project)
    assert repro(project) == stages(ALL, EVERY_CATEGORY, BOTH)
    return project


@pytest.fixture
def project(reproduced, tmp_path) -> Project:
    return reproduced.copy(tmp_path / "project")


def distilled(**steps: int) -> dict:
    """Parameters of a model that is pretrained."""
    return {"model": {"name": "efficientad"}, "efficientad": {"teacher": "distilled", **steps}}


WALKS = {
    "what follows the fit": [
        ("plots", {"colormap": "viridis"}, (REPORTED, ("plot",), BOTH)),
        ("evaluation", {"threshold": 0.1}, (REPORTED, AFTER_EVALUATION, BOTH)),
        ("evaluation", {"folds": 3}, (REPORTED, AFTER_EVALUATION, BOTH)),
        ("export", {"allow_changed_verdicts": 1}, (REPORTED, ("export",), BOTH)),
    ],
    "the fit": [
        ("training", {"learning_rate": 0.35}, (REPORTED, AFTER_FIT, BOTH)),
        ("stfpm", {"hard_fraction": 0.1}, CHECK_ALONE),  # the value that auto is
        ("stfpm", {"hard_fraction": 0.2}, (REPORTED, AFTER_FIT, BOTH)),
        ("patchcore", {"bank_size": 300}, CHECK_ALONE),  # a model that is not used
        ("hardware", {"feature_cache": 0, "num_workers": 1}, CHECK_ALONE),
    ],
    "the fit of one category": [
        ("overrides", {"nut": {"training": {"num_epochs": 3}}}, (REPORTED, AFTER_FIT, ["nut"])),
        (
            "overrides",
            {"nut": {"model": {"name": "patchcore"}}},
            (REPORTED, AFTER_FIT, ["nut"]),
        ),
        ("patchcore", {"bank_size": 200}, (REPORTED, AFTER_FIT, ["nut"])),
    ],
    "a pretraining": [
        (
            "overrides",
            {"nut": distilled(num_steps=2, distillation_steps=2)},
            (REPORTED, ("pretrain", *AFTER_FIT), ["nut"]),
        ),
        (
            "overrides",
            {"nut": distilled(num_steps=3, distillation_steps=2)},
            (REPORTED, AFTER_FIT, ["nut"]),
        ),
        (
            "overrides",
            {"nut": distilled(num_steps=3, distillation_steps=3)},
            (REPORTED, ("pretrain", *AFTER_FIT), ["nut"]),
        ),
    ],
    "the data": [
        ("data", {"pixel_size": 0.1}, (REPORTED, AFTER_EVALUATION, BOTH)),
        ("data", {"layout": "mvtec"}, (REPORTED, EVERY_CATEGORY, BOTH)),
        ("data", {"image_size": 48}, (REPORTED, EVERY_CATEGORY, BOTH)),
        ("data", {"categories": [*BOTH, "washer"]}, (REPORTED, EVERY_CATEGORY, ["washer"])),
    ],
}


@pytest.mark.parametrize("walk", WALKS)
def test_a_change_re_runs_what_it_affects_and_nothing_else(project, walk):
    for section, values, expected in WALKS[walk]:
        project.change(section, **values)
        assert repro(project) == stages(*expected), (section, values)


def test_nothing_runs_when_nothing_has_changed(project):
    assert repro(project) == []
    path = project.folder / "params.yaml"
    path.write_text(path.read_text() + "\n# a comment\n")
    assert repro(project) == []


def edit(project: Project, path: str) -> None:
    """Add a comment to a file of the library."""
    file = project.folder / "anomaly_detection" / path
    file.write_text(file.read_text() + "# a comment\n")


def test_an_edit_re_runs_the_categories_that_it_concerns(project):
    project.change("overrides", nut={"model": {"name": "patchcore"}})
    repro(project)
    edit(project, "models/stfpm/stfpm.py")
    assert repro(project) == stages(REPORTED, AFTER_FIT, ["bolt"])
    edit(project, "models/patchcore/spec.py")
    assert repro(project) == stages(REPORTED, AFTER_FIT, ["nut"])
    edit(project, "export/parity.py")
    assert repro(project) == stages(["report"], ("export",), BOTH)
    edit(project, "report/trend.py")
    assert repro(project) == stages(["report"], ("plot",), BOTH)


def test_what_a_stage_writes_again_unchanged_re_runs_nothing(finished, tmp_path):
    """With the real commands."""
    project = finished.copy(tmp_path / "project")
    project.change("export", allow_changed_verdicts=1)  # which finds what it found before
    assert project.repro() == stages(["check"], ("export",), BOTH)


@pytest.mark.parametrize("kind", ["scratch", pytest.param("good", marks=pytest.mark.exhaustive)])
def test_a_test_image_trains_nothing(finished, tmp_path, kind):
    """With the real commands: `prepare` writes the same training images again."""
    project = finished.copy(tmp_path / "project")
    path = project.folder / "parts/nut/test" / kind / "new.png"
    write_image(path, np.full((64, 64, 3), 7, np.uint8))
    after = ("prepare", "evaluate", "export", "plot")
    assert project.repro() == stages(["report"], after, ["nut"])
    assert project.repro() == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "section",
    ["evaluation", "layout", "pixel_size", "image_size", "pretraining", "category", "code"],
)
def test_the_real_commands_run_after_a_change(finished, tmp_path, section):
    project = finished.copy(tmp_path / "project")
    pretrained = {"nut": distilled(num_steps=2, distillation_steps=2)}
    changes = {
        "evaluation": ("evaluation", {"folds": 3}, (["check"], ("evaluate",), BOTH)),
        "layout": ("data", {"layout": "mvtec"}, (["check"], ("prepare",), BOTH)),
        "pixel_size": ("data", {"pixel_size": 0.1}, (REPORTED, ("evaluate", "plot"), BOTH)),
        "image_size": ("data", {"image_size": 48}, (REPORTED, EVERY_CATEGORY, BOTH)),
        "pretraining": ("overrides", pretrained, (REPORTED, ("pretrain", *AFTER_FIT), ["nut"])),
        "category": (
            "data",
            {"categories": [*BOTH, "washer"]},
            (REPORTED, EVERY_CATEGORY, ["washer"]),
        ),
    }
    if section == "code":  # comments alter no output
        edit(project, "models/stfpm/stfpm.py")
        expected = (["check"], OF_MODEL, BOTH)
    else:
        name, values, expected = changes[section]
        project.change(name, **values)
    assert project.repro() == stages(*expected)
    assert project.repro() == []
