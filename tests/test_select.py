"""Choosing between candidates: the rule by hand, and the command on real images."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from builders.projects import Project, environment, read_json
from ruamel.yaml import YAML

from anomaly_detection import models
from anomaly_detection.evaluation.synthetic import FAMILIES, SIZES
from anomaly_detection.selection import OPACITIES, areas_by_family, choose, family_cases, mean_areas
from benchmarks import selection as benchmark

DEFAULT = {"blob": 0.9, "scratch": 0.8, "noise": 0.7}


def test_the_areas_are_those_of_each_family():
    areas = areas_by_family([0.1, 0.3], [0.2, 0.4, 0.0], ["blob", "blob", "scratch"])
    assert areas == {"blob": 0.75, "scratch": 0.0}
    assert mean_areas([areas, {"blob": 0.25, "scratch": 1.0}]) == {"blob": 0.5, "scratch": 0.5}


@pytest.mark.parametrize(
    ("rival", "is_chosen"),
    [
        ({"blob": 0.91, "scratch": 0.81, "noise": 0.71}, True),
        ({"blob": 0.91, "scratch": 0.79, "noise": 0.71}, True),  # two of three, and the worst
        ({"blob": 0.99, "scratch": 0.99, "noise": 0.69}, False),  # worse in the worst
        ({"blob": 0.89, "scratch": 0.79, "noise": 0.75}, False),  # better in one alone
        (DEFAULT, False),
    ],
)
def test_a_rival_must_win_most_families_and_the_worst(rival, is_chosen):
    assert choose({"default": DEFAULT, "rival": rival}, "default") == (
        "rival" if is_chosen else "default"
    )


def test_of_several_rivals_the_best_in_the_worst_family_is_chosen():
    strong = {"blob": 1.0, "scratch": 1.0, "noise": 0.72}
    even = {"blob": 0.91, "scratch": 0.81, "noise": 0.75}
    assert choose({0: DEFAULT, 1: strong, 2: even}, 0) == 2


def test_every_family_gets_every_size_and_opacity_before_any_comes_twice():
    images = [{"image": np.zeros((3, 16, 16), np.uint8), "position": 0}] * 3
    cases = family_cases(images, len(SIZES) * len(OPACITIES), seed=0)
    assert len(Counter((case.kind, case.size, case.opacity) for case in cases)) == len(cases)
    assert {case.kind for case in cases} == set(FAMILIES)
    assert len(FAMILIES) >= 4


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    project.change("model", name="gaussian")
    project.change("training", num_epochs="auto")
    project.repro("prepare@bolt", "prepare@nut")
    return project


def select(project: Project, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.select", *arguments]
    return subprocess.run(
        command, cwd=project.folder, env=environment(), capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_command_ranks_candidates_and_its_overrides_are_valid(project):
    done = select(project, "--models", "gaussian", "patchcore")
    assert done.returncode == 0, done.stderr
    assert (project.folder / "selection.png").stat().st_size > 10_000
    result = read_json(project.folder / "selection.json")
    assert list(result) == ["bolt", "nut"]
    block = {}
    for category, one in result.items():
        candidates = one["candidates"]
        assert candidates[0]["override"] == {}
        audit = read_json(project.folder / "metrics" / category / "audit.json")
        assert one["content"] == {x: audit["content"][x] for x in ("fit", "validation")}
        assert {x["model"] for x in candidates} == {"gaussian", "patchcore"}
        chosen = choose({i: x["areas"] for i, x in enumerate(candidates)}, 0)
        assert one["chosen"] == chosen
        if chosen:
            block[category] = candidates[chosen]["override"]
        assert f"{category}: AUROC in % of 96 defects of each family" in done.stdout
    printed = done.stdout.partition("for these categories:\n")[2].partition("Picture:")[0]
    assert (YAML(typ="safe").load(printed) or {}).get("overrides", {}) == block
    every = [x["override"] for one in result.values() for x in one["candidates"]]
    for override in every:  # each could have been chosen
        project.change("overrides", bolt=override)
        project.run(sys.executable, "-m", "stages.check")
    project.change("overrides", bolt={})


@pytest.mark.slow
def test_the_same_images_give_the_same_table_and_other_categories_are_kept(project):
    path = project.folder / "selection.json"
    path.write_text('{"nut": "as it was"}')
    runs = [select(project, "bolt", "--models", "gaussian").stdout for _ in range(2)]
    assert runs[0] == runs[1]
    assert "gaussian" in runs[0]
    assert read_json(path)["nut"] == "as it was"
    assert "candidates" in read_json(path)["bolt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["blot"], "CATEGORY must be one of data.categories, bolt, nut, got blot."),
        (["--models", "resnet"], f"invalid choice: 'resnet' (choose from {models.names()[0]!r}"),
    ],
)
def test_mistakes_are_one_line(project, arguments, message):
    done = select(project, *arguments)
    assert done.returncode
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_images_that_are_not_prepared_are_asked_for(project):
    project.change("data", categories=["bolt", "nut", "washer"])
    done = select(project, "washer")
    project.change("data", categories=["bolt", "nut"])
    assert done.returncode == 1
    assert "run `dvc repro prepare@washer`" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def row(model: str, area: float, auroc: float) -> dict:
    areas = {"blob": area, "noise": area}
    return {
        "model": model, "strides": [8], "top_fraction": 0.01, "areas": areas, "image_auroc": auroc
    }  # fmt: skip


def test_the_benchmark_counts_right_and_wrong_choices():
    results = {
        "right": [row("a", 0.5, 0.8), row("b", 0.6, 0.9)],
        "wrong": [row("a", 0.5, 0.9), row("b", 0.6, 0.84)],
        "alike": [row("a", 0.5, 0.9), row("b", 0.6, 0.901)],
    }
    results = json.loads(json.dumps(results))
    by_default = benchmark.by_default(results).splitlines()
    assert by_default[2] == "| `a` | 3 | 1 | 1 | 1 | +0.014 | -0.060 | 0.020 |"
    assert by_default[3] == "| `b` | 3 | 3 | 0 | 0 | +0.000 | +0.000 | 0.020 |"
    by_pair = benchmark.by_pair(results).splitlines()
    assert by_pair[2] == "| the worst family | 2 | 0 | 50% | 0.060 | 0.060 |"
