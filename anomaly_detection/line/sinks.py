"""Where verdicts go: a file, a webhook, an MQTT broker.

Each sink has a thread that takes the rows from the journal, one batch after the other. The journal
is the queue: however long a sink is away, memory does not grow, and nothing is lost.
"""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from anomaly_detection.errors import UserError
from anomaly_detection.line.journal import Journal, Row, encoded
from anomaly_detection.line.patience import Stopped, patiently, reason

BATCH = 100  # rows
TIMEOUT = 10.0  # seconds for which a webhook or a broker may keep silent
GRACE = 5.0  # seconds at the end in which to deliver what waits
TAIL = 1 << 20  # bytes of a file in which its last row is


class Sink(Protocol):
    """Takes rows.

    Attributes:
        name: What it is and where, without secrets.
    """

    name: str

    def recover(self, journal: Journal) -> int:
        """The number of the last of the journal's rows that it surely has; 0 if it cannot tell."""
        return 0

    def send(self, rows: Sequence[Row]) -> None:
        """Deliver rows; after any exception, all will come again."""


class FileSink(Sink):
    """A file of JSON lines, each of which it gets exactly once.

    Args:
        path: May be moved away at any time; a new one is made.

    Raises:
        UserError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, f"file {path.absolute()}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab"):
                pass
        except OSError as error:
            raise UserError(f"{path} must be writable: {error.strerror}.") from None

    def recover(self, journal: Journal) -> int:
        """The number of its last row; half a row, of a process that was killed, is cut off."""
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            tail = file.read()
            whole = tail[: tail.rfind(b"\n") + 1]
            file.truncate(size - len(tail) + len(whole))
        try:
            return journal.number_of(json.loads(whole.splitlines()[-1])["id"])
        except (IndexError, KeyError, TypeError, ValueError):  # empty, or another program's
            return 0

    def send(self, rows: Sequence[Row]) -> None:
        """Append the rows, and wait until the disk has them."""
        lines = b"".join(encoded(row) + b"\n" for row in rows)
        with self.path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                _write_all(file, lines)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)  # the disk is full; what is there stays whole
                raise


def _write_all(file: Any, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


class WebhookSink(Sink):
    """POSTs each row as JSON; at least once, with its `id` as `Idempotency-Key`.

    Args:
        url: Where to, with user and password if need be.
        token: For the header `Authorization: Bearer`, if any.

    Raises:
        UserError: The address is not one of http or https.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--webhook must be an address of http or https, got {url!r}.")
        user, _, place = parts.netloc.rpartition("@")
        self.url = urlunsplit((parts.scheme, place, parts.path or "/", parts.query, ""))
        self.name = f"webhook {self.url.partition('?')[0]}"
        self.opener = urllib.request.build_opener(_NoRedirect)
        self.headers = {"Content-Type": "application/json"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        elif user:
            self.headers["Authorization"] = f"Basic {b64encode(unquote(user).encode()).decode()}"

    def send(self, rows: Sequence[Row]) -> None:
        """POST the rows, one after the other."""
        for row in rows:
            headers = self.headers | {"Idempotency-Key": row["id"]}
            request = urllib.request.Request(self.url, encoded(row), headers, method="POST")
            try:
                with self.opener.open(request, timeout=TIMEOUT) as answer:
                    answer.read(1 << 16)
            except urllib.error.HTTPError as error:
                raise OSError(f"answers with status {error.code}") from None
            except urllib.error.URLError as error:
                raise OSError(f"cannot be reached ({error.reason})") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Fails: a redirected POST would become a GET, without the row."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""


class MqttSink(Sink):
    """Publishes each row as JSON with quality of service 1: at least once, with its `id`.

    Args:
        url: mqtt://user@host:1883/topic, or mqtts:// for TLS.
        password: Of the user, unless it is in the address.

    Raises:
        UserError: The address is not such a one, or paho-mqtt is not installed.
    """

    def __init__(self, url: str, password: str | None = None) -> None:
        try:
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError:
            raise UserError("--mqtt needs paho-mqtt: pip install paho-mqtt.") from None
        parts = urlsplit(url)
        try:
            port = parts.port or {"mqtt": 1883, "mqtts": 8883}[parts.scheme]
        except (KeyError, ValueError):
            port = 0
        topic = unquote(parts.path.removeprefix("/"))
        if not (port and parts.hostname and topic) or set("#+") & set(topic):
            raise UserError(f"--mqtt must be mqtt://host[:port]/topic or mqtts://..., got {url!r}.")
        self.host, self.port, self.topic = parts.hostname, port, topic
        self.name = f"mqtt {self.host}:{port}/{topic}"
        given = unquote(parts.password) if parts.password else password

        def new_client() -> Any:
            client = Client(CallbackAPIVersion.VERSION2)
            if parts.username:
                client.username_pw_set(unquote(parts.username), given)
            if parts.scheme == "mqtts":
                client.tls_set()
            return client

        self.new_client, self.client = new_client, new_client()

    def send(self, rows: Sequence[Row]) -> None:
        """Publish the rows, and wait until the broker has them."""
        if not self.client.is_connected():
            self._connect()
        sent = [self.client.publish(self.topic, encoded(row), qos=1) for row in rows]
        deadline = time.monotonic() + TIMEOUT
        try:
            for message in sent:
                message.wait_for_publish(max(0, deadline - time.monotonic()))
        finally:
            if not all(message.is_published() for message in sent):
                self.client.disconnect()
        if not all(message.is_published() for message in sent):
            raise OSError("the broker does not confirm")

    def _connect(self) -> None:
        self.client.loop_stop()
        self.client = self.new_client()  # the old one keeps what it could not send
        self.client.connect(self.host, self.port, keepalive=30)
        self.client.loop_start()
        deadline = time.monotonic() + TIMEOUT
        while not self.client.is_connected():
            if time.monotonic() > deadline:
                raise OSError("the broker refuses the connection, or does not answer")
            time.sleep(0.01)


class Delivery(threading.Thread):
    """Brings a journal's rows to a sink.

    Args:
        sink: A new one gets the rows from now on.
        journal: The rows.
        stop: Ends it, once what waits is delivered, or after `GRACE`.
    """

    def __init__(self, sink: Sink, journal: Journal, stop: threading.Event) -> None:
        super().__init__(name=sink.name, daemon=True)
        self.sink, self.journal, self.stop = sink, journal, stop
        self.position = max(journal.start_of(sink.name), sink.recover(journal))

    def run(self) -> None:
        """Deliver until `stop`."""
        end = float("inf")
        while time.monotonic() < end:
            if self.stop.is_set():
                end = min(end, time.monotonic() + GRACE)
            entries = self.journal.after(self.position, BATCH, wait=0.2)
            try:
                if entries:
                    self._deliver(entries[-1].number, [entry.row for entry in entries])
                elif self.stop.is_set():
                    return
            except Stopped:
                return

    def _deliver(self, last: int, rows: list[Row]) -> None:
        def send() -> None:
            try:
                self.sink.send(rows)
            except Exception as error:  # each library has errors of its own
                raise OSError(reason(error)) from None

        patiently(send, self.sink.name, self.stop)
        self.position = last
        patiently(lambda: self.journal.note_delivered(self.sink.name, last), "journal", self.stop)
