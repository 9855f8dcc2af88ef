"""The detectors that serve, each exchanged for a new one when its files are replaced."""

import re
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_detection.errors import UserError, one_line
from anomaly_detection.inference.detector import Detector
from anomaly_detection.inference.runtimes import DESCRIPTION
from anomaly_detection.line.journal import Journal, Row
from anomaly_detection.line.monitor import Alarm
from anomaly_detection.line.serving.metrics import Metrics
from anomaly_detection.line.station import Station, category_of, fingerprint_of, now

NAME = r"^\w[\w .-]*$"  # of a category: it is in URLs and a folder's name


class ServingStation(Station):
    """A station whose verdicts are given even if the journal cannot be written."""

    def __init__(self, detector: Detector, journal: Journal, limit: float, metrics: Metrics):
        super().__init__(detector, journal, limit)
        self.metrics = metrics

    def _watch(self, seen: dict[str, float]) -> tuple[dict[str, float], list[Alarm]]:
        evidence, alarms = super()._watch(seen)
        self.metrics.drifted(self.category, evidence, alarms)
        return evidence, alarms

    def _write(self, values: Row, *where: Any) -> Row:
        try:
            row = super()._write(values, *where)
        except sqlite3.Error as error:
            self.metrics.fails(
                "journal", f"The journal cannot be written ({one_line(error)}); verdicts go on."
            )
            return {"id": None, **values}
        self.metrics.works("journal")
        return row


class Current(NamedTuple):
    """A detector at work, with what records its verdicts."""

    detector: Detector
    station: Station
    loaded_at: str

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.detector.parameters.get("model", {}).get("name", ""))


class Served:
    """A category's detector.

    Args:
        path: Its file or folder.
        load: Reads a detector there, and proves it.
        station: For a detector.

    Attributes:
        current: The detector and its station, exchanged at once.
        reload_error: Why the last new one was refused; None if it was not.

    Raises:
        UserError: It cannot be loaded, or is not proven.
    """

    def __init__(
        self,
        path: Path,
        load: Callable[[Path], Detector],
        station: Callable[[Detector], Station],
    ) -> None:
        self.path, self.load, self.station = path, load, station
        self.stamp = self.seen = stamp_of(path)
        detector = load(path)
        self.category = category_of(detector)
        if not re.fullmatch(NAME, self.category):
            raise UserError(
                f"{path} must be a detector of a category, got {self.category!r} for its name; "
                "make it again with `dvc repro`."
            )
        self.current = Current(detector, station(detector), now())
        self.reload_error: str | None = None

    def refresh(self) -> bool | None:
        """Load the detector again if its files have changed and are at rest.

        Returns:
            Whether the new one serves now; None if there is none.
        """
        seen, self.seen = self.seen, stamp_of(self.path)
        if self.seen in (self.stamp, None) or self.seen != seen:
            return None
        self.stamp = self.seen
        try:
            detector = self.load(self.path)
            if category_of(detector) != self.category:
                raise UserError(
                    f"{self.path} must stay a detector of {self.category}, got one of "
                    f"{category_of(detector)!r}; start the server again for that."
                )
            station = self.current.station
            if fingerprint_of(detector) != station.fingerprint:
                station = self.station(detector)
        except Exception as error:  # damaged files can raise anything
            self.reload_error = one_line(error)
            return False
        self.current = Current(detector, station, now())
        self.reload_error = None
        return True


def by_category(served: Iterable[Served]) -> dict[str, Served]:
    """Detectors by their category.

    Raises:
        UserError: Two are of the same.
    """
    found: dict[str, Served] = {}
    for one in served:
        if other := found.get(one.category):
            raise UserError(
                f"--detector must name one detector for each category, got {other.path} and "
                f"{one.path} for {one.category}; leave one out."
            )
        found[one.category] = one
    return found


def stamp_of(path: Path) -> list[tuple[Any, ...]] | None:
    """What changes when a detector's files do; None while they are not there."""
    try:
        is_file = path.suffix == ".pt"
        folder = path if path.is_dir() else path.parent
        files = [path] if is_file else sorted(folder.glob(Path(DESCRIPTION).stem + "*"))
        stats = [(file.name, file.stat()) for file in files]
    except OSError:
        return None
    return [(name, x.st_ino, x.st_size, x.st_mtime_ns) for name, x in stats] or None
