"""deploy/: the units' and the container's commands, run outside of systemd and of a container."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders.detectors import write_export
from builders.projects import ROOT, wait_until
from test_watch import write

DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def command_of(unit: Path) -> str:
    (command,) = re.findall(r"^ExecStart=((?:.*\\\n)*.*)$", unit.read_text(), re.M)
    return command.replace("\\\n", " ")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_the_unit(unit, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    text = unit.read_text().replace("/opt/anomaly-detection/bin/anomaly-detection", "/bin/true")
    (tmp_path / unit.name).write_text(re.sub("^User=.*\n", "", text, flags=re.M))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / unit.name], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_watching_unit_s_command_judges_what_arrives(tmp_path):
    write_export(tmp_path / "srv/detectors/part")
    (tmp_path / "srv/pictures").mkdir()
    command = command_of(DEPLOY / "watch.service")
    command = command.replace(
        "/opt/anomaly-detection/bin/anomaly-detection", "python -m anomaly_detection"
    )
    command = re.sub(r"(?<= )/(srv|var)", rf"{tmp_path}/\1", command)
    program = command.replace("python", sys.executable, 1).split()
    process = subprocess.Popen(program)
    try:
        write(tmp_path / "srv/pictures/0.png", 0)
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


def test_the_container_s_commands_make_an_environment_that_serves(tmp_path):
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
    environment = {name: x for name, x in os.environ.items() if not name.startswith("COV")}
    environment.pop("PYTHONPATH", None)
    subprocess.run(build, shell=True, check=True, env=environment, capture_output=True)
    (entry,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', text, re.M)
    (arguments,) = re.findall(r"^CMD \[(.*)\]$", text, re.M)
    write_export(tmp_path / "detectors/part")
    (tmp_path / "run/secrets").mkdir(parents=True)
    (tmp_path / "run/secrets/token").write_text("secret\n")
    program = [f"{tmp_path}{entry}", *(x.strip('" ') for x in arguments.split(","))]
    program = [f"{tmp_path}{x}" if x.startswith(("/detectors", "/run")) else x for x in program]
    process = subprocess.Popen(
        [*program, "--port", "0"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "http://0.0.0.0:" in process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 0
        assert (tmp_path / "store").is_dir()
    finally:
        process.kill()
