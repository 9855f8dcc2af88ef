"""A scratch copy of the project with a small data set, in which the real `dvc` runs."""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from builders.images import write_category

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params.yaml"
ABSENT = object()

MARKUP = "<img src=x onerror=alert(1)>"  # may be in a file's name
ALL = ["check", "fetch", "report"]
EVERY_CATEGORY = ("prepare", "pretrain", "train", "evaluate", "export", "plot")


def environment(measured: bool = False) -> dict[str, str]:
    """That of a shell in which the environment is active.

    Measuring the coverage of a process takes a third of its time, so it is done once for each line.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = os.environ | {"PATH": path, "PYTHONPATH": ""}
    return {name: value for name, value in variables.items() if measured or "COVERAGE" not in name}


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
        for kind, name in (("test", "000.png"), ("ground_truth", "000_mask.png")):
            path = folder / "parts" / "bolt" / kind / "bright" / name
            path.rename(path.with_name(name.replace("000", MARKUP)))
        self.change("data", root="parts", categories=["bolt", "nut"], image_size=64)
        self.change("training", num_epochs=2, batch_size=8)
        self.change("evaluation", false_reject_rate=0.25, synthetic_images=1)
        self.change("export", formats=[])
        self.change("plots", gallery_size=2)
        (folder / ".gitignore").open("a").write("/parts\n")
        self.git("init", "-q")
        self.git("config", "user.email", "someone@example.com")
        self.git("config", "user.name", "Someone")
        self.commit("start")

    def _run(
        self, *command: str, at: Path | None = None, ok: bool = True, measured: bool = False
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command,
            cwd=at or self.folder,
            env=environment(measured),
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done

    def start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(command, cwd=self.folder, env=environment())

    def git(self, *arguments: str) -> None:
        self._run("git", *arguments)

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", message, "--allow-empty")

    def dvc(self, *arguments: str, **options: bool) -> str:
        done = self._run("dvc", *arguments, **options)
        return done.stdout + done.stderr

    def repro(self, *arguments: str, **options: bool) -> list[str]:
        """Run `dvc repro`; returns the stages that ran, sorted."""
        output = self.dvc("repro", *arguments, **options)
        return sorted(re.findall(r"Running stage '(.*)'", output))

    def change(self, section: str, **values) -> None:
        yaml = YAML()
        params = yaml.load(self.folder / "params.yaml")
        params.setdefault(section, {}).update(values)
        yaml.dump(params, self.folder / "params.yaml")

    def digests(self, *folders: str) -> dict[str, str]:
        return {
            path.relative_to(self.folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
            for folder in folders
            for path in sorted((self.folder / folder).rglob("*"))
            if path.is_file()
        }


RESULTS = ("checkpoints", "predictions", "metrics", "plots")


def stages(once: list[str], of_category: tuple[str, ...], categories: list[str]) -> list[str]:
    return sorted(once + [f"{stage}@{name}" for stage in of_category for name in categories])


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def wait_until(condition, seconds: int = 60) -> None:
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


@cache
def _parameters() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(PARAMS.read_text(encoding="utf-8"))


def parameters() -> dict[str, Any]:
    """The values of the project's params.yaml."""
    return copy.deepcopy(_parameters())


def write_params(changes: dict[str, Any], path: str | Path = "params.yaml") -> None:
    """The project's params.yaml with values changed, or ABSENT, by their dotted paths."""
    values = parameters()
    for name, value in changes.items():
        *parents, key = name.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is ABSENT:
            del section[key]
        else:
            section[key] = value
    YAML(typ="safe").dump(values, Path(path))
