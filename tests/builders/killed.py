"""`anomaly-detection` in a process that kills itself at a chosen point.

    python killed.py POINT COUNT ARGUMENTS...

Dies when the point has been reached for the COUNT-th time.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from anomaly_detection.cli import main
from anomaly_detection.line import sinks, watch
from anomaly_detection.line.journal import Journal

BEFORE = {
    "judged": (watch.Watch, "_place"),
    "committed": (watch.Watch, "_finish"),
    "delivered": (Journal, "note_delivered"),
}
AFTER = {"written": (Journal, "add"), "moved": (watch, "move")}
HALF = "half a row"
POINTS = [*BEFORE, *AFTER, HALF]


def dies_at(point: str, count: int) -> None:
    """Kill this process when a point is reached for the count-th time."""
    owner, name = (BEFORE | AFTER | {HALF: (sinks, "_write_all")})[point]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        is_last = calls == count
        if is_last and point == HALF:
            file, content = arguments
            original(file, content[: len(content) // 2])
        result = original(*arguments) if not is_last or point in AFTER else None
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    dies_at(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
