"""Judge what arrives in a folder, for months.

A picture is read, judged and written to the journal in one transaction, and only then moved and
told of; a process that starts again finds in the journal what its predecessor had done.
"""

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import NamedTuple

from anomaly_detection.data.decode import content_hash
from anomaly_detection.errors import DataError
from anomaly_detection.files import replacing
from anomaly_detection.inference.detector import Detector, Prediction
from anomaly_detection.inference.files import mask_of
from anomaly_detection.line.drift import LIMIT
from anomaly_detection.line.inbox import Arrival, Inbox, stamp_of
from anomaly_detection.line.journal import Journal, Row
from anomaly_detection.line.patience import PASSING, Stopped, patiently, reason, say
from anomaly_detection.line.sinks import Delivery, Sink
from anomaly_detection.line.station import Station

SECOND_CHANCE = 5.0  # seconds for which a damaged picture may be one that is still written
KEEP = 100_000  # entries of the journal whose files are gone
TIDY = 60.0  # seconds between two looks for older ones


class Read(NamedTuple):
    """A file that has arrived, and what is in it."""

    arrival: Arrival
    content: bytes


class Watch:
    """A folder, and where its verdicts go.

    Args:
        detector: Is `proven`.
        inbox: Where pictures arrive.
        journal: What has been judged.
        sinks: Where rows go.
        stop: Ends it.
        move: Where judged pictures go: below it `normal`, `anomalous`, and `unreadable`; None
            leaves them where they are.
        masks: Folder with a mask for each picture, for a detector that needs them.
        limit: As in `LineMonitor`.
    """

    def __init__(
        self,
        detector: Detector,
        inbox: Inbox,
        journal: Journal,
        sinks: Sequence[Sink],
        stop: threading.Event,
        *,
        move: Path | None = None,
        masks: Path | None = None,
        limit: float = LIMIT,
    ) -> None:
        self.inbox, self.journal, self.stop = inbox, journal, stop
        self.move, self.masks = move and move.absolute(), masks
        self.station = Station(detector, journal, limit, attempt=self._attempt)
        self.deliveries = [Delivery(sink, journal, stop) for sink in sinks]
        self.refused: set[Path] = set()  # files that cannot be opened, which was said
        self.num_judged = 0
        self.tidied = 0  # the last entry that was looked at

    def run(self) -> None:
        """Judge until `stop`; then deliver what waits."""
        for delivery in self.deliveries:
            delivery.start()
        next_tidy = 0.0
        try:
            for arrivals in self.inbox.arrivals(self.stop):
                self._judge(arrivals)
                if time.monotonic() >= next_tidy:
                    self._tidy()
                    next_tidy = time.monotonic() + TIDY
        except Stopped:
            pass
        finally:
            self.stop.set()
            for delivery in self.deliveries:
                delivery.join()
                if waiting := self.journal.num_waiting(delivery.sink.name):
                    say(f"{delivery.sink.name}: {waiting} verdicts wait until the next start")

    def _judge(self, arrivals: Sequence[Arrival]) -> None:
        """Judge pictures in their order, while later ones are decoded."""
        read, images = tee(self._read(arrivals))  # what nobody takes, tee would keep
        masks: Iterator[Path | DataError] | None = None
        if folder := self.masks:
            images, masked = tee(images)
            masks = (mask_of(str(one.arrival.path), folder) for one in masked)
        predictions = self.station.detector.predict_many(
            (one.content for one in images), masks=masks
        )
        for (arrival, content), found in zip(read, predictions, strict=False):
            if isinstance(found, DataError):
                if arrival.age < SECOND_CHANCE:
                    continue
                found = DataError(f"{arrival.path}: {str(found).removeprefix('image: ')}")
            self._record(arrival, content, found)

    def _read(self, arrivals: Iterable[Arrival]) -> Iterator[Read]:
        """The contents of files that have not been judged yet."""
        for arrival in arrivals:
            if self.stop.is_set():
                return
            if row := self.journal.row_of(self._key(arrival), arrival.stamp):
                self._finish(arrival, row)
                continue
            try:
                with arrival.path.open("rb") as file:
                    content = file.read()
                    is_same = stamp_of(os.fstat(file.fileno())) == arrival.stamp
                self.refused.discard(arrival.path)
                if is_same:  # otherwise it will come again
                    yield Read(arrival, content)
            except FileNotFoundError:  # somebody has taken it away
                continue
            except OSError as error:
                if arrival.path not in self.refused:
                    say(f"{arrival.path}: {reason(error)}; will try again until it can be read")
                    self.refused.add(arrival.path)

    def _record(self, arrival: Arrival, content: bytes, found: Prediction | DataError) -> None:
        sha256 = content_hash(content)
        path = self._place(arrival.path, sha256, found)
        row = self.station.record(found, str(path), sha256, self._key(arrival), arrival.stamp)
        self.num_judged += 1
        for text in row["alarms"]:
            say(f"alarm at {row['id']}: {text}")
        self._finish(arrival, row)

    def _place(self, path: Path, sha256: str, found: Prediction | DataError) -> Path:
        """Where a picture is after it was judged."""
        if self.move is None:
            return path
        kind = "unreadable" if isinstance(found, DataError) else found.verdict
        place = self.move / kind / path.relative_to(self.inbox.folder)
        return place.with_stem(f"{place.stem}-{sha256[:8]}") if place.exists() else place

    def _finish(self, arrival: Arrival, row: Row) -> None:
        """Move a picture to where its row says that it is."""
        place = Path(row["path"])
        if self.move and place != arrival.path:
            patiently(lambda: move(arrival.path, place), str(place), self.stop)
        self.inbox.finished(arrival)

    def _key(self, arrival: Arrival) -> str:
        """What a file is called in the journal, wherever the folder is mounted."""
        name = arrival.path.relative_to(self.inbox.folder).as_posix()
        return name.encode("utf-8", "backslashreplace").decode()

    def _attempt(self, write: Callable[[], Row]) -> Row:
        return patiently(write, "journal", self.stop)

    def _tidy(self) -> None:
        """Forget old entries that every sink has, and whose files are gone."""
        sinks = [delivery.sink.name for delivery in self.deliveries]
        with contextlib.suppress(*PASSING):
            old = self.journal.oldest(KEEP, sinks, self.tidied, 1000)
            self.tidied = old[-1][0] if old else 0
            gone = [number for number, key in old if not (self.inbox.folder / key).exists()]
            self.journal.forget(gone)


def move(source: Path, target: Path) -> None:
    """Move a file, also to another file system; at any time, one of the two is whole."""
    with contextlib.suppress(FileNotFoundError):  # it was moved, or taken away
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            source.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with replacing(target) as partial:
                shutil.copy2(source, partial)
            source.unlink()
