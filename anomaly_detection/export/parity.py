"""Whether every way to judge an image gives the verdict of the evaluation."""

import time
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_detection.data.overview import overview_of_map
from anomaly_detection.errors import DataError, UserError
from anomaly_detection.export.formats import FORMATS
from anomaly_detection.inference.detector import Detector
from anomaly_detection.progress import progress

TIMED = 100  # images, at most, whose latency is measured
NAMED = 10  # images, at most, that an error names


class ParityError(UserError):
    """A format gives other verdicts than the evaluation."""


def measure_parity(
    detectors: Mapping[str, Detector],
    paths: Sequence[Path],
    scores: np.ndarray,
    verdicts: np.ndarray,
    maps: np.ndarray | None,
    masks: Sequence[Path] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Judge files with each detector, and compare with what the evaluation found in the arrays.

    Args:
        detectors: By the format's name.
        paths: N image files.
        scores: The evaluation's, (N,).
        verdicts: The evaluation's, (N,), 0 or 1.
        maps: The evaluation's, (N, S, S), or None; of tiled images, as by `overview_of_map`.
        masks: The images' masks, for detectors that need them.

    Returns:
        How far the nearest score is from the threshold, and for each format the largest differences
        of scores and maps and the files whose verdict changes. Then each format's speed, which
        differs by run: milliseconds from a file to its verdict, one by one, and files per second in
        a stream.

    Raises:
        DataError: A file cannot be read.
    """
    threshold = next(iter(detectors.values())).threshold
    found, speeds = {}, {}  # by format
    for name, detector in detectors.items():
        started = time.perf_counter()
        found[name] = differences(name, detector, paths, scores, verdicts, maps, masks)
        rate = len(paths) / (time.perf_counter() - started)
        speeds[name] = {"images_per_second": round(rate, 1)}
    for name, milliseconds in latencies(detectors, paths[:TIMED], masks).items():
        p50, p99 = np.quantile(milliseconds, [0.5, 0.99])
        speeds[name] |= {"p50": round(float(p50), 2), "p99": round(float(p99), 2)}
    parity = {
        "num_images": len(paths),
        "threshold": threshold,
        "nearest_score": float(np.abs(scores - np.float32(threshold)).min()),
        "formats": found,
    }
    return parity, speeds


def differences(
    name: str,
    detector: Detector,
    paths: Sequence[Path],
    scores: np.ndarray,
    verdicts: np.ndarray,
    maps: np.ndarray | None,
    masks: Sequence[Path] | None = None,
) -> dict[str, Any]:
    """What `measure_parity` returns for a format, but for its speed."""
    of_scores, of_maps, changed = 0.0, 0.0, []
    predictions = detector.predict_many(paths, masks=masks)
    for i, prediction in enumerate(progress(predictions, name, "images", len(paths))):
        if isinstance(prediction, DataError):
            raise prediction
        of_scores = max(of_scores, abs(prediction.score - float(scores[i])))
        if maps is not None and prediction.anomaly_map is not None:
            found = prediction.anomaly_map
            found = overview_of_map(found) if detector.frame.tile_size else found
            of_maps = max(of_maps, float(np.abs(found - maps[i]).max()))
        if (prediction.verdict == "anomalous") != bool(verdicts[i]):
            changed.append(str(paths[i]))
    return {
        "largest_score_difference": of_scores,
        "largest_map_difference": None if maps is None else of_maps,
        "num_verdicts_changed": len(changed),
        "verdicts_changed": changed,
    }


def latencies(
    detectors: Mapping[str, Detector], paths: Sequence[Path], masks: Sequence[Path] | None = None
) -> dict[str, list[float]]:
    """Milliseconds from each file to its verdict; the detectors take turns."""
    taken: dict[str, list[float]] = {name: [] for name in detectors}
    pairs = zip(paths, masks or repeat(None), strict=False)
    for path, mask in progress(pairs, "latency", "images", len(paths)):
        for name, detector in detectors.items():
            started = time.perf_counter()
            detector.predict(path, mask)
            taken[name].append(1000 * (time.perf_counter() - started))
    return taken


def refuse_changes(parity: dict[str, Any], allowed: int) -> None:
    """Refuse formats that change verdicts; one that computes in other ways may change a few.

    Raises:
        ParityError: One changes more than it may. The message lists the images.
    """
    faults = []
    for name, found in parity["formats"].items():
        is_exact = name not in FORMATS or FORMATS[name].is_exact
        limit = 0 if is_exact else allowed
        if found["num_verdicts_changed"] > limit:
            named = ", ".join(found["verdicts_changed"][:NAMED])
            more = found["num_verdicts_changed"] - NAMED
            fix = (
                "set evaluation.threshold_method to manual, with a threshold farther from these "
                "scores"
                if is_exact
                else "leave it out of export.formats, or raise export.allow_changed_verdicts"
            )
            faults.append(
                f"{name}: verdicts must be those of the evaluation for all but {limit} of "
                f"{parity['num_images']} images, but {found['num_verdicts_changed']} are not: "
                f"{named}{f' and {more} more' if more > 0 else ''}; {fix}."
            )
    if faults:
        raise ParityError("\n".join(faults))


def close_calls(parity: dict[str, Any]) -> list[str]:
    """The exact formats whose scores differ by more than the threshold is from the nearest one."""
    return [
        name
        for name, found in parity["formats"].items()
        if (name not in FORMATS or FORMATS[name].is_exact)
        and found["largest_score_difference"] >= parity["nearest_score"]
    ]
