"""docs/deployment.md and line.md, as a reader would follow them: commands run as they stand."""

import ast
import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from builders.projects import ROOT, Project, environment, wait_until

PAGE, LINE = ((ROOT / "docs" / name).read_text() for name in ("deployment.md", "line.md"))
HERE = {  # what the page says, and what this test's data set has in its place
    "data/elpv/mono/test/good/cell0060.png": "parts/bolt/test/good/000.png",
    "data/elpv/mono": "parts/bolt",
    "mono": "bolt",
}


def blocks(language: str, page: str = PAGE) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)```", page, re.M | re.S)
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


@pytest.mark.exhaustive
def test_the_commands_give_the_verdicts_of_the_evaluation(project, expected):
    """Also in an environment that has what the extra `runtime` has, and no PyTorch."""
    first, second, light, drift = blocks("bash")
    good = {name: x for name, x in expected.items() if "/good/" in name}
    rows = csv.DictReader(io.StringIO(project.run("bash", "-ec", first).stdout))
    assert {row["path"]: row["verdict"] for row in rows} == good

    project.run("bash", "-ec", second)
    lines = (project.folder / "verdicts.jsonl").read_text().splitlines()
    found = {row["path"]: row["verdict"] for row in map(json.loads, lines)}
    assert found == expected
    assert len(list((project.folder / "overlays").rglob("*.png"))) == len(expected)
    assert len(list((project.folder / "maps").rglob("*.npy"))) == len(expected)

    assert project.run("bash", "-ec", drift).stdout.startswith(f"{len(expected)} images, 0 alarms")
    assert (project.folder / "drift.png").is_file()

    done = project.run("bash", "-ec", light)
    rows = csv.DictReader(io.StringIO(done.stdout[done.stdout.index("path,") :]))
    assert {row["path"]: row["verdict"] for row in rows} == good
    without = "import importlib.util as u; assert u.find_spec('torch') is None"
    project.run("inspection/bin/python", "-c", without)
    refused = project.run(
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


@pytest.mark.exhaustive
def test_the_python_example_runs(project, expected):
    (code,) = blocks("python")
    lines = project.run("python", "-c", code).stdout.splitlines()
    assert lines[0] == expected["parts/bolt/test/good/000.png"]
    assert len(lines) == 3


# --- docs/line.md


class Running:
    """A command of a page that runs until it is told to stop."""

    def __init__(self, project: Project, command: str) -> None:
        self.process = subprocess.Popen(
            ["bash", "-ec", f"exec {command}"],
            cwd=project.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            assert self.process.wait(30) == 0
        finally:
            self.process.kill()

    def read_until(self, text: str) -> None:
        while text not in (line := self.process.stdout.readline()):
            assert line, text


def line_block(start: str, language: str = "bash") -> str:
    (block,) = (x for x in blocks(language, LINE) if x.startswith(start))
    return block


@pytest.mark.exhaustive
def test_the_line_s_commands_judge_what_arrives_and_what_is_sent(project, expected):
    folder = project.folder
    (folder / "inbox").mkdir()
    verdicts = folder / "verdicts.jsonl"
    verdicts.unlink(missing_ok=True)
    watching, telling = (x for x in blocks("bash", LINE) if "detection watch" in x)
    with Running(project, watching) as watch:
        watch.read_until("watching inbox")
        for i, name in enumerate(expected):
            shutil.copy(folder / name, folder / "inbox" / f"{i}.png")
        wait_until(lambda: verdicts.exists() and len(verdicts.read_text().splitlines()) >= 12)
    found = [json.loads(line) for line in verdicts.read_text().splitlines()]
    wanted = dict(enumerate(expected.values()))
    assert {int(Path(row["path"]).stem): row["verdict"] for row in found} == wanted
    with Running(project, telling) as watch:
        watch.read_until("watching inbox")

    with Running(project, line_block("anomaly-detection serve")) as server:
        server.read_until("http://127.0.0.1:8000")
        sent = project.run("bash", "-ec", line_block("curl")).stdout
        first, second = (
            json.JSONDecoder().raw_decode(sent)[0],
            json.loads(sent[sent.index("}{") + 1 :]),
        )
        good = expected["parts/bolt/test/good/000.png"]
        assert (first["verdict"], second["verdict"], second["path"]) == (good, good, "7")
        client = line_block("import json", "python").replace("(256, 256)", "(64, 64)")
        answer = ast.literal_eval(project.run("python", "-c", client).stdout)
        assert answer["score"] == pytest.approx(first["score"], rel=1e-4)
        assert answer["is_anomalous"] == (good == "anomalous")

        url = f"http://127.0.0.1:8000/verdicts/{first['id']}/label"
        label = '{"label": "anomalous", "defect_type": "scratch"}'
        project.run("curl", "-sSf", "-H", "Content-Type: application/json", "-d", label, url)
    corrections = ("line/corrections.csv", "--category", "parts/bolt", "--dry-run")
    planned = project.run("python", "-m", "anomaly_detection", "feedback", *corrections, ok=False)
    assert "is scratch, but the same picture is good in the data set" in planned.stderr

    project.run("bash", "-ec", line_block("mkdir -p models"))
    assert {x.name for x in (folder / "models/bolt/1").iterdir()} == {"model.xml", "model.bin"}


@pytest.mark.exhaustive
def test_the_line_needs_no_pytorch(project):
    project.run("rm", "-rf", "inspection")
    project.run("bash", "-ec", line_block("python3 -m venv inspection"))
    for name in ("torch", "dvc", "pandas"):
        without = f"import importlib.util as u; assert u.find_spec({name!r}) is None"
        project.run("inspection/bin/python", "-c", without)
    for command in ("watch inbox --out v.jsonl", "serve --port 0"):
        program = f"inspection/bin/anomaly-detection {command} --detector exports/bolt"
        (project.folder / "inbox").mkdir(exist_ok=True)
        with Running(project, program) as started:
            started.read_until("inbox" if "watch" in command else "http://127.0.0.1:")
