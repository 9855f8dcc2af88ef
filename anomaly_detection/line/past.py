"""Drift in verdicts of the past: the rows that `predict` has written."""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anomaly_detection.errors import UserError, one_line
from anomaly_detection.files import replacing
from anomaly_detection.inference.detector import Detector
from anomaly_detection.line.drift import CAUSES, DriftMonitor

MOST_POINTS = 20_000  # in a picture


class Past(NamedTuple):
    """What a monitor has said.

    Attributes:
        scores: In their order, (n,).
        evidence: After each of them, (n,).
        alarms: The image, from 1, and the direction of each.
    """

    scores: np.ndarray
    evidence: np.ndarray
    alarms: list[tuple[int, str]]


def scores_in(path: Path) -> Iterator[float]:
    """The scores in a CSV or JSON-lines file of `predict`, without images that could not be read.

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
                        yield float(row["score"])
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
    monitor = DriftMonitor(detector.calibration_scores, limit)
    scores, evidence, alarms = [], [], []
    for path in paths:
        for score in scores_in(path):
            found = monitor.add(score)
            scores.append(score)
            evidence.append(found.evidence)
            if found.is_alarm:
                alarms.append((len(scores), found.direction))
    return Past(np.array(scores), np.array(evidence), alarms)


def described(past: Past, limit: float) -> str:
    """What was found, in a few lines."""
    count = len(past.scores)
    lines = []
    for direction, same in groupby(past.alarms, key=lambda alarm: alarm[1]):
        first, *others = [image for image, _ in same]
        more = f", and again until {others[-1]}" if others else ""
        lines.append(f"image {first} of {count}{more}: {CAUSES[direction]}")
    chance = 100 * min(1.0, count / limit)
    lines.append(
        f"{count} images, {len(past.alarms)} alarms; without a change, the probability of any is "
        f"at most {chance:.2g}%"
    )
    return "\n".join(lines)


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
    below.plot(images, np.maximum(past.evidence, 1e-3), color="#D55E00")
    below.axhline(limit, color="black", linestyle="--", label=f"alarm at {limit:,.0f}")
    for i, (image, _) in enumerate(past.alarms):
        label = None if i else "alarm"
        above.axvline(image, color="#555555", linestyle=":", label=label)
    above.set(ylabel="Score")
    below.set(xlabel="Image", ylabel="Evidence of drift", yscale="log")
    for axes in (above, below):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"{path} must be writable: {error.strerror}.") from None
