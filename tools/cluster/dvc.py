"""Running DVC in other folders than the project's own."""

import os
import sys
from pathlib import Path
from typing import Any

from configobj import ConfigObj
from dvc.repo import Repo

COMMAND = [sys.executable, "-m", "dvc", "--wait-for-lock"]

Settings = dict[str, dict[str, Any]]


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
    """The text of a .dvc/config; it may hold secrets."""
    return "\n".join(ConfigObj(config).write()) + "\n"


def write_settings(folder: Path, config: Settings, name: str = "config") -> None:
    """Make a folder a DVC repository with these settings, which its owner alone may read."""
    path = folder / ".dvc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(settings_text(config), encoding="utf-8")
