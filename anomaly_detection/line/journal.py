"""A line's memory, in SQLite: what has been judged, and what of it has been delivered.

A verdict and the state of drift are written in one transaction, before anybody is told of them, so
that a process that is killed at any moment neither loses nor doubles a verdict.
"""

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_detection.errors import UserError

Row = dict[str, Any]

VERSION = 1
SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT) STRICT;
CREATE TABLE verdicts (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    path TEXT NOT NULL,
    stamp TEXT NOT NULL,  -- with the path, what tells a file from another one of its name
    row TEXT NOT NULL     -- JSON
) STRICT;
CREATE INDEX files ON verdicts (path, stamp);
CREATE INDEX categories ON verdicts (json_extract(row, '$.category'));
CREATE TABLE delivered (sink TEXT PRIMARY KEY, number INTEGER NOT NULL) STRICT;
CREATE TABLE drift (detector TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT;
CREATE TABLE learned (detector TEXT NOT NULL, vals TEXT NOT NULL) STRICT;
CREATE INDEX learned_by ON learned (detector);
"""


def encoded(row: Row) -> bytes:
    """A row as JSON in UTF-8; names of files that are no Unicode are escaped."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


class Entry(NamedTuple):
    """A row, and its number in the journal, which grows."""

    number: int
    row: Row


class Journal:
    """What a line has judged. One process at a time can have it, any of whose threads may use it.

    Args:
        path: The file, which is made if there is none; None keeps it in memory.

    Attributes:
        name: Tells this journal's rows from those of any other.

    Raises:
        UserError: The file is no journal, is in use, or cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.lock = threading.RLock()
        self.has_more = threading.Condition(self.lock)
        try:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(
                path or ":memory:", isolation_level=None, check_same_thread=False, timeout=1
            )
            self._open()
        except (OSError, sqlite3.Error) as error:
            in_use = "locked" in str(error)
            raise UserError(
                f"{path} must be a journal that can be written, but "
                + ("another process has it; stop that first." if in_use else f"is not ({error}).")
            ) from None
        ((self.name,),) = self.database.execute("SELECT value FROM about WHERE name = 'name'")

    def _open(self) -> None:
        run = self.database.execute
        run("PRAGMA locking_mode = EXCLUSIVE")  # before anything is read: no second process
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")  # survives a power cut as well
        with self.transaction():
            version = run("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise sqlite3.DatabaseError(f"it is of version {version}; update anomaly_detection")
            if not version:
                for statement in SCHEMA.split(";\n"):
                    run(statement)
                run("INSERT INTO about VALUES ('name', ?)", (uuid.uuid4().hex[:12],))
                run(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        """Let another process have it."""
        with self.lock:
            self.database.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block's writes, or none."""
        with self.lock:
            self.database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.database.execute("COMMIT")
                self.has_more.notify_all()
            except BaseException:
                if self.database.in_transaction:
                    self.database.execute("ROLLBACK")
                raise

    def add(self, row: Row, path: str = "", stamp: str = "") -> Row:
        """Write a row within a transaction.

        Args:
            row: Of an image.
            path: Its file.
            stamp: Tells it from others of that name.

        Returns:
            The row, with an `id` that no other row has anywhere.
        """
        sql = "INSERT INTO verdicts (path, stamp, row) VALUES (?, ?, '{}')"
        number = self.database.execute(sql, (path, stamp)).lastrowid
        row = {"id": f"{self.name}-{number}", **row}
        sql = "UPDATE verdicts SET row = ? WHERE number = ?"
        self.database.execute(sql, (encoded(row).decode(), number))
        return row

    def row_of(self, path: str, stamp: str) -> Row | None:
        """What was written of a file, if anything."""
        sql = "SELECT row FROM verdicts WHERE path = ? AND stamp = ?"
        return next((json.loads(text) for (text,) in self._read(sql, path, stamp)), None)

    def after(self, number: int, count: int, wait: float = 0) -> list[Entry]:
        """The first entries after a number; waits some seconds for one, if there is none."""
        sql = "SELECT number, row FROM verdicts WHERE number > ? ORDER BY number LIMIT ?"
        with self.lock:
            found = self._read(sql, number, count)
            if not found and self.has_more.wait(wait):
                found = self._read(sql, number, count)
        return [Entry(own, json.loads(text)) for own, text in found]

    def latest(self, count: int, category: str | None = None) -> list[Entry]:
        """The last entries, or those of a category, the newest first."""
        where = "" if category is None else "WHERE json_extract(row, '$.category') = ?"
        sql = f"SELECT number, row FROM verdicts {where} ORDER BY number DESC LIMIT ?"
        values = [count] if category is None else [category, count]
        return [Entry(own, json.loads(text)) for own, text in self._read(sql, *values)]

    def number_of(self, identifier: str) -> int:
        """The number in a row's `id`; 0 for one of another journal."""
        name, _, number = identifier.rpartition("-")
        is_number = number.isdecimal() and len(number) < 19  # SQLite's go no further
        return int(number) if name == self.name and is_number else 0

    def start_of(self, sink: str) -> int:
        """The number after which a sink is to go on; a new one gets nothing from before."""
        with self.transaction():
            sql = "INSERT OR IGNORE INTO delivered SELECT ?, coalesce(max(number), 0) FROM verdicts"
            self.database.execute(sql, (sink,))
        return self.delivered(sink)

    def delivered(self, sink: str) -> int:
        """The number up to which a sink has all entries."""
        found = self._read("SELECT number FROM delivered WHERE sink = ?", sink)
        return found[0][0] if found else 0

    def note_delivered(self, sink: str, number: int) -> None:
        """That a sink has all entries up to this number."""
        with self.transaction():
            sql = "INSERT INTO delivered VALUES (?, ?) ON CONFLICT DO UPDATE SET number = ?"
            self.database.execute(sql, (sink, number, number))

    def num_waiting(self, sink: str) -> int:
        """How many entries a sink has yet to get."""
        sql = "SELECT count(*) FROM verdicts WHERE number > ?"
        return self._read(sql, self.delivered(sink))[0][0]

    def note_drift(
        self, detector: str, state: Mapping[str, Any], learned: Mapping[str, float] | None
    ) -> None:
        """Within a transaction, keep a monitor's state, and the values it has learned from."""
        run, text = self.database.execute, json.dumps(state)
        run(
            "INSERT INTO drift VALUES (?, ?) ON CONFLICT DO UPDATE SET state = ?",
            (detector, text, text),
        )
        if learned is not None:
            run("INSERT INTO learned VALUES (?, ?)", (detector, json.dumps(learned)))

    def drift_of(self, detector: str) -> tuple[dict[str, Any], list[dict[str, float]]] | None:
        """A monitor's state and the values it has learned from, if there are any."""
        found = self._read("SELECT state FROM drift WHERE detector = ?", detector)
        if not found:
            return None
        values = self._read("SELECT vals FROM learned WHERE detector = ? ORDER BY rowid", detector)
        return json.loads(found[0][0]), [json.loads(text) for (text,) in values]

    def oldest(
        self, keep: int, sinks: Sequence[str], after: int, count: int
    ) -> list[tuple[int, str]]:
        """Numbers and paths of the first entries after one that all sinks have.

        The last `keep` entries are left out.
        """
        last = self._read("SELECT coalesce(max(number), 0) FROM verdicts")[0][0] - keep
        last = min([last, *map(self.delivered, sinks)])
        sql = "SELECT number, path FROM verdicts WHERE number BETWEEN ? AND ? ORDER BY 1 LIMIT ?"
        return self._read(sql, after + 1, last, count)

    def forget(self, numbers: Sequence[int]) -> None:
        """Delete these entries."""
        with self.transaction():
            sql = "DELETE FROM verdicts WHERE number = ?"
            self.database.executemany(sql, [(number,) for number in numbers])

    def _read(self, sql: str, *values: Any) -> list[Any]:
        with self.lock:
            return self.database.execute(sql, values).fetchall()
