"""The way back: pictures with an inspector's label become images of the data set."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from anomaly_detection.data.decode import content_hash, decode_image, read_file
from anomaly_detection.data.format import Format, common_format
from anomaly_detection.data.layouts import LAYOUTS, Layout, scan_category, table
from anomaly_detection.data.sample import NORMAL, SUFFIXES, Sample
from anomaly_detection.errors import DataError, UserError
from anomaly_detection.files import replacing

REQUIRED, OPTIONAL = ("path", "label"), ("defect_type", "verdict", "sha256")
UNNAMED = "anomalous"  # the type of a defect that has no other
FEWEST = 5  # normal images with a verdict, from which their choice can be judged


class Image(NamedTuple):
    """A picture that has a label.

    Attributes:
        source: Its file.
        kind: `NORMAL`, or the defect type.
        verdict: The detector's; may be empty.
        path: The file in the data set that has this content, or will have it.
        is_new: Whether the data set lacks it.
    """

    source: Path
    kind: str
    verdict: str
    path: Path
    is_new: bool


def planned(corrections: Path, folder: Path) -> list[Image]:
    """The labelled pictures, each content once, with their places in a category's folder.

    Args:
        corrections: A CSV file of `predict`, with a column `label` and maybe `defect_type`.
        folder: The category's.

    Raises:
        UserError: The folder cannot take images, or rows have faults: a line for each.
    """
    layout, samples, _ = scan_category(folder.parent, folder.name)
    _refuse_output_of_a_stage(folder)
    try:
        rows = list(table.read_rows(corrections, REQUIRED, OPTIONAL, others=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{corrections} must be a CSV file of `predict`: {error}") from None
    format = common_format([sample.path for sample in samples if sample.split == "train"])
    there = {content_hash(read_file(sample.path)): sample for sample in samples}
    images: dict[str, Image] = {}
    faults = []
    for line, row in rows:
        if not row["label"]:
            continue
        try:
            sha256, image = _labelled(row, folder, LAYOUTS[layout], there, format)
            other = images.setdefault(sha256, image)
            if other.kind != image.kind:
                raise ValueError(
                    f"{image.source} is {image.kind}, but the same picture is {other.kind} as "
                    f"{other.source}; correct one of them."
                )
        except (DataError, ValueError) as error:
            faults.append(f"{corrections}, line {line}: {error}")
    if faults:
        raise UserError("\n".join(faults))
    if not images:
        raise UserError(f"{corrections} must have a label in some row, but has none; fill it in.")
    return list(images.values())


def _labelled(
    row: table.Row, folder: Path, layout: Layout, there: Mapping[str, Sample], format: Format
) -> tuple[str, Image]:
    """The content's hash and the picture of a row.

    Raises:
        DataError, ValueError: It cannot be taken; the message says why.
    """
    kind, source = table.kind_of(row, UNNAMED), Path(row["path"])
    content = read_file(source)
    sha256 = content_hash(content)
    if row["sha256"] not in ("", sha256):
        raise ValueError(f"{source} must be the picture that was judged, but is another one now.")
    if sample := there.get(sha256):
        if sample.label != (kind != NORMAL):
            raise ValueError(
                f"{source} is {kind}, but the same picture is {sample.defect_type} in the data "
                f"set; correct the label, or remove {sample.path}."
            )
        return sha256, Image(source, kind, row["verdict"], sample.path, False)
    if source.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{source} must end with one of {', '.join(SUFFIXES)}; rename it.")
    format.converted(decode_image(content, source), source)
    name = f"{source.stem.lstrip('.')}-{sha256[:12]}{source.suffix}"
    return sha256, Image(source, kind, row["verdict"], layout.place(folder, kind) / name, True)


def _refuse_output_of_a_stage(folder: Path) -> None:
    """Raise a UserError if a stage writes the folder: DVC would delete what is added."""
    for parent in folder.resolve().parents:
        lock = parent / "dvc.lock"
        if not lock.is_file():
            continue
        from ruamel.yaml import YAML

        for name, stage in (YAML(typ="safe").load(lock).get("stages") or {}).items():
            for out in stage.get("outs", ()):
                if folder.resolve().is_relative_to(parent / out["path"]):
                    raise UserError(
                        f"{folder} must not be written by a stage, but {name!r} writes "
                        f"{out['path']}, and DVC would delete what is added; copy that to a folder "
                        "of your own, such as parts, and set data.root to it."
                    )


def add(images: Sequence[Image], folder: Path) -> None:
    """Copy the new ones into a category's folder, and name them in its table if it has one.

    Raises:
        UserError: A file cannot be written.
    """
    new = [image for image in images if image.is_new]
    try:
        for image in new:
            with replacing(image.path) as partial:
                shutil.copyfile(image.source, partial)
        if new and table.is_table(folder):
            table.append(folder, [_row(image, folder) for image in new])
    except OSError as error:
        raise UserError(
            f"{error.filename} must be readable or writable: {error.strerror}; run the same "
            "command again, which does what is left."
        ) from None


def _row(image: Image, folder: Path) -> table.Row:
    kind = "" if image.kind == NORMAL else image.kind
    name = image.path.relative_to(folder).as_posix()
    return {"path": name, "label": "anomalous" if kind else "normal", "defect_type": kind}


def described(images: Sequence[Image]) -> str:
    """What becomes of the images, and whether their choice is fair."""
    there = sum(not image.is_new for image in images)
    lines = [f"{counts(image for image in images if image.is_new)}; {there} were there before"]
    verdicts = [image.verdict for image in images if image.kind == NORMAL and image.verdict]
    rejected = verdicts.count("anomalous")
    if len(verdicts) >= FEWEST and rejected > len(verdicts) / 2:
        lines.append(
            f"{rejected} of {len(verdicts)} normal images had been rejected, so they are no random "
            "sample of good parts: calibrated with them, the threshold rises, fewer good parts are "
            "rejected than stated, and more defects are missed. Label accepted ones as well."
        )
    return "\n".join(lines)


def counts(images: Iterable[Image]) -> str:
    """How many images are for which use."""
    normal = Counter(image.kind == NORMAL for image in images)
    return (
        f"{normal.total()} inspected images: {normal[True]} normal to train, "
        f"{normal[False]} anomalous to test"
    )


def commit(images: Sequence[Image], folder: Path, corrections: Path) -> str:
    """Commit those of the images that HEAD lacks, and nothing else that git tracks.

    Returns:
        What was done, in words.

    Raises:
        UserError: git or DVC refuses.
    """
    base = folder.resolve()
    top = _output("git", "rev-parse", "--show-toplevel", at=base)
    root = Path(top.rstrip("\n")) if top else base
    paths = {base / image.path.relative_to(folder): image for image in images}
    trackers = {path: _dvc_file(path, root) for path in [*paths, base / table.NAME]}
    if not any(trackers.values()) and not _output("git", "ls-files", at=base):
        return (
            f"no commit, since neither git nor DVC tracks {folder}: `dvc add {folder}` and "
            "`git commit` keep a state of it"
        )
    committed = _committed(base, root, any(trackers.values()))
    new = [path for path in paths if path not in committed]
    if not new:
        return "nothing to commit: HEAD has them"
    message = f"{counts(paths[path] for path in new)}\n\nFrom {corrections.name}"
    if table.is_table(folder):
        new.append(base / table.NAME)
    for file in {file for path in new if (file := trackers[path])}:
        _run(sys.executable, "-m", "dvc", "add", "-q", "--", file.stem, at=file.parent)
    files = "\0".join({str(trackers[path] or path): None for path in new})
    for command in (["add"], ["commit", "-q", "-m", message]):
        options = ("--pathspec-from-file=-", "--pathspec-file-nul")
        _run("git", "--literal-pathspecs", *command, *options, at=base, text=files)
    return f"committed as {_head(base)}"


def next_steps() -> str:
    """What makes a detector of the new images, and compares it with the present one."""
    head = _head(Path())
    return "next: dvc repro" + (f", then python -m tools.compare {head}" if head else "")


def _committed(base: Path, root: Path, is_in_dvc: bool) -> set[Path]:
    """The files of a folder that HEAD has, in git or through DVC."""
    in_git = _output("git", "ls-tree", "-r", "-z", "--name-only", "HEAD", ".", at=base) or ""
    names = in_git.split("\0")
    if is_in_dvc:
        options = ("--rev", "HEAD", "-R", "--dvc-only", "--json")
        where = (".", str(base.relative_to(root)))
        listed = _output(sys.executable, "-m", "dvc", "ls", *options, *where, at=root)
        names += [entry["path"] for entry in json.loads(listed or "[]")]
    return {base / name for name in names}


def _dvc_file(path: Path, root: Path) -> Path | None:
    """The .dvc file of a folder above a path, if the repository has one."""
    folders = (folder for folder in path.parents if root in folder.parents)
    files = (folder.with_name(f"{folder.name}.dvc") for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _head(folder: Path) -> str:
    return (_output("git", "rev-parse", "--short", "HEAD", at=folder) or "").strip()


def _output(*command: str, at: Path) -> str | None:
    """What a command prints; None if it fails."""
    try:
        done = subprocess.run(command, cwd=at, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout)


def _run(*command: str, at: Path, text: str = "") -> None:
    """Run a command of git or DVC, which prints its own errors.

    Raises:
        UserError: It fails.
    """
    done = subprocess.run(command, cwd=at, input=os.fsencode(text), stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(
            "git and DVC must take the images, but one has refused, as it says above. They are "
            "copied; mend what it says, and the same command commits them."
        )
