"""Running DVC in other folders than the project's own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configobj import ConfigObj
from dvc.repo import Repo

COMMAND = [sys.executable, "-m", "dvc", "--wait-for-lock"]

Settings = dict[str, dict[str, Any]]

DELAYS = (1, 2, 4, 8, 16, 32)  # seconds between attempts at the remote
LINES = 2  # an error of the transfer, and that it has failed


def insist(
    action: Callable[[], str | None], pause: Callable[[float, str], bool | None]
) -> str | None:
    """Do it again until it returns None instead of a reason; returns the last reason.

    Args:
        action: What to do.
        pause: Given a time in seconds and the reason, waits; true to give up.
    """
    for delay in DELAYS:
        if (reason := action()) is None or pause(delay, reason):
            return reason
    return action()


def failure(done: subprocess.CompletedProcess[str]) -> str | None:
    """The last lines of a failed command's stderr; None if it has succeeded."""
    if done.returncode == 0:
        return None
    return " ".join(done.stderr.splitlines()[-LINES:]) or f"{done.args} has failed"


def environment() -> dict[str, str]:
    """The variables of a shell in which the environment of this Python is active."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def settings(root: Path) -> Settings:
    """A project's remotes, with absolute paths, and its cache, for folders that are in no git."""
    with Repo(str(root)) as repo:
        config = {f'remote "{name}"': dict(of) for name, of in repo.config["remote"].items()}
        cache = str(Path(repo.cache.local.path).parents[1])
        config["cache"] = {**repo.config["cache"], "dir": cache}
        core = {"no_scm": True, "analytics": False, "check_update": False}
        if remote := repo.config["core"].get("remote"):
            core["remote"] = remote
    return config | {"core": core}


def settings_text(config: Settings) -> str:
    """The text of a .dvc/config, the same for the same settings; it may hold secrets."""
    ordered = {section: dict(sorted(config[section].items())) for section in sorted(config)}
    return "\n".join(ConfigObj(ordered).write()) + "\n"


def write_settings(folder: Path, config: Settings, name: str = "config") -> None:
    """Make a folder a DVC repository with these settings, which its owner alone may read."""
    path = folder / ".dvc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(settings_text(config), encoding="utf-8")
