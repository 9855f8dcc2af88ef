"""How the tests run: in a home folder of their own, the longest first, with nothing left behind."""

import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from builders.images import write_category
from builders.projects import Project
from filelock import FileLock

ROOT = Path(__file__).parent.parent
NUM_SLOWEST = 15


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests, and all that they start, an empty home folder."""
    if hasattr(config, "workerinput"):
        return  # a worker of xdist has its controller's
    config.home = tempfile.TemporaryDirectory(prefix="home-")
    os.environ["HOME"] = config.home.name
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        os.environ.pop(name, None)
    os.environ["DVC_SITE_CACHE_DIR"] = f"{config.home.name}/dvc"
    config.found = _untracked()


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "home"):
        config.home.cleanup()


def _untracked() -> set[str]:
    """What git does not track in the checkout, but for the caches of the test run itself."""
    command = ["git", "status", "--porcelain", "--ignored", "--untracked-files=all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    caches = ("__pycache__", ".pytest_cache", ".hypothesis", ".coverage", "_cache", ".egg-info")
    return {line for line in done.stdout.splitlines() if not any(x in line for x in caches)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a test has changed the checkout."""
    config = session.config
    left = sorted(_untracked() - config.found) if hasattr(config, "found") else []
    if left:
        config.left = left
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print the slowest tests, with their fixtures, and what has been left behind."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration
    terminalreporter.section(f"slowest {NUM_SLOWEST} tests, fixtures included")
    for name, duration in seconds.most_common(NUM_SLOWEST):
        terminalreporter.line(f"{duration:6.1f} s  {name}")
    for line in getattr(config, "left", ()):
        terminalreporter.line(f"a test has left or changed this in the checkout: {line}", red=True)


@pytest.fixture
def category(tmp_path: Path) -> Path:
    """A whole category with masks, `<tmp_path>/data/widget`."""
    return write_category(tmp_path / "data" / "widget")


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported detector of the category `part`; read it, or change a copy."""
    from builders.servers import write_export

    return write_export(tmp_path_factory.mktemp("exports") / "part")


@pytest.fixture(scope="session")
def newer_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one of that category, with other scores."""
    from builders.servers import write_export

    return write_export(tmp_path_factory.mktemp("exports") / "newer", seed=3)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts servers, which are stopped in the end."""
    from builders.servers import Server

    with ExitStack() as running:
        yield lambda *arguments, **options: running.enter_context(
            Server(tmp_path, *arguments, **options)
        )


@pytest.fixture
def line(export: Path, tmp_path: Path) -> Iterator[Any]:
    """A folder that processes watch, which are ended."""
    from builders.lines import Line

    with Line(tmp_path, export) as line:
        yield line


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all workers of this run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def finished(shared_folder: Path) -> Project:
    """The project after `dvc repro`, for all tests: read it, or change a `copy`."""
    folder = shared_folder / "finished"
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return Project.at(folder)
        try:
            project = Project(folder)
            project.repro(measured=True)
            project.commit("first run")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return project
