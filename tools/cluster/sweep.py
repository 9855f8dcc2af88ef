"""Variants of a project with other parameters, each of which becomes an experiment."""

import contextlib
import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

from anomaly_detection.errors import UserError, one_line
from tools.cluster.driver import Cluster, reproduce
from tools.cluster.dvc import failure, settings, write_settings
from tools.cluster.runs import tracked_data, tracked_files
from tools.cluster.view import Project

EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/")


@dataclass(frozen=True)
class Variant:
    """A clone of a project with some parameters set.

    Attributes:
        name: The parameters, as NAME=VALUE.
        project: The clone.
        origin: The project's root.
    """

    name: str
    project: Project
    origin: Path

    def save(self) -> str:
        """Save the clone as an experiment of the origin, which deletes it; returns its name."""
        root = self.project.root
        done = self.project.dvc("exp", "save", "--force", capture_output=True)
        if reason := failure(done):
            raise UserError(f"{self.name} could not be saved: {reason}")
        refs = git(root, "for-each-ref", "--format=%(refname)").split()
        saved = [name for name in refs if EXPERIMENT.match(name)]
        git(self.origin, "fetch", "--quiet", str(root), *[f"+{name}:{name}" for name in saved])
        shutil.rmtree(root)
        return saved[-1].rsplit("/", 1)[1]


def experiments(project: Project, sweeps: list[str], cluster: Cluster) -> bool:
    """Make an experiment of each combination; returns whether all are complete."""
    all_variants = variants(project, sweeps)
    with contextlib.ExitStack() as held:
        for one in all_variants:
            held.enter_context(one.project.exclusively())
        complete = reproduce({one.name: one.project for one in all_variants}, cluster)
    for one in all_variants:
        if one.name in complete:
            print(f"{one.name}: experiment {one.save()}")
    return len(complete) == len(all_variants)


def variants(project: Project, sweeps: list[str]) -> list[Variant]:
    """A variant for each combination, in .work; those of an interrupted sweep are taken up again.

    Args:
        project: The project; like `dvc exp run`, a variant starts from what is in the workspace.
        sweeps: NAME=VALUE,VALUE... in Hydra's syntax, as `dvc exp run --set-param` takes it.

    Raises:
        UserError: One of them is not in that syntax, or names no parameter.
    """
    root = project.root
    if git(root, "rev-parse", "--verify", "--quiet", "HEAD", check=False) == "":
        raise UserError("Experiments start from a commit; make one: git commit.")
    try:
        combinations = [one["params.yaml"] for one in get_hydra_sweeps({"params.yaml": sweeps})]
        return [variant(project, overrides) for overrides in combinations]
    except DvcException as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(f"--sweep must be NAME=VALUE,VALUE..., got {sweeps}: {reason}") from None


def variant(project: Project, overrides: list[str]) -> Variant:
    """A clone with these overrides."""
    root = project.root
    names = tracked_files(root)
    digest = hashlib.sha256(repr((git(root, "rev-parse", "HEAD"), overrides)).encode())
    for name in names:
        digest.update(f"\0{name}\0".encode() + (root / name).read_bytes())
    clone = project.work / "sweep" / digest.hexdigest()[:16]
    if not (clone / "params.yaml").is_file():
        partial = clone.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        git(root, "clone", "--quiet", "--shared", "--no-checkout", str(root), str(partial))
        git(partial, "reset", "--quiet")
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, partial / name)
        own = settings(root)
        del own["core"]["no_scm"]
        write_settings(partial, own, "config.local")
        if images := tracked_data(project):
            Project(partial).dvc("checkout", "--quiet", *images, check=True)
        apply_overrides(str(partial / "params.yaml"), overrides)
        partial.rename(clone)
    return Variant(" ".join(overrides), Project(clone), root)


def git(at: Path, *arguments: str, check: bool = True) -> str:
    """What git prints.

    Raises:
        UserError: It fails.
    """
    done = subprocess.run(["git", *arguments], cwd=at, capture_output=True, text=True)
    if check and done.returncode:
        raise UserError(f"git {arguments[0]} has failed: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
