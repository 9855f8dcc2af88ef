"""docs/deployment.md, docs/line.md and deploy/: their commands are run as they stand."""

import ast
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builders.projects import ROOT, Workspace, copy_tracked, environment, wait_until
from builders.servers import pictures

PAGE, LINE = ((ROOT / "docs" / name).read_text() for name in ("deployment.md", "line.md"))
HERE = {  # what the page says, and what this test's data set has in its place
    "data/elpv/mono/test/good/cell0060.png": "parts/bolt/test/good/000.png",
    "data/elpv/mono": "parts/bolt",
    "mono": "bolt",
}
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def blocks(language: str, page: str, start: str = "") -> list[str]:
    """A page's blocks of code that begin so."""
    found = re.findall(rf"^```{language}\n(.*?)```", page, re.M | re.S)
    for theirs, ours in HERE.items():
        found = [block.replace(theirs, ours) for block in found]
    return [block for block in found if block.startswith(start)]


def line_block(start: str, language: str = "bash") -> str:
    (block,) = blocks(language, LINE, start)
    return block


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Workspace:
    project = Workspace(tmp_path_factory.mktemp("project"), "bolt")
    project.use_small_model("patchcore", num_epochs="auto")
    project.change("export", formats=["onnx", "openvino"])
    project.stages("prepare", "pretrain", "train", "evaluate", "export")
    return project


@pytest.fixture(scope="module")
def expected(project) -> dict[str, str]:
    """The evaluation's verdicts on all test images, by file."""
    return {
        f"parts/bolt/{row['path']}": ("normal", "anomalous")[int(row["pred_label"])]
        for row in project.rows("predictions/bolt/scores.csv")
    }


