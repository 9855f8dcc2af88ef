"""The pipeline's stages: `python -m stages.NAME [CATEGORY]` from the project's root."""

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from anomaly_detection.errors import UserError
from anomaly_detection.files import write_text

# Make idle threads sleep soon instead of spinning: otherwise two experiments at once on two cores
# are ten times slower. With no spinning at all, every layer of a single image waits for threads to
# wake up. Must be set before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a few microseconds


# Names a file: this process ends when the one that holds a lock on it does.
LEASE = "ANOMALY_DETECTION_LEASE"

# What differs by run although the results do not: neither git nor DVC knows this folder, so that
# the same results are the same bytes.
TIMES = Path("times")

# What `python -m tools.select` has found: likewise.
SELECTION = Path("selection.json")


def _end_with_holder(lease: str) -> None:
    with FileLock(lease).acquire(poll_interval=1):  # which succeeds when the holder has ended
        os._exit(1)


if LEASE in os.environ:  # here and not in `run`, because importing PyTorch takes a while
    threading.Thread(target=_end_with_holder, args=(os.environ[LEASE],), daemon=True).start()


def run(main: Callable[..., float | None], *, note_cost: bool = False) -> None:
    """Call a stage with the command line's arguments; a UserError prints its text and exits with 1.

    With `note_cost`, also write the stage's time and memory to times/. The time includes the
    seconds that `main` returns, if any: those of an interrupted attempt that it has resumed.
    """
    _keep_freed_memory()
    started = time.monotonic()
    try:
        before = main(*sys.argv[1:]) or 0.0
        if note_cost and os.environ.get("RANK", "0") == "0":  # the first, if several train
            _note_cost(*sys.argv[1:], seconds=before + time.monotonic() - started)
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def _note_cost(*category: str, seconds: float) -> None:
    stage = Path(sys.argv[0]).stem
    cost = {
        "stage": "@".join((stage, *category)),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "peak_memory": _peak_memory(),
    }
    write_json(TIMES.joinpath(*category, f"{stage}.json"), cost)


def _peak_memory() -> int | None:
    """Peak bytes of this process or its largest child; None on Windows, which reports none."""
    if sys.platform == "win32":
        return None
    import resource

    of = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(who).ru_maxrss for who in of)
    return peak if sys.platform == "darwin" else peak * 1024


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next batch instead of returning it to the system.

    Each step frees and reallocates hundreds of MB; page faults took a third of its time.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
