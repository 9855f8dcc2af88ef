"""Judge many files, and write what was found: rows, overlays and maps."""

import csv
import glob
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from anomaly_detection.data.sample import SUFFIXES, picture_named
from anomaly_detection.errors import DataError, UserError
from anomaly_detection.files import replacing
from anomaly_detection.inference.detector import Detector, Prediction
from anomaly_detection.inference.overlay import overlay
from anomaly_detection.inference.statistics import Statistics
from anomaly_detection.progress import progress

COLUMNS = ("path", "score", "threshold", "verdict", "p_value", "error", *Statistics._fields)

Row = dict[str, Any]


class Judged(NamedTuple):
    """How many images were judged."""

    num_images: int
    num_anomalous: int
    num_errors: int


def find_images(arguments: Sequence[str], lines: Iterable[str]) -> Iterator[str]:
    """The images that a command line names, one after the other.

    Args:
        arguments: Files; folders, searched with all below them, in sorted order; patterns, where no
            file has that name; or `-`. What is not there is returned as it is.
        lines: What `-` stands for, a path in each.
    """
    for argument in arguments:
        if argument == "-":
            yield from filter(None, (line.rstrip("\r\n") for line in lines))
        elif Path(argument).is_dir():
            yield from images_below(Path(argument))
        elif glob.has_magic(argument) and not Path(argument).exists():
            yield from sorted(glob.iglob(argument, recursive=True)) or [argument]  # noqa: PTH207
        else:
            yield argument


def images_below(folder: Path) -> Iterator[str]:
    """The images in a folder and those below it, sorted."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from images_below(path)
        elif path.suffix.lower() in SUFFIXES:
            yield str(path)


def judge_files(
    detector: Detector,
    paths: Iterable[str],
    output: Path | None = None,
    *,
    format: str | None = None,
    overlays: Path | None = None,
    maps: Path | None = None,
    masks: Path | None = None,
    **options: Any,
) -> Judged:
    """Write a row for each file as soon as it is judged; memory does not grow with their number.

    Args:
        detector: What judges.
        paths: The files.
        output: Where to write the rows, which is whole or not there: until the end they are in
            `<output>.partial`. None: standard output.
        format: `csv` or `jsonl`; None: by the suffix of `output`.
        overlays: Folder for pictures with the anomalous pixels in red, if any.
        maps: Folder for anomaly maps, if any.
        masks: Folder with a mask for each file, found by its name (see `picture_named`), for a
            detector that needs them.
        **options: Of `Detector.predict_many`.

    Raises:
        UserError: A file cannot be written, or the model has no maps to write.
    """
    format = format or ("jsonl" if output and output.suffix == ".jsonl" else "csv")
    started, num_images, num_anomalous, num_errors = time.monotonic(), 0, 0, 0
    names, images = itertools.tee(paths)
    if masks:
        images, masked = itertools.tee(images)
        options["masks"] = (mask_of(path, masks) for path in masked)
    with growing(output) as file:
        write = {"csv": csv_rows, "jsonl": json_rows}[format](file)
        predictions = progress(detector.predict_many(images, **options), "predict", "images")
        for found, path in zip(predictions, names, strict=False):
            if isinstance(found, DataError):
                num_errors += 1
            else:
                if overlays or maps:
                    write_pictures(detector, path, found, overlays, maps)
                num_anomalous += found.verdict == "anomalous"
            write(row(path, found))
            num_images += 1
            file.flush()
    seconds = time.monotonic() - started
    print(
        f"{num_images} images, {num_anomalous} anomalous, {num_errors} not read, "
        f"in {seconds:.1f} s: {num_images / seconds:.1f} images/s",
        file=sys.stderr,
    )
    return Judged(num_images, num_anomalous, num_errors)


def mask_of(path: str, folder: Path) -> Path | DataError:
    """The mask of a file, or that it has none."""
    try:
        return picture_named(Path(path), folder)
    except DataError as error:
        return error


def row(path: str, found: Prediction | DataError) -> Row:
    """What is written of an image; scores with the digits that a float32 has."""
    values: Row = dict.fromkeys(COLUMNS) | {"path": path}
    if isinstance(found, DataError):
        return values | {"error": str(found)}
    score, threshold = (float(str(np.float32(x))) for x in found[:2])
    verdict: Row = {"score": score, "threshold": threshold}
    verdict |= {"verdict": found.verdict, "p_value": found.p_value}
    return values | verdict | found.statistics._asdict()


def csv_rows(file: TextIO) -> Callable[[Row], Any]:
    """Write the header; returns what writes a row."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    return writer.writerow


def json_rows(file: TextIO) -> Callable[[Row], Any]:
    """What writes a row as a line of JSON."""
    return lambda values: file.write(json.dumps(values, ensure_ascii=False) + "\n")


@contextmanager
def growing(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that gets its name when it is whole.

    Raises:
        UserError: It cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", newline="", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} must be writable: {error.strerror}.") from None
    try:
        with file:
            yield file
    except BaseException:
        print(f"{partial} has the rows so far.", file=sys.stderr)
        raise
    partial.replace(path)


def write_pictures(
    detector: Detector, path: str, prediction: Prediction, overlays: Path | None, maps: Path | None
) -> None:
    """Write an image's overlay and its map.

    Raises:
        UserError: The model gives no map, or a file cannot be written.
    """
    if prediction.anomaly_map is None:
        raise UserError(
            "--overlays and --maps need a model that gives anomaly maps; leave them out."
        )
    try:
        if overlays:
            seen = detector.seen(path)
            with replacing(under(overlays, path, ".png")) as partial:
                overlay(seen, prediction.anomaly_map, prediction.threshold).save(partial, "PNG")
        if maps:
            with replacing(under(maps, path, ".npy")) as partial, partial.open("wb") as file:
                np.save(file, prediction.anomaly_map)
    except OSError as error:
        raise UserError(f"{error.filename} must be writable: {error.strerror}.") from None


def under(folder: Path, path: str, suffix: str) -> Path:
    """A file's place in another folder, with its whole path, so that no two share one."""
    parts = [part for part in Path(path).parts if part not in (Path(path).anchor, "..")]
    return folder.joinpath(*parts[:-1], parts[-1] + suffix)