@pytest.fixture(scope="module")
def checkout(project, tmp_path_factory) -> Workspace:
    """The whole project, from which packages can be installed."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_tracked(folder)
    for name in ("parts", "detectors", "exports"):
        shutil.copytree(project.folder / name, folder / name)
    return Workspace.at(folder)


def verdicts_in(output: str) -> dict[str, str]:
    rows = csv.DictReader(io.StringIO(output[output.index("path,") :]))
    return {row["path"]: row["verdict"] for row in rows}


def of_good(expected: dict[str, str]) -> dict[str, str]:
    return {name: verdict for name, verdict in expected.items() if "/good/" in name}


def test_the_commands_give_the_verdicts_of_the_evaluation(project, expected):
    first, second, _, drift = blocks("bash", PAGE)
    assert verdicts_in(project.run("bash", "-ec", first).stdout) == of_good(expected)
    project.run("bash", "-ec", second)
    lines = (project.folder / "verdicts.jsonl").read_text().splitlines()
    assert {row["path"]: row["verdict"] for row in map(json.loads, lines)} == expected
    assert len(list((project.folder / "overlays").rglob("*.png"))) == len(expected)
    assert len(list((project.folder / "maps").rglob("*.npy"))) == len(expected)
    said = project.run("bash", "-ec", drift).stdout
    assert said.startswith(f"{len(expected)} images, 0 alarms")
    assert (project.folder / "drift.png").is_file()


def test_the_python_example_runs(project, expected):
    (code,) = blocks("python", PAGE)
    lines = project.python("-c", code).stdout.splitlines()
    assert lines[0] == expected["parts/bolt/test/good/000.png"]
    assert len(lines) == 3


@contextmanager
def running(project: Workspace, command: str) -> Iterator[Callable[[str], None]]:
    """Run a command until the block ends; yields what waits for a line with a text."""
    process = subprocess.Popen(
        ["bash", "-ec", f"exec {command}"],
        cwd=project.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def read_until(text: str) -> None:
        while text not in (line := process.stdout.readline()):
            assert line, text

    try:
        yield read_until
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_what_arrives_in_a_folder_is_judged(project, expected, tmp_path):
    inbox, verdicts = project.folder / "inbox", project.folder / "verdicts.jsonl"
    inbox.mkdir()
    verdicts.unlink(missing_ok=True)
    watching, telling = (x for x in blocks("bash", LINE) if "detection watch" in x)
    with running(project, watching) as read_until:
        read_until("watching inbox")
        for i, name in enumerate(expected):
            shutil.copy(project.folder / name, inbox / f"{i}.png")
        wait_until(lambda: verdicts.exists() and verdicts.read_text().count("\n") >= len(expected))
    found = [json.loads(line) for line in verdicts.read_text().splitlines()]
    wanted = dict(enumerate(expected.values()))
    assert {int(Path(row["path"]).stem): row["verdict"] for row in found} == wanted
    with running(project, telling) as read_until:
        read_until("watching inbox")


def test_what_is_sent_is_judged_and_a_label_comes_back_to_the_data_set(project, expected):
    with running(project, line_block("anomaly-detection serve")) as read_until:
        read_until("http://127.0.0.1:8000")
        sent = project.run("bash", "-ec", line_block("curl")).stdout
        first, second = map(json.loads, sent.replace("}{", "}\n{").splitlines())
        good = expected["parts/bolt/test/good/000.png"]
        assert (first["verdict"], second["verdict"], second["path"]) == (good, good, "7")
        client = line_block("import json", "python").replace("(256, 256)", "(64, 64)")
        answer = ast.literal_eval(project.python("-c", client).stdout)
        assert answer["score"] == pytest.approx(first["score"], rel=1e-4)
        assert answer["is_anomalous"] == (good == "anomalous")
        url = f"http://127.0.0.1:8000/verdicts/{first['id']}/label"
        label = '{"label": "anomalous", "defect_type": "scratch"}'
        project.run("curl", "-sSf", "-H", "Content-Type: application/json", "-d", label, url)
    corrections = ("line/corrections.csv", "--category", "parts/bolt", "--dry-run")
    planned = project.python("-m", "anomaly_detection", "feedback", *corrections, ok=False)
    assert "is scratch, but the same picture is good in the data set" in planned.stderr


def test_an_export_is_a_model_for_other_servers(project):
    project.run("bash", "-ec", line_block("mkdir -p models"))
    found = {x.name for x in (project.folder / "models/bolt/1").iterdir()}
    assert found == {"model.xml", "model.bin"}


def assert_has_none_of(checkout: Workspace, *packages: str) -> None:
    for name in packages:
        code = f"import importlib.util as u; assert u.find_spec({name!r}) is None"
        checkout.run("inspection/bin/python", "-c", code)


@pytest.mark.exhaustive
def test_predict_needs_no_pytorch(checkout, expected):
    _, _, light, _ = blocks("bash", PAGE)
    assert verdicts_in(checkout.run("bash", "-ec", light).stdout) == of_good(expected)
    assert_has_none_of(checkout, "torch")
    command = ("inspection/bin/anomaly-detection", "predict", "--detector", "detectors/bolt.pt")
    refused = checkout.run(*command, "parts", ok=False)
    assert "detectors/bolt.pt needs torch: pip install" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.exhaustive
def test_the_line_needs_no_pytorch(checkout):
    shutil.rmtree(checkout.folder / "inspection", ignore_errors=True)
    checkout.run("bash", "-ec", line_block("python3 -m venv inspection"))
    assert_has_none_of(checkout, "torch", "dvc", "pandas")
    (checkout.folder / "inbox").mkdir()
    for command, said in (
        ("watch inbox --out v.jsonl", "watching inbox"),
        ("serve --port 0", "http://127.0.0.1:"),
    ):
        program = f"inspection/bin/anomaly-detection {command} --detector exports/bolt"
        with running(checkout, program) as read_until:
            read_until(said)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_the_unit(unit, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    text = unit.read_text().replace("/opt/anomaly-detection/bin/anomaly-detection", "/bin/true")
    (tmp_path / unit.name).write_text(re.sub("^User=.*\n", "", text, flags=re.M))
    command = ["systemd-analyze", "verify", tmp_path / unit.name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_watching_unit_s_command_judges_what_arrives(export, tmp_path):
    shutil.copytree(export, tmp_path / "srv/detectors/part")
    (tmp_path / "srv/pictures").mkdir()
    text = (DEPLOY / "watch.service").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^ExecStart=\S+ (.*)$", text, re.M)
    arguments = re.sub(r"(?<= )/(srv|var)", rf"{tmp_path}/\1", command).split()
    process = subprocess.Popen([sys.executable, "-m", "anomaly_detection", *arguments])
    try:
        (tmp_path / "srv/pictures/0.png").write_bytes(pictures(1)[0])
        out = tmp_path / "var/lib/anomaly-detection/verdicts.jsonl"
        wait_until(lambda: out.exists() and out.read_text())
        wait_until(lambda: list((tmp_path / "srv/pictures/judged").rglob("0.png")))
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_hadolint_accepts_the_container_file():
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("needs hadolint")
    done = subprocess.run([program, DEPLOY / "Containerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.exhaustive
def test_the_container_s_commands_make_an_environment_that_serves(export, tmp_path):
    """But for apt-get and useradd: what is copied is enough, and its options are right."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    for names, target in re.findall(r"^COPY ((?!--).*) (\S+)$", text, re.M):
        for name in names.split():
            source, place = ROOT / name, Path(f"{tmp_path}{target}")
            if source.is_dir():
                shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
    (build,) = [x for x in re.findall(r"^RUN (.*)$", text, re.M) if "venv /opt" in x]
    build = build.replace("/opt", f"{tmp_path}/opt").replace("/source", f"{tmp_path}/source")
    variables = {name: x for name, x in environment().items() if name != "PYTHONPATH"}
    subprocess.run(build, shell=True, check=True, env=variables, capture_output=True)
    (entry,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', text, re.M)
    (arguments,) = re.findall(r"^CMD \[(.*)\]$", text, re.M)
    shutil.copytree(export, tmp_path / "detectors/part")
    (tmp_path / "run/secrets").mkdir(parents=True)
    (tmp_path / "run/secrets/token").write_text("secret\n")
    program = [entry, *(x.strip('" ') for x in arguments.split(","))]
    command = " ".join(re.sub("^/", f"{tmp_path}/", x) for x in program)
    with running(Workspace.at(tmp_path), f"{command} --port 0") as read_until:
        read_until("http://0.0.0.0:")
    assert (tmp_path / "store").is_dir()
