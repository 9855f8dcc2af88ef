"""One project's part in a run on a cluster: what its jobs need, and what comes of them."""

import hashlib
import json
import os
import platform
import queue
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from anomaly_detection.data import elpv
from anomaly_detection.errors import UserError
from anomaly_detection.files import replacing
from stages import TIMES
from tools.cluster.dvc import COMMAND, environment, settings, settings_text
from tools.cluster.dvcfiles import cut_lock, cut_params, lock_text, parse_lock
from tools.cluster.view import FIRST, LAST, Project, View
from tools.cluster.worker import Files, pack

DELAYS = (1, 2, 4, 8, 16)  # seconds between attempts at the remote
OWN = ("dvc.lock", "params.yaml", "metrics/")  # what a job gets of its category alone


class RemoteError(Exception):
    """The DVC remote has failed again and again."""


class Run:
    """A project whose categories run as jobs.

    Args:
        project: The project.
        threads: Of the driver: as many views can be open at the same time.
        cpus: Threads of each job.
        save_every: Seconds between a job's saves.
        name: Stands before the categories' names; empty for the workspace itself.

    Raises:
        UserError: There is no DVC remote, or the data cannot be had on other machines.
    """

    def __init__(
        self, project: Project, threads: int, cpus: int, save_every: float, name: str = ""
    ) -> None:
        self.project, self.name, self.save_every = project, name, save_every
        self.categories = project.categories
        self.settings = settings(project.root)
        if "remote" not in self.settings["core"]:
            raise UserError(
                "A DVC remote that all nodes reach must be set; for a shared folder: dvc remote "
                "add --default store /path/to/folder."
            )
        self.data = tracked_data(project)
        self.variables = {"OMP_NUM_THREADS": str(cpus)}
        self.saved = project.work / "saves"
        self.views: queue.LifoQueue[View] = queue.LifoQueue()
        for number in range(threads):
            self.views.put(View(project, number))

    def name_of(self, category: str) -> str:
        """The job's name."""
        return f"{self.name} {category}".strip()

    def first(self) -> bool:
        """Run the stages before those of the categories, and push; returns whether they succeed."""
        with self.view() as view:
            view.open(None)
            done = view.dvc("repro", "--single-item", *FIRST)
            if done.returncode == 0:
                self.remote(view, "push", *FIRST)
            view.close()
        if self.data:
            command = [*COMMAND, "push", "--quiet", *self.data]
            subprocess.run(command, cwd=self.project.root, env=environment(), check=False)
        return done.returncode == 0

    def prepare(self, category: str) -> dict[str, Any] | str | None:
        """A category's job; None if nothing is stale; why it cannot run, as a text."""
        project = self.project
        with self.view() as view:
            stages = view.open(category)
            done = view.dvc("status", "--json", *stages, capture_output=True)
            try:
                if done.returncode:
                    return done.stderr.strip()
                if not json.loads(done.stdout):
                    return None
                if known := list(cut_lock(project.lock, stages)):
                    self.remote(view, "push", *known)
            except RemoteError as error:
                return str(error)
            finally:
                view.close()
            lock = cut_lock(project.lock, [*FIRST, *stages])
            params = cut_params(view.params, category)
        root = project.root
        own = [path.relative_to(root) for path in (root / "metrics" / category).glob("*.json")]
        config = settings_text({name: x for name, x in self.settings.items() if name != "cache"})
        files = {
            "dvc.lock": lock_text(lock).encode(),
            "params.yaml": params.encode(),
            ".dvc/config": config.encode(),
            ".states/.dvc/config": config.encode(),
            **{path.as_posix(): (root / path).read_bytes() for path in own},
        }
        folder = hashlib.sha256(f"{platform.node()}{root}{category}".encode()).hexdigest()[:16]
        return {
            "folder": folder,
            "files": files,
            "stages": stages,
            "save_every": self.save_every,
            "variables": self.variables,
        }

    def save(self, category: str, files: Files) -> None:
        """Keep what a job has saved, for a driver that takes over."""
        new, old = self.saved / f".{category}.new", self.saved / category
        shutil.rmtree(new, ignore_errors=True)
        for path, content in files.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_bytes(content)
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)

    def saves(self) -> dict[str, Files]:
        """What is kept, by job."""
        return {self.name_of(category): self._saved(category) for category in self.categories}

    def finish(self, category: str, result: dict[str, str]) -> str | None:
        """Bring what a job has made into the project; returns why the job has failed, if it has."""
        files = self._saved(category)
        for path, content in files.items():
            if PurePosixPath(path).parts[0] in ("metrics", TIMES.name):
                with replacing(self.project.root / path) as partial:
                    partial.write_bytes(content)
        if "dvc.lock" in files:
            stages = self.project.stages_of(category)
            made = cut_lock(parse_lock(files["dvc.lock"].decode()), stages)
            with self.view() as view:
                view.open(category, made)
                try:
                    self.remote(view, "pull", "--force", *made)
                except RemoteError as error:
                    view.open(category)  # without what is not there
                    return str(error)
                finally:
                    view.close()
        if not result:
            shutil.rmtree(self.saved / category, ignore_errors=True)
        return result.get("failed")

    def last(self) -> bool:
        """Run the stages after those of the categories; returns whether that succeeded."""
        with self.view() as view:
            view.open(None)
            done = view.dvc("repro", "--single-item", *LAST)
            view.close()
        return done.returncode == 0

    @contextmanager
    def view(self) -> Iterator[View]:
        """One of the views, for this thread alone."""
        view = self.views.get()
        try:
            yield view
        finally:
            self.views.put(view)

    def remote(self, view: View, *arguments: str) -> None:
        """Push or pull, again and again if it fails.

        Raises:
            RemoteError: It has failed each time.
        """
        for delay in (*DELAYS, None):
            done = view.dvc(*arguments, "--quiet", capture_output=True)
            if done.returncode == 0:
                return
            if delay is None:
                raise RemoteError(done.stderr.strip() or f"dvc {arguments[0]} has failed")
            time.sleep(delay)

    def _saved(self, category: str) -> Files:
        folder = self.saved / category
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tracked_files(root: Path) -> list[str]:
    """The files that git tracks or would.

    Raises:
        UserError: This is no git repository.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=root, capture_output=True)
    if done.returncode:
        raise UserError(f"{root} must be a git repository; make it one: git init.")
    names = os.fsdecode(done.stdout).split("\0")
    return sorted({name for name in names if name and (root / name).is_file()})


def archive(root: Path) -> bytes:
    """The files that every job gets."""
    return pack(root, [name for name in tracked_files(root) if not name.startswith(OWN)])


def tracked_data(project: Project) -> list[str]:
    """The .dvc files of the data that jobs pull; none if git or the nodes themselves have it.

    Raises:
        UserError: A relative folder is in neither git nor DVC.
    """
    names = [PurePosixPath(name) for name in tracked_files(project.root)]
    needed: list[str] = []
    pointers = [name for name in names if name.suffix == ".dvc"]
    for key in ("root", "auxiliary"):
        folder = PurePosixPath(project.params["data"][key])
        if folder.is_absolute() or str(folder) in (elpv.ROOT, elpv.PHOTOGRAPHS):
            continue
        own = [name for name in pointers if _overlap(name.with_suffix(""), folder)]
        if not own and not any(name.is_relative_to(folder) for name in names):
            raise UserError(
                f"params.yaml: data.{key} must be in git, in DVC or an absolute path that every "
                f"node sees, got {str(folder)!r}; for the second: dvc add {folder}."
            )
        needed += map(str, own)
    return needed


def _overlap(one: PurePosixPath, other: PurePosixPath) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)
