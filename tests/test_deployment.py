"""docs/deployment.md, as a reader would follow it: its commands are run as they stand."""

import csv
import io
import json
import re

import pytest
from scratch import ROOT, Project

PAGE = (ROOT / "docs" / "deployment.md").read_text()
HERE = {  # what the page says, and what this test's data set has in its place
    "data/elpv/mono/test/good/cell0001.png": "parts/bolt/test/good/000.png",
    "data/elpv/mono": "parts/bolt",
    "mono": "bolt",
}


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)```", PAGE, re.M | re.S)
    for theirs, ours in HERE.items():
        found = [block.replace(theirs, ours) for block in found]
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    project.change("data", categories=["bolt"])
    project.change("model", name="patchcore")
    project.change("training", num_epochs="auto")
    project.change("export", formats=["onnx", "openvino"])
    project.repro()
    return project


@pytest.fixture(scope="module")
def expected(project) -> dict[str, str]:
    """The evaluation's verdicts of all test images, by file."""
    with (project.folder / "predictions" / "bolt" / "scores.csv").open() as file:
        return {
            f"parts/bolt/{row['path']}": ("normal", "anomalous")[int(row["pred_label"])]
            for row in csv.DictReader(file)
        }


@pytest.mark.slow
def test_the_commands_give_the_verdicts_of_the_evaluation(project, expected):
    """Also in an environment that has what the extra `runtime` has, and no PyTorch."""
    first, second, light, drift = blocks("bash")
    good = {name: x for name, x in expected.items() if "/good/" in name}
    rows = csv.DictReader(io.StringIO(project._run("bash", "-ec", first).stdout))
    assert {row["path"]: row["verdict"] for row in rows} == good

    project._run("bash", "-ec", second)
    lines = (project.folder / "verdicts.jsonl").read_text().splitlines()
    found = {row["path"]: row["verdict"] for row in map(json.loads, lines)}
    assert found == expected
    assert len(list((project.folder / "overlays").rglob("*.png"))) == len(expected)
    assert len(list((project.folder / "maps").rglob("*.npy"))) == len(expected)

    assert project._run("bash", "-ec", drift).stdout.startswith(f"{len(expected)} images, 0 alarms")
    assert (project.folder / "drift.png").is_file()

    done = project._run("bash", "-ec", light)
    rows = csv.DictReader(io.StringIO(done.stdout[done.stdout.index("path,") :]))
    assert {row["path"]: row["verdict"] for row in rows} == good
    without = "import importlib.util as u; assert u.find_spec('torch') is None"
    project._run("inspection/bin/python", "-c", without)
    refused = project._run(
        *(
            "inspection/bin/anomaly-detection",
            "predict",
            "--detector",
            "detectors/bolt.pt",
            "parts",
        ),
        ok=False,
    )
    assert "detectors/bolt.pt needs torch: pip install" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_python_example_runs(project, expected):
    (code,) = blocks("python")
    lines = project._run("python", "-c", code).stdout.splitlines()
    assert lines[0] == expected["parts/bolt/test/good/000.png"]
    assert len(lines) == 3
