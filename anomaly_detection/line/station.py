"""A detector at work: its verdicts go to a journal, with what they say of the line."""

import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from anomaly_detection.errors import DataError
from anomaly_detection.files import fingerprint
from anomaly_detection.inference.detector import Detector, Prediction
from anomaly_detection.inference.files import row
from anomaly_detection.inference.runtimes import DetectorError
from anomaly_detection.line.drift import LIMIT
from anomaly_detection.line.journal import Journal, Row
from anomaly_detection.line.monitor import Alarm, LineMonitor


class Station:
    """Where pictures of one category are judged. Several threads may use it.

    Args:
        detector: Is `proven`.
        journal: Where verdicts and the state of drift go. Drift goes on where it stopped, unless
            the detector is another one.
        limit: As in `LineMonitor`.
        attempt: Runs what writes to the journal, and may run it again.

    Attributes:
        category: The detector's.
        fingerprint: Of the detector: 16 hexadecimal digits that another one does not have.
    """

    def __init__(
        self,
        detector: Detector,
        journal: Journal,
        limit: float = LIMIT,
        attempt: Callable[[Callable[[], Row]], Row] = lambda write: write(),
    ) -> None:
        self.detector, self.journal, self.attempt = detector, journal, attempt
        self.category = category_of(detector)
        self.fingerprint = fingerprint_of(detector)
        self.monitor = LineMonitor(detector, limit)
        self.lock = threading.Lock()
        if known := journal.drift_of(self.fingerprint):
            self.monitor.restore(*known)

    def record(
        self,
        found: Prediction | DataError,
        path: str,
        sha256: str,
        key: str = "",
        stamp: str = "",
    ) -> Row:
        """Write an image's row to the journal, all or nothing.

        Args:
            found: What the detector has said of it.
            path: Its file, or how it is called.
            sha256: Its content's.
            key: What the journal calls the file.
            stamp: As in `Journal.add`.

        Returns:
            The row: that of `predict`, with `id`, `time` (UTC, ISO 8601), `category`, `detector`
            (its fingerprint), `sha256`, `evidence` of drift by quantity, and texts of new `alarms`.
        """
        values: Row = {
            "time": now(),
            "category": self.category,
            "detector": self.fingerprint,
            **row(path, found),
            "sha256": sha256,
            "evidence": {},
            "alarms": [],
        }
        with self.lock:
            if isinstance(found, DataError):
                return self.attempt(lambda: self._write(values, key, stamp))
            seen = {"score": values["score"], **found.statistics._asdict()}
            learned = seen if self.monitor.is_learning else None
            evidence, alarms = self._watch(seen)
            values["evidence"] = {name: float(f"{x:.4g}") for name, x in evidence.items()}
            values["alarms"] = [alarm.text for alarm in alarms]
            return self.attempt(lambda: self._write(values, key, stamp, learned))

    def _watch(self, seen: dict[str, float]) -> tuple[dict[str, float], list[Alarm]]:
        """What the monitor says of an image."""
        return self.monitor.add(seen)

    def _write(
        self, values: Row, key: str, stamp: str, learned: dict[str, float] | None = None
    ) -> Row:
        with self.journal.transaction():
            self.journal.note_drift(self.fingerprint, self.monitor.state, learned)
            return self.journal.add(values, key, stamp)


def proven(path: Path, device: str = "cpu", num_streams: int = 1) -> Detector:
    """A detector that has given its own test picture the recorded score here.

    Args:
        path: As in `Detector.load`.
        device: As there.
        num_streams: As there.

    Raises:
        DetectorError: It cannot be loaded, or gives another score.
    """
    detector = Detector.load(path, device, num_streams)
    try:
        detector.check()
    except DetectorError as error:
        raise DetectorError(f"{path}: {error}") from None
    return detector


def category_of(detector: Detector) -> str:
    """The category that a detector was made for."""
    return str(detector.provenance.get("category", ""))


def fingerprint_of(detector: Detector) -> str:
    """What tells a detector from others: a hash of what it compares with, and of its origin."""
    scores = detector.calibration_scores.tolist()
    content = [detector.threshold, scores, detector.parameters, detector.provenance]
    return fingerprint(content, [])


def now() -> str:
    """The time: UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
