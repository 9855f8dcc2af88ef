"""One project's part in a run on a cluster: what its jobs need, and what comes of them."""

import hashlib
import json
import os
import platform
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from anomaly_detection.data import elpv
from anomaly_detection.errors import UserError
from anomaly_detection.files import replacing
from stages import TIMES
from tools.cluster.dvc import failure, insist, settings_text
from tools.cluster.dvcfiles import cut_lock, cut_params, lock_text, parse_lock
from tools.cluster.view import Project, View
from tools.cluster.worker import Files, pack

NOT_IN_ARCHIVE = ("dvc.lock", "params.yaml", "metrics/")  # what a job gets of its category alone


ABSENT = ("deleted", "not in cache")  # what DVC says of outputs
EMPTY = lock_text({}).encode()
BASE = ".base"  # names the file that says from what a job has started


class RemoteError(UserError):
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
        self.settings = project.settings
        if "remote" not in self.settings["core"]:
            raise UserError(
                "A DVC remote that all nodes reach must be set; for a shared folder: dvc remote "
                "add --default store /path/to/folder."
            )
        self.data = tracked_data(project)
        self.variables = {"OMP_NUM_THREADS": str(cpus)}
        self.saved = project.work / "saves"
        self.bases: dict[str, bytes] = {}
        self.stopped = threading.Event()  # when the driver ends, nothing is tried again
        self.views: queue.LifoQueue[View] = queue.LifoQueue()
        for number in range(threads):
            self.views.put(View(project, number))

    def name_of(self, category: str) -> str:
        """The job's name."""
        return f"{self.name} {category}".strip()

    def first(self) -> bool:
        """Run the stages before those of the categories, and push; returns whether they succeed."""
        first = self.project.first
        with self.view() as view, view.showing(None):
            done = view.dvc("repro", "--single-item", *first)
            if done.returncode == 0:
                self.remote(view, "push", *first)
        if self.data:
            self.remote(self.project, "push", *self.data)
        return done.returncode == 0

    def prepare(self, category: str) -> dict[str, Any] | str | None:
        """A category's job; None if nothing is stale; why it cannot run, as a text."""
        project = self.project
        try:
            with self.view() as view, view.showing(category) as stages:
                done = view.dvc("status", "--json", *stages, capture_output=True)
                if reason := failure(done):
                    return reason
                status = json.loads(done.stdout)
                if not status:
                    shutil.rmtree(self.saved / category, ignore_errors=True)
                    return None
                gone = [name for name in status if not self._can_be_had(view, name, status[name])]
                known = cut_lock(project.lock, [name for name in stages if name not in gone])
                if known:
                    self.remote(view, "push", *known)
                params = cut_params(view.params, category)
        except RemoteError as error:
            return str(error)
        lock = cut_lock(project.lock, project.first) | known
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
        base = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest().encode()
        saved = self._saved(category)
        for path, content in saved.items():
            if saved.get(BASE) == base or path.startswith(".states/"):
                files[path] = content
        self.bases[category] = files[BASE] = base
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
        for path, content in {**files, BASE: self.bases[category]}.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_bytes(content)
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)

    def finish(self, category: str, result: dict[str, str]) -> str | None:
        """Bring what a job has made into the project; returns why the job has failed, if it has."""
        files, stages = self._saved(category), self.project.stages_of(category)
        made = cut_lock(parse_lock(files.get("dvc.lock", EMPTY).decode()), stages)
        if not result and len(made) < len(stages):
            return "its results were lost; run it again"
        if made:
            with self.view() as view, view.showing(category, made):
                try:
                    self.remote(view, "pull", "--force", *made)
                except RemoteError as error:
                    view.show(category)  # without what is not there
                    return str(error)
        for path, content in files.items():
            if PurePosixPath(path).parts[0] in ("metrics", TIMES.name):
                with replacing(self.project.root / path) as partial:
                    partial.write_bytes(content)
        if not result:
            shutil.rmtree(self.saved / category, ignore_errors=True)
        return result.get("failed")

    def last(self) -> bool:
        """Run the stages after those of the categories; returns whether that succeeded."""
        with self.view() as view:
            return view.reproduce(None, self.project.last)

    @contextmanager
    def view(self) -> Iterator[View]:
        """One of the views, for this thread alone."""
        view = self.views.get()
        try:
            yield view
        finally:
            self.views.put(view)

    def remote(self, where: View | Project, *arguments: str) -> None:
        """Push or pull, again and again if it fails.

        Raises:
            RemoteError: It has failed each time.
        """
        reason = insist(
            lambda: failure(where.dvc(*arguments, capture_output=True)),
            lambda delay, _: self.stopped.wait(delay),
        )
        if reason:
            raise RemoteError(reason)

    def _can_be_had(self, view: View, stage: str, changes: list[Any]) -> bool:
        """Whether a stage's old outputs are here, in the cache or in the remote."""
        outs = [x.get("changed outs", {}) for x in changes if isinstance(x, dict)]
        absent = [path for of in outs for path, state in of.items() if state in ABSENT]
        if any(path.startswith("metrics/") for path in absent):  # which DVC keeps nowhere else
            return False
        return not absent or not view.dvc("fetch", "-q", stage, capture_output=True).returncode

    def _saved(self, category: str) -> Files:
        folder = self.saved / category
        if not folder.exists():
            folder = self.saved / f".{category}.new"  # `save` was killed between its last steps
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
    return pack(root, [name for name in tracked_files(root) if not name.startswith(NOT_IN_ARCHIVE)])


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
