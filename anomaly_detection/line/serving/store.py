"""What the server keeps: its journal, the last pictures, and what inspectors say of them."""

import contextlib
import csv
import sqlite3
import tempfile
import threading
from collections import deque
from pathlib import Path

from starlette.exceptions import HTTPException

from anomaly_detection.errors import UserError, one_line
from anomaly_detection.files import replacing
from anomaly_detection.line.journal import Journal, Row
from anomaly_detection.line.serving.metrics import Metrics
from anomaly_detection.line.serving.pictures import suffix_of

NUM_PICTURES = 100  # that are kept without a label
NUM_ROWS, NUM_ROWS_IN_MEMORY = 100_000, 1_000
COLUMNS = ("path", "label", "defect_type", "verdict", "score", "sha256", "id", "time")


class Store:
    """Rows, pictures and corrections in a folder; without one, until the process ends.

    journal.sqlite       rows, and the state of drift
    pictures/            the last pictures as they came
    labelled/<category>/ those that an inspector has labelled, for good
    corrections.csv      their labels, a row for each verdict

    Args:
        folder: Is made if there is none; None keeps rows in memory, and no labels.
        metrics: Counts failures.

    Raises:
        UserError: The folder cannot be written or is in use, or its corrections cannot be read.
    """

    def __init__(self, folder: Path | None, metrics: Metrics) -> None:
        self.folder, self.metrics, self.lock = folder, metrics, threading.Lock()
        self.journal = Journal(folder and folder / "journal.sqlite")
        self.temporary = tempfile.TemporaryDirectory(prefix="serve-")
        self.pictures = (folder or Path(self.temporary.name)) / "pictures"
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            for partial in self.pictures.glob(".*.partial"):
                partial.unlink()
            self.kept = deque(sorted(self.pictures.iterdir()))
        except OSError as error:
            raise UserError(f"{self.pictures} must be writable: {error.strerror}.") from None
        self.corrections = _read(folder / "corrections.csv") if folder else {}

    def close(self) -> None:
        """Let another process have it."""
        self.journal.close()
        self.temporary.cleanup()

    def row(self, identifier: str) -> Row | None:
        """The row with this `id`, if it is still there."""
        number = self.journal.number_of(identifier)
        found = self.journal.after(number - 1, 1) if number else []
        return next((entry.row for entry in found if entry.number == number), None)

    def with_label(self, row: Row) -> Row:
        """The row, with the label that it was given, if any."""
        own = self.corrections.get(row["id"])
        return row | {"label": own["label"], "defect_type": own["defect_type"]} if own else row

    def keep(self, row: Row, content: bytes) -> None:
        """Keep a row's picture until `NUM_PICTURES` others have come."""
        path = self.pictures / f"{self._name(row)}{suffix_of(content)}"
        try:
            with replacing(path) as partial:
                partial.write_bytes(content)
            with self.lock:
                self.kept.append(path)
                while len(self.kept) > NUM_PICTURES:
                    self.kept.popleft().unlink(missing_ok=True)
        except OSError as error:
            self.metrics.fails("pictures", f"{path} must be writable: {error.strerror}.")
        else:
            self.metrics.works("pictures")

    def picture(self, row: Row) -> bytes:
        """A row's picture.

        Raises:
            HTTPException: It is no longer kept.
        """
        folders = [self.pictures, *([self._labelled(row)] if self.folder else [])]
        for path in (x for folder in folders for x in folder.glob(f"{self._name(row)}.*")):
            with contextlib.suppress(FileNotFoundError):  # it just went
                return path.read_bytes()
        raise HTTPException(404, "this verdict's picture is no longer kept.")

    def label(self, row: Row, label: str | None, defect_type: str) -> None:
        """Write a label to `corrections.csv`, in place of an earlier one; None takes it out.

        Raises:
            HTTPException: The picture is no longer kept.
            OSError: A file cannot be written.
        """
        assert self.folder is not None, "labels need a folder"
        with self.lock:
            corrections = {key: own for key, own in self.corrections.items() if key != row["id"]}
            if label:
                path = self._kept_for_good(row)
                own = {"path": str(path.resolve()), "label": label, "defect_type": defect_type}
                corrections[row["id"]] = {name: own.get(name, row.get(name)) for name in COLUMNS}
            with (
                replacing(self.folder / "corrections.csv") as partial,
                partial.open("w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(corrections.values())
            self.corrections = corrections

    def tidy(self) -> None:
        """Forget rows that are too old."""
        keep = NUM_ROWS if self.folder else NUM_ROWS_IN_MEMORY
        try:
            if old := self.journal.oldest(keep, (), 0, 10_000):
                self.journal.forget([number for number, _ in old])
        except sqlite3.Error as error:
            self.metrics.fails("journal", f"The journal cannot be tidied ({one_line(error)}).")

    def _kept_for_good(self, row: Row) -> Path:
        content = self.picture(row)
        path = self._labelled(row) / f"{self._name(row)}{suffix_of(content)}"
        if not path.exists():
            with replacing(path) as partial:
                partial.write_bytes(content)
        return path

    def _labelled(self, row: Row) -> Path:
        assert self.folder is not None, "labels need a folder"
        return self.folder / "labelled" / row["category"]

    def _name(self, row: Row) -> str:
        return f"{self.journal.number_of(row['id']):09}-{row['sha256'][:12]}"


def _read(path: Path) -> dict[str, Row]:
    """Corrections by `id`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["id"]: row for row in csv.DictReader(file)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(
            f"{path} must be a CSV file of corrections, but cannot be read ({one_line(error)})."
        ) from None
