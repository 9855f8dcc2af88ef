"""`anomaly-detection` in a process that kills itself (SIGKILL) at a chosen point of one picture.

    python killed.py POINT NAME watch FOLDER --out FILE ...

NAME is that of the picture's file. Until the point, all is the real code.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anomaly_detection.line import sinks, watch
from anomaly_detection.line.journal import Journal
from anomaly_detection.line.sinks import FileSink
from anomaly_detection.line.station import Station
from anomaly_detection.line.watch import Watch


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_it_to_the_other_threads(*_: Any) -> None:
    threading.Event().wait()


def kill_at_commit(journal: Journal, *_: Any) -> None:
    """SQLite tells of each statement just before it runs."""
    journal.database.set_trace_callback(lambda statement: statement == "COMMIT" and kill())


def write_half_a_row(file: Any, lines: bytes) -> None:
    file.write(lines[: lines.index(name.encode())])
    kill()


def copy_half(source: Path, target: Path) -> None:
    content = source.read_bytes()
    target.write_bytes(content[: len(content) // 2])
    kill()


def wait_until_noted(watch: Watch, *_: Any) -> None:
    """Until the journal knows that the out file has all rows."""
    while watch.journal.num_waiting(watch.deliveries[0].sink.name):
        time.sleep(0.01)


def kill_if_source(path: Path, **_: Any) -> None:
    if path.name == name:  # not the partial copy
        kill()


def before(owner: Any, function: str, action: Callable) -> None:
    """Call something first where a function's arguments have the picture's name in them."""
    original = getattr(owner, function)

    def changed(*arguments: Any, **options: Any) -> Any:
        if name in str(arguments):
            action(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, function, changed)


def after(owner: Any, function: str, action: Callable) -> None:
    """Call something there when the function is done."""
    original = getattr(owner, function)

    def changed(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if name in str(arguments):
            action(*arguments, **options)
        return result

    setattr(owner, function, changed)


point, name, *arguments = sys.argv[1:]
if point in ("committed", "half written", "written"):
    before(Watch, "_finish", leave_it_to_the_other_threads)
elif point == "noted":
    before(Watch, "_finish", wait_until_noted)
if point == "judged":
    before(Station, "record", kill)
elif point == "not committed":
    after(Journal, "add", kill_at_commit)
elif point == "committed":
    before(FileSink, "send", kill)
elif point == "half written":
    before(sinks, "_write_all", write_half_a_row)
elif point == "written":
    after(FileSink, "send", kill)
elif point == "noted":
    before(watch, "move", kill)
elif point == "moved":
    after(watch, "move", kill)
elif point == "half copied":
    before(shutil, "copy2", copy_half)
elif point == "copied":
    before(Path, "unlink", kill_if_source)
else:
    raise ValueError(point)

if __name__ == "__main__":
    from anomaly_detection.cli import main

    main(arguments)
