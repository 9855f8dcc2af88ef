"""Folders in which the pipeline runs, on a small data set: stage by stage, or by the real `dvc`."""

import contextlib
import copy
import csv
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from typing_extensions import Self

from builders.images import write_category

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params.yaml"
ABSENT = object()

MARKUP = "<img src=x onerror=alert(1)>"  # may be in a file's name
ALL = ["check", "fetch", "report"]
EVERY_CATEGORY = ("prepare", "pretrain", "train", "evaluate", "export", "plot")
RESULTS = ("checkpoints", "predictions", "metrics", "plots")


def environment(measured: bool = False, **variables: str) -> dict[str, str]:
    """That of a shell in which the environment is active.

    Measuring the coverage of a process takes a third of its time, so it is done once for each line.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = os.environ | {"PATH": path, "PYTHONPATH": ""} | variables
    return {name: value for name, value in found.items() if measured or "COVERAGE" not in name}


class Workspace:
    """The code and params.yaml, with small images and parameters; the stages run in this process.

    Args:
        folder: Made, with the categories in `parts`.
        categories: Their names; `nut` has no masks.
    """

    def __init__(self, folder: Path, *categories: str) -> None:
        self.folder = folder
        self._copy_code()
        for category in categories:
            write_category(folder / "parts" / category, masks=category != "nut")
        self.change("data", root="parts", categories=list(categories), image_size=64)
        self.change("training", batch_size=8)
        self.change("evaluation", false_reject_rate=0.25, synthetic_images=1)
        self.change("export", formats=[])
        self.change("plots", gallery_size=2)

    def _copy_code(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "params.yaml", self.folder)
        for package in ("anomaly_detection", "stages"):
            (self.folder / package).symlink_to(ROOT / package)

    def copy(self, folder: Path) -> Self:
        """A copy with all results, in another folder."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return self.at(folder)

    @classmethod
    def at(cls, folder: Path) -> Self:
        """The one that a folder has already."""
        made = object.__new__(cls)
        made.folder = folder
        return made

    def change(self, section: str, **values) -> None:
        """Set parameters of a section of params.yaml."""
        yaml = YAML()
        params = yaml.load(self.folder / "params.yaml")
        params.setdefault(section, {}).update(values)
        yaml.dump(params, self.folder / "params.yaml")

    def use_small_model(self, name: str, **training) -> None:
        """Fit a model of random features in float32; STFPM without early stopping."""
        self.change("model", name=name, backbone="test_resnet", weights="random")
        patience = {"early_stopping_patience": None} if name == "stfpm" else {}
        self.change("training", **{"precision": "float32"} | patience | training)
        self.change("hardware", device="cpu")

    def stage(self, name: str, *category: str) -> None:
        """Run a stage in this process."""
        with in_folder(self.folder):
            importlib.import_module(f"stages.{name}").main(*category)

    def stages(self, *names: str, category: str = "bolt") -> None:
        """Run stages of a category, one after the other, after a check of the parameters."""
        self.stage("check")
        for name in names:
            self.stage(name, category)

    def python(self, *arguments: str, ok: bool = True, **variables: str):
        """Run Python in the folder; returns the process when it has ended."""
        options = {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"} | variables
        return self.run(sys.executable, *arguments, ok=ok, **options)

    def run(
        self, *command: str, ok: bool = True, measured: bool = False, **variables: str
    ) -> subprocess.CompletedProcess:
        """Run a command in the folder, and check that it succeeds, or that it does not."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment(measured, **variables),
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done

    def start(self, *command: str, **variables: str) -> subprocess.Popen:
        """Start a command in the folder."""
        return subprocess.Popen(command, cwd=self.folder, env=environment(**variables))

    def json(self, path: str) -> dict:
        return read_json(self.folder / path)

    def rows(self, path: str) -> list[dict[str, str]]:
        return read_rows(self.folder / path)

    def digests(self, *folders: str) -> dict[str, str]:
        """The hash of each file in some folders."""
        return {
            path.relative_to(self.folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
            for folder in folders
            for path in sorted((self.folder / folder).rglob("*"))
            if path.is_file()
        }


class Project(Workspace):
    """A copy of the project, with git and the real `dvc`; of three categories, it takes two."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "bolt", "nut", "washer")
        for kind, name in (("test", "000.png"), ("ground_truth", "000_mask.png")):
            path = folder / "parts" / "bolt" / kind / "bright" / name
            path.rename(path.with_name(name.replace("000", MARKUP)))
        self.change("data", categories=["bolt", "nut"])
        self.change("training", num_epochs=2)
        (folder / ".gitignore").open("a").write("/parts\n")
        self.git("init", "-q")
        self.git("config", "user.email", "someone@example.com")
        self.git("config", "user.name", "Someone")
        self.commit("start")

    def _copy_code(self) -> None:
        copy_tracked(self.folder)

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments).stdout

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", message, "--allow-empty")

    def dvc(self, *arguments: str, **options: bool) -> str:
        """Run `dvc`; returns what it says."""
        done = self.run("dvc", *arguments, **options)
        return done.stdout + done.stderr

    def repro(self, *arguments: str, **options: bool) -> list[str]:
        """Run `dvc repro`; returns the stages that ran, sorted."""
        return ran(self.dvc("repro", *arguments, **options))


def ran(output: str) -> list[str]:
    """The stages that ran, by what DVC has printed, sorted."""
    return sorted(re.findall(r"Running stage '(.*)'", output))


def stages(once: list[str], of_category: tuple[str, ...], categories: list[str]) -> list[str]:
    """The names of stages, sorted, as `ran` gives them."""
    return sorted(once + [f"{stage}@{name}" for stage in of_category for name in categories])


def copy_tracked(folder: Path) -> None:
    """Copy the project's files, without its results, to another folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("metrics/", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Work in a folder meanwhile."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def wait_until(condition: Callable[[], object], seconds: int = 60) -> None:
    """Wait for a condition, which is looked at every 20 ms."""
    for _ in range(50 * seconds):
        if condition():
            return
        time.sleep(0.02)
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
