"""Atomic writes, and fingerprints of files' contents."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written in the block, that then replaces it.

    If the block fails, any previous file is intact, and the temporary file is deleted.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the new one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def fingerprint(values: Any, files: Iterable[Path]) -> str:
    """A name for exactly these values and these files' contents, 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in files:
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
