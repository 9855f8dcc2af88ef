"""Waiting for what passes: a full disk, a vanished folder, a lost network."""

import contextlib
import random
import sqlite3
import sys
import threading
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from anomaly_detection.errors import one_line

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; they double in between
PASSING = (OSError, sqlite3.OperationalError)


class Stopped(Exception):
    """The process shall end while something still does not work."""


def patiently(action: Callable[[], T], what: str, stop: threading.Event) -> T:
    """The action's result, as soon as it works; says once that it does not, and when it does again.

    Args:
        action: May be repeated.
        what: What does not work, for people.
        stop: Ends the waiting.

    Raises:
        Stopped: `stop` is set, and it does not work.
    """
    for attempt in count():
        try:
            result = action()
        except PASSING as error:
            if not attempt:
                say(f"{what}: {reason(error)}; will try again until it works")
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
            if stop.wait(pause * random.uniform(0.5, 1)):  # so that not all machines come at once
                raise Stopped from None
        else:
            if attempt:
                say(f"{what}: works again")
            return result
    raise AssertionError("counting does not end")


def reason(error: Exception) -> str:
    """What the operating system or a library says, on one line."""
    return getattr(error, "strerror", None) or one_line(error)


def say(text: str) -> None:
    """Tell people; if nobody can read it, go on."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
