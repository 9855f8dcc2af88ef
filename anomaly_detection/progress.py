"""How far long work is: a bar in a terminal, and rare lines where there is none, as in a log.

All of it goes to standard error, and at once. Of several processes that train one model, only the
first says anything.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

INTERVAL = 30.0  # seconds between the lines of one loop

_parts: ContextVar[tuple[str, ...]] = ContextVar("parts", default=())


def progress(
    items: Iterable[T], description: str, unit: str, total: int | None = None
) -> Iterator[T]:
    """The items, and meanwhile how many have been worked on, how fast, and the time left.

    Args:
        items: Anything to iterate over.
        description: What is being done.
        unit: What the items are, in the plural.
        total: How many there are, if `items` has no length; None if that is unknown.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if _is_first() and _in_terminal():
        name = ", ".join((*_parts.get(), description))
        yield from tqdm(items, name, total, unit=f" {unit}", leave=False)
        return
    started = said = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= INTERVAL and count != total:
            said, seconds = now, now - started
            done = f"{count} {unit}" if total is None else f"{count} of {total} {unit}"
            left = None if total is None else (total - count) * seconds / count
            say(f"{description}: {done}, {pace(count / seconds, unit, left)}")


def say(text: str) -> None:
    """Print a line."""
    if _is_first():
        print(", ".join((*_parts.get(), text)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Let all that is said in the block begin with the name of the part of the work that it is."""
    token = _parts.set((*_parts.get(), name))
    try:
        yield
    finally:
        _parts.reset(token)


def pace(rate: float, unit: str, seconds_left: float | None = None) -> str:
    """A speed in items per second, and the time left if it is known: `57 images/s, 2 min left`."""
    speed = f"{rate:.{0 if rate >= 10 else 1}f} {unit}/s"
    return speed if seconds_left is None else f"{speed}, {_duration(seconds_left)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _in_terminal() -> bool:
    """Whether there is room for a bar: some terminals have no columns, and a bar would be empty."""
    error = sys.stderr
    return error.isatty() and os.get_terminal_size(error.fileno()).columns > 0
