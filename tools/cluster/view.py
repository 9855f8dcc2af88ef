"""A view of the project in which one category is all there is: DVC works in it as fast as for one.

A view is a folder in .work with links to everything in the project, and with a params.yaml and a
dvc.lock of its own. Stages that run in it read and write the project's own files.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from anomaly_detection.config import load_config
from anomaly_detection.errors import UserError
from anomaly_detection.files import write_text
from stages import LEASE, TIMES
from tools.cluster.dvc import COMMAND, Settings, environment, settings, write_settings
from tools.cluster.dvcfiles import Lock, cut_lock, cut_params, read_lock, read_yaml, write_lock

OUTPUTS = ("outs", "metrics", "plots")


class Project:
    """A project's folder, and the categories and stages that are in its files."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.work = self.root / ".work" / "repro"
        self.finished = self.work / "finished"  # entries for dvc.lock that are not in it yet
        self.lease = self.work / f"lease.{os.getpid()}"  # stages end with the process that holds it
        self.lock: Lock = {}

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Lock the project against a second run; take over, and leave, all that has finished.

        Raises:
            UserError: Another run holds it.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.work / "lock", timeout=0), FileLock(self.lease):
                self.merge()
                try:
                    yield
                finally:
                    self.merge()
        except Timeout:
            rule = "must have one run at a time; wait for the other"
            raise UserError(f"{self.root} {rule}.") from None
        finally:
            self.lease.unlink(missing_ok=True)

    @property
    def categories(self) -> list[str]:
        """The categories.

        Raises:
            ConfigError: params.yaml is not valid.
        """
        return load_config(self.root / "params.yaml").data.categories

    @property
    def params(self) -> dict[str, Any]:
        """All parameters."""
        return read_yaml(self.root / "params.yaml")

    @property
    def steps(self) -> list[str]:
        """The names of the stages that each category has, in order."""
        return [name for name, stage in self.pipeline.items() if "matrix" in stage]

    @property
    def first(self) -> list[str]:
        """The names of the stages before those of the categories, in order."""
        steps = self.steps
        return list(takewhile(lambda name: name not in steps, self.pipeline))

    @property
    def last(self) -> list[str]:
        """The names of the stages after those of the categories, in order."""
        others = (*self.first, *self.steps)
        return [name for name in self.pipeline if name not in others]

    @cached_property
    def pipeline(self) -> dict[str, Any]:
        """The stages of dvc.yaml by their names, in order."""
        return read_yaml(self.root / "dvc.yaml")["stages"]

    @cached_property
    def settings(self) -> Settings:
        """Of DVC, for folders that are in no git."""
        return settings(self.root)

    @property
    def outputs(self) -> dict[str, list[str]]:
        """The paths of each stage's outputs."""
        listed = {
            name: [out for kind in OUTPUTS for out in stage.get(kind, [])]
            for name, stage in self.pipeline.items()
        }
        return {
            name: [next(iter(out)) if isinstance(out, dict) else out for out in outs]
            for name, outs in listed.items()
        }

    @property
    def output_folders(self) -> set[str]:
        """The folders in the project that stages write to."""
        paths = [path for paths in self.outputs.values() for path in paths]
        return {path.split("/")[0] for path in paths} | {TIMES.name}

    def stages_of(self, category: str) -> list[str]:
        """The names of a category's stages, in order."""
        return [f"{step}@{category}" for step in self.steps]

    def dvc(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run DVC in the project itself."""
        command = [*COMMAND, *arguments]
        return subprocess.run(command, cwd=self.root, env=environment(), text=True, **options)

    def keep(self, lock: Lock) -> None:
        """Keep entries of finished stages until `merge`, through whatever happens."""
        if any(self.lock.get(name) != entry for name, entry in lock.items()):
            write_lock(self.finished / f"{next(iter(lock))}.lock", lock)
            self.lock |= lock

    def merge(self) -> None:
        """Bring what has finished into dvc.lock, and that of views that were killed."""
        left, kept = self.work.glob("views/*/dvc.lock"), self.finished.glob("*.lock")
        self.lock = read_lock(self.root / "dvc.lock")
        files = [*sorted(left), *sorted(kept)]
        for file in files:
            self.lock |= self._whole_entries(file)
        if files:
            write_lock(self.root / "dvc.lock", self.lock)
        for file in files:
            file.unlink()

    def _whole_entries(self, path: Path) -> Lock:
        """The entries that are complete: DVC may have been killed while it wrote the file."""
        try:
            lock = read_lock(path)
        except UserError:
            return {}
        outputs = {name: len(outs) for name, outs in self.outputs.items()}
        return {
            stage: entry
            for stage, entry in lock.items()
            if entry.endswith("\n")
            and entry.partition("\n    outs:\n")[2].count("\n      md5: ")
            == outputs.get(stage.partition("@")[0])
        }


class View:
    """One category of a project, or what all categories share, as a project of its own.

    Args:
        project: The project.
        number: Views that are open at the same time have different ones.
    """

    def __init__(self, project: Project, number: int = 0) -> None:
        self.project = project
        self.folder = project.work / "views" / str(number)
        self.params = project.params
        self._build()

    @contextmanager
    def showing(
        self, category: str | None, also: Mapping[str, str] | None = None
    ) -> Iterator[list[str]]:
        """`show`, and at the end let the project keep the entries of what was shown."""
        stages = self.show(category, also)
        try:
            yield stages
        finally:
            self.project.keep(read_lock(self.folder / "dvc.lock"))
            (self.folder / "dvc.lock").unlink(missing_ok=True)

    def show(self, category: str | None, also: Mapping[str, str] | None = None) -> list[str]:
        """Show a category, or what all share; returns its stages, in order.

        Args:
            category: The category; None for the stages that belong to none.
            also: Entries newer than those in the project's dvc.lock.
        """
        if category is None:
            stages = [*self.project.first, *self.project.last]
            text = (self.project.root / "params.yaml").read_text(encoding="utf-8")
        else:
            stages = self.project.stages_of(category)
            text = cut_params(self.params, category)
        write_text(self.folder / "params.yaml", text)
        lock = cut_lock(self.project.lock, stages) | dict(also or {})
        write_lock(self.folder / "dvc.lock", lock)
        return stages

    def reproduce(self, category: str | None, stages: Sequence[str]) -> bool:
        """Run what is stale of these stages of a category, or of all; whether it succeeds."""
        with self.showing(category):
            return self.dvc("repro", "--single-item", *stages).returncode == 0

    def dvc(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run DVC in the view; stages that ask git for the project's state are told where it is."""
        variables = {
            "ANOMALY_DETECTION_ROOT": str(self.project.root),
            LEASE: str(self.project.lease),
        }
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.folder,
            env=environment() | variables,
            text=True,
            **options,
        )

    def _build(self) -> None:
        root = self.project.root
        (self.folder / ".dvc").mkdir(parents=True, exist_ok=True)
        write_settings(self.folder, self.project.settings)
        for old in filter(Path.is_symlink, self.folder.iterdir()):
            old.unlink()
        for name in self.project.output_folders:
            (root / name).mkdir(exist_ok=True)
        for path in root.iterdir():
            if path.name not in (".git", ".dvc", "dvc.lock", "params.yaml"):
                (self.folder / path.name).symlink_to(path)
        for key in ("root", "auxiliary"):
            path = Path(self.params["data"][key])
            if path.is_absolute() and path.is_relative_to(root):  # DVC would write it as relative
                raise UserError(
                    f"params.yaml: data.{key} must be relative for a folder in the project, "
                    f"{path.relative_to(root)}, got {str(path)!r}."
                )
            if path.parts[:1] == ("..",):
                above = [part for part in path.parts if part == ".."]
                start = Path(*path.parts[: len(above) + 1])
                link = self.folder / start
                if len(above) > 2:  # views/ and repro/, which are ours
                    raise UserError(
                        f"params.yaml: data.{key} must be an absolute path, or not as far above "
                        f"the project, got {str(path)!r}."
                    )
                link.unlink(missing_ok=True)
                link.symlink_to((root / start).resolve())
