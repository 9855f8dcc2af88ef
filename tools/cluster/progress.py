"""How far the jobs are: a line each where there is a terminal, plain and rare lines elsewhere."""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

OF_DVC = ("> ", "Updating lock file", "Use `dvc push`", "Stage '")  # lines that say nothing new
RARE = 30.0  # seconds between the lines of a job in a log
ROWS = 20  # jobs that a terminal shows


@dataclass
class Outcome:
    """How a job has ended: `done`, `unchanged` or `failed`; and where, why and after how long."""

    state: str
    node: str
    reason: str
    seconds: float


@dataclass
class _Running:
    node: str
    since: float
    line: str = ""
    stage: str = ""
    shown: float = field(default=float("-inf"))


class Progress:
    """What jobs print, as it comes; a context manager.

    Args:
        total: How many jobs there are.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, _Running] = {}
        self.console = Console(file=sys.stdout)
        self.live = Live(console=self.console, get_renderable=self._table, transient=True)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def tell(self, name: str, node: str, line: str) -> None:
        """A job has printed a line."""
        if line.startswith(OF_DVC):
            return
        job = self.running.setdefault(name, _Running(node, time.monotonic()))
        job.node, job.line = node, line
        is_new = line.startswith("Running stage ")
        if is_new:
            job.stage = line.removeprefix("Running stage ").strip("':").split("@")[0]
        if is_new or time.monotonic() - job.shown > RARE:
            job.shown = float("-inf") if is_new else time.monotonic()  # a stage's first line counts
            self._log(f"{name} ({node}): {line}")

    def end(self, name: str, state: str, reason: str = "") -> None:
        """A job has ended."""
        job = self.running.pop(name, _Running("", time.monotonic()))
        seconds = time.monotonic() - job.since
        self.outcomes[name] = Outcome(state, job.node, reason, seconds)
        self._log(
            f"{name}: {state}{f' after {seconds:.0f} s' if job.node else ''}; {self._counts()}"
        )

    def _log(self, line: str) -> None:
        if not self.console.is_terminal:
            print(line, flush=True)

    def _counts(self) -> str:
        counts = Counter(outcome.state for outcome in self.outcomes.values())
        counts["running"] = len(self.running)
        counts["waiting"] = self.total - sum(counts.values())
        return ", ".join(f"{number} {state}" for state, number in counts.items() if number)

    def _table(self) -> Table:
        table = Table(title=self._counts(), title_justify="left", box=None, pad_edge=False)
        for column in ("category", "node", "stage", "s", ""):
            table.add_column(column, no_wrap=True, justify="right" if column == "s" else "left")
        now = time.monotonic()
        for name, job in list(self.running.items())[:ROWS]:
            row = (name, job.node, job.stage, f"{now - job.since:.0f}", job.line)
            table.add_row(*(Text(cell, overflow="ellipsis") for cell in row))
        return table


def summary(outcomes: dict[str, Outcome]) -> str:
    """A table of what was run, in Markdown; failures last, with their reasons."""
    ran = sorted(
        ((name, o) for name, o in outcomes.items() if o.state != "unchanged"),
        key=lambda item: (item[1].state == "failed", item[0]),
    )
    lines = ["| category | state | seconds | node |", "|---|---|---|---|"]
    lines += [f"| {name} | {o.state} | {o.seconds:.0f} | {o.node} |" for name, o in ran]
    unchanged = len(outcomes) - len(ran)
    if not ran:
        return f"{unchanged} unchanged."
    if unchanged:
        lines += ["", f"{unchanged} unchanged."]
    for name, o in ran:
        if o.state == "failed":
            lines += ["", f"{name}: {o.reason}"]
    return "\n".join(lines)
