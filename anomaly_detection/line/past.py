"""Drift in verdicts of the past: the rows that `predict` or `watch` has written."""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anomaly_detection.errors import UserError, one_line
from anomaly_detection.files import replacing
from anomaly_detection.inference.detector import Detector
from anomaly_detection.inference.statistics import Statistics
from anomaly_detection.line.monitor import SCORE, Alarm, LineMonitor

MOST_POINTS = 20_000  # in a picture
COLOURS = {
    SCORE: "#D55E00",
    "brightness": "#0072B2",
    "contrast": "#009E73",
    "sharpness": "#CC79A7",
}


class Past(NamedTuple):
    """What a monitor has said.

    Attributes:
        scores: In their order, (n,).
        evidence: After each of them, (n,), by quantity.
        alarms: Each with its image, from 1.
    """

    scores: np.ndarray
    evidence: dict[str, np.ndarray]
    alarms: list[tuple[int, Alarm]]


def values_in(path: Path) -> Iterator[dict[str, float]]:
    """The scores in a CSV or JSON-lines file of `predict`, without images that could not be read.

    Yields:
        `score`, and the `Statistics` that the row has.

    Raises:
        UserError: It cannot be read, or is no such file; the message names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            is_json = path.suffix == ".jsonl"
            rows = map(json.loads, file) if is_json else csv.DictReader(file)
            for number, row in enumerate(rows, 1 if is_json else 2):
                try:
                    if row["score"] not in (None, ""):
                        names = (SCORE, *Statistics._fields)
                        yield {x: float(row[x]) for x in names if row.get(x) not in (None, "")}
                except (KeyError, TypeError, ValueError):
                    raise UserError(
                        f"{path}, line {number}: must be a row of `predict`, with a score."
                    ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} must be a CSV or .jsonl file of `predict`, but cannot be read "
            f"({one_line(error)})."
        ) from None


def watched(detector: Detector, paths: Sequence[Path], limit: float) -> Past:
    """What a monitor would have said of the files' images, one file after the other."""
    monitor = LineMonitor(detector, limit)
    scores: list[float] = []
    evidence: dict[str, list[float]] = {name: [] for name in monitor.monitors}
    alarms = []
    for values in chain.from_iterable(map(values_in, paths)):
        found, new = monitor.add(values)
        scores.append(values[SCORE])
        for name, known in evidence.items():
            known.append(found.get(name, np.nan))
        alarms += [(len(scores), alarm) for alarm in new]
    return Past(np.array(scores), {name: np.array(x) for name, x in evidence.items()}, alarms)


def described(past: Past, limit: float) -> str:
    """What was found, in a few lines."""
    count = len(past.scores)
    lines = []
    alarms = sorted(past.alarms, key=lambda one: (one[1].quantity, one[1].direction, one[0]))
    for _, same in groupby(alarms, key=lambda one: one[1][:2]):
        (first, alarm), *others = same
        more = f", and again until {others[-1][0]}" if others else ""
        lines.append((first, f"image {first} of {count}{more}: {alarm.text}"))
    watched = [name for name, values in past.evidence.items() if not np.isnan(values).all()]
    chance = 100 * min(1.0, len(watched) * count / limit)
    total = (
        f"{count} images, {len(past.alarms)} alarms; without a change in {', '.join(watched)}, the "
        f"probability of any is at most {chance:.2g}%"
    )
    return "\n".join([*(text for _, text in sorted(lines)), total])


def draw(past: Past, detector: Detector, limit: float, path: Path) -> None:
    """Write a picture of the scores and the evidence.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--picture needs matplotlib: pip install matplotlib.") from None
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    images = np.arange(1, len(past.scores) + 1)
    shown = slice(None, None, max(1, len(images) // MOST_POINTS))
    above.plot(images[shown], past.scores[shown], ".", color="#0072B2", markersize=3)
    above.axhline(detector.threshold, color="black", linestyle="--", label="threshold")
    for name, values in past.evidence.items():
        if not np.isnan(values).all():
            below.plot(images, np.maximum(values, 1e-3), color=COLOURS[name], label=name)
    below.axhline(limit, color="black", linestyle="--", label=f"alarm at {limit:,.0f}")
    for i, (image, _) in enumerate(past.alarms):
        label = None if i else "alarm"
        above.axvline(image, color="#555555", linestyle=":", label=label)
    above.set(ylabel="Score")
    below.set(xlabel="Image", ylabel="Evidence of drift", yscale="log")
    for axes in (above, below):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"{path} must be writable: {error.strerror}.") from None
