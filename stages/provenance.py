"""Where results come from: the git revision, changes since, and how to reproduce them."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

# Set where stages run elsewhere: the project's folder.
ROOT = os.environ.get("ANOMALY_DETECTION_ROOT", ".")
SOURCES = ("params.yaml", "dvc.yaml", "stages", "anomaly_detection")


def committed(path: str) -> str | None:
    """The text of a file in HEAD, or None if there is none."""
    return _git("show", f"HEAD:./{path}")


def provenance() -> dict[str, Any]:
    """`revision` in words, and `commands` that reproduce this working tree's results."""
    head = _git("log", "-1", "--format=%H%n%h %s")
    if head is None:
        return {"revision": "not in a git repository", "commands": ["make repro"]}
    commit, name = head.strip().split("\n")
    overrides = changed_parameters()
    status = _git("status", "--porcelain", "--", *SOURCES) or ""
    others = [line[3:] for line in status.splitlines() if line[3:] != "params.yaml"]
    words = [name]
    if experiment := os.environ.get("DVC_EXP_NAME"):
        words.append(f"experiment {experiment}")
    if overrides:
        words.append("with " + ", ".join(overrides))
    if others:
        words.append("with uncommitted changes")
    commands = [f"git checkout {commit}"]
    commands += [f"# and the uncommitted changes in {path}" for path in others]
    options = "".join(f" -S {shlex.quote(override)}" for override in overrides)
    commands.append(f"dvc exp run{options}" if overrides else "make repro")
    return {"revision": ", ".join(words), "commands": commands}


def changed_parameters() -> list[str]:
    """The parameters that differ from HEAD's, as arguments for `dvc exp run -S`."""
    yaml = YAML(typ="safe", pure=True)
    before = _flat(yaml.load(committed("params.yaml") or "") or {})
    now = _flat(yaml.load(Path("params.yaml").read_text(encoding="utf-8")))
    return [
        f"{'' if key in before else '+'}{key}={_text(value)}"
        for key, value in now.items()
        if key not in before or before[key] != value
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace('"', "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8", errors="replace")
