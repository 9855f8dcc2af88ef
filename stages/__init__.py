"""The pipeline's stages: `python -m stages.NAME [CATEGORY]` from the project's root."""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anomaly_detection.errors import UserError

# Idle threads sleep instead of spinning. Two experiments at once on two cores are ten times slower
# otherwise; it must stand before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run(main: Callable[..., None]) -> None:
    """Call a stage with the command line's arguments; a UserError is its text and status 1."""
    _keep_freed_memory()
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file at once: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch instead of returning it to the system.

    A step frees and asks again for hundreds of MB; fetching them page by page took a third of it.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
