"""The pictures that arrive in a folder."""

import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from watchfiles import watch

from anomaly_detection.data.sample import SUFFIXES, is_ignored
from anomaly_detection.line.patience import Stopped, patiently, reason, say

TICK = 0.25  # seconds between two looks at files that may be incomplete
FULL_SCAN = 30.0  # seconds between two looks at all files, should the system have told of one


class Arrival(NamedTuple):
    """A file that has stopped to change.

    Attributes:
        path: Its absolute path.
        stamp: Size and time of its last change, which tell it from another file of its name.
        age: Seconds for which it has been seen unchanged.
    """

    path: Path
    stamp: str
    age: float


class Inbox:
    """Watches a folder and those below it, but for hidden files and folders.

    Args:
        folder: May vanish, and come back.
        settle: Seconds for which a file must be unchanged; 0 for those that are complete when they
            appear, since they are renamed into place.
        poll: Seconds between two looks at the whole folder where the system does not tell of
            changes, as on network drives; None where it does.
        outside: A folder that is not watched.
    """

    def __init__(
        self, folder: Path, settle: float, poll: float | None = None, outside: Path | None = None
    ) -> None:
        self.folder, self.settle, self.poll = folder.absolute(), settle, poll
        self.outside = outside.resolve() if outside else None
        self.seen: dict[Path, tuple[str, float]] = {}  # stamp, and since when it is that
        self.done: dict[Path, str] = {}
        self.unreadable: set[str] = set()

    def arrivals(self, stop: threading.Event) -> Iterator[list[Arrival]]:
        """Again and again, the complete files that are not `finished`, the oldest first."""
        while not stop.is_set():
            try:
                identity = patiently(self._identity, str(self.folder), stop)
            except Stopped:
                return
            try:
                yield from self._until_it_vanishes(identity, stop)
            except (OSError, RuntimeError) as error:  # the system cannot watch so many folders
                say(f"{self.folder} cannot be watched: {reason(error)}; --poll does without")
                stop.wait(FULL_SCAN)

    def finished(self, arrival: Arrival) -> None:
        """Leave out this file from now on, unless it changes."""
        self.seen.pop(arrival.path, None)
        self.done[arrival.path] = arrival.stamp

    def _identity(self) -> tuple[int, int]:
        """What tells the folder from another one that is mounted or made in its place."""
        with os.scandir(self.folder):
            about = self.folder.stat()
        return about.st_dev, about.st_ino

    def _until_it_vanishes(
        self, identity: tuple[int, int], stop: threading.Event
    ) -> Iterator[list[Arrival]]:
        next_scan = 0.0
        for changes in watch(
            self.folder,
            watch_filter=None,
            stop_event=stop,
            rust_timeout=int(1000 * TICK),
            yield_on_timeout=True,
            raise_interrupt=False,
            debounce=200,
            force_polling=self.poll is not None,
            poll_delay_ms=int(1000 * (self.poll or 1)),
            ignore_permission_denied=True,
        ):
            try:
                if self._identity() != identity:
                    return
            except OSError:  # `arrivals` says so
                return
            if time.monotonic() >= next_scan:
                self._scan()
                next_scan = time.monotonic() + FULL_SCAN
            for path in (Path(name) for _, name in changes):
                if has_picture_s_name(path) and all(map(self._is_watched, self._parents(path))):
                    self._look(path)
            yield self._complete()

    def _scan(self) -> None:
        """Look at all files."""
        present = set()
        for parent, folders, names in os.walk(self.folder, onerror=self._complain):
            folders[:] = [x for x in folders if self._is_watched(Path(parent, x))]
            for path in filter(has_picture_s_name, (Path(parent, name) for name in names)):
                present.add(path)
                self._look(path)
        for known in (self.seen, self.done):
            for path in known.keys() - present:
                del known[path]

    def _look(self, path: Path) -> None:
        """Note what a picture is like now, if it is not finished."""
        try:
            about = path.stat()
        except OSError:
            self.seen.pop(path, None)
            return
        stamp = stamp_of(about)
        if not stat.S_ISREG(about.st_mode):
            return
        if self.done.get(path) != stamp and self.seen.get(path, ("",))[0] != stamp:
            self.seen[path] = (stamp, time.monotonic())

    def _complain(self, error: OSError) -> None:
        """Say once of a folder that it cannot be read; one that is gone is none."""
        name = str(error.filename)
        if not isinstance(error, FileNotFoundError) and name not in self.unreadable:
            say(f"{name}: {reason(error)}; pictures in there are not seen")
            self.unreadable.add(name)

    def _parents(self, path: Path) -> list[Path]:
        """The folders between the watched one and a file."""
        return [parent for parent in path.parents if self.folder in parent.parents]

    def _is_watched(self, folder: Path) -> bool:
        return not folder.name.startswith(".") and folder.resolve() != self.outside

    def _complete(self) -> list[Arrival]:
        """Files that are as they were for long enough."""
        for path in list(self.seen):
            self._look(path)
        now = time.monotonic()
        found = [Arrival(path, stamp, now - since) for path, (stamp, since) in self.seen.items()]
        ripe = [arrival for arrival in found if arrival.age >= self.settle]
        return sorted(ripe, key=lambda x: (int(x.stamp.partition("-")[2]), x.path))


def has_picture_s_name(path: Path) -> bool:
    """Whether a file's name is that of a picture, and not hidden."""
    return path.suffix.lower() in SUFFIXES and not is_ignored(path)


def stamp_of(about: os.stat_result) -> str:
    """The `Arrival.stamp` of a file."""
    return f"{about.st_size}-{about.st_mtime_ns}"
