"""A detector at work: its verdicts go to a journal, with what they say of the line."""

import hashlib
import json
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from anomaly_detection.errors import DataError
from anomaly_detection.inference.detector import Detector, Prediction
from anomaly_detection.inference.files import row
from anomaly_detection.line.drift import LIMIT
from anomaly_detection.line.journal import Journal, Row
from anomaly_detection.line.monitor import LineMonitor


class Station:
    """Where pictures of one category are judged. Several threads may use it.

    Args:
        detector: Has passed its `check`.
        journal: Where verdicts and the state of drift go. Drift goes on where it stopped, unless
            the detector is another one.
        limit: As in `LineMonitor`.
        attempt: Runs what writes to the journal, and may run it again.

    Attributes:
        category: The detector's.
        fingerprint: Of the detector: 12 hexadecimal digits that another one does not have.
    """

    def __init__(
        self,
        detector: Detector,
        journal: Journal,
        limit: float = LIMIT,
        attempt: Callable[[Callable[[], Row]], Row] = lambda write: write(),
    ) -> None:
        self.detector, self.journal, self.attempt = detector, journal, attempt
        self.category = str(detector.provenance.get("category", ""))
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
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
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
            evidence, alarms = self.monitor.add(seen)
            values["evidence"] = {name: float(f"{x:.4g}") for name, x in evidence.items()}
            values["alarms"] = [alarm.text for alarm in alarms]
            return self.attempt(lambda: self._write(values, key, stamp, learned))

    def _write(
        self, values: Row, key: str, stamp: str, learned: dict[str, float] | None = None
    ) -> Row:
        with self.journal.transaction():
            self.journal.note_drift(self.fingerprint, self.monitor.state, learned)
            return self.journal.add(values, key, stamp)


def fingerprint_of(detector: Detector) -> str:
    """What tells a detector from others: a hash of what it compares with, and of its origin."""
    content: Any = [
        detector.threshold,
        detector.calibration_scores.tolist(),
        detector.parameters,
        detector.provenance,
    ]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
