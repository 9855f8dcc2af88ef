"""Error messages: a wrong value's path, the rule, the value, and the nearest valid name."""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError


def explain(
    error: ValidationError, names: Sequence[str], where: Callable[[tuple[Any, ...]], str]
) -> list[str]:
    """A line for each problem.

    Args:
        error: What pydantic found.
        names: The paths of all parameters.
        where: Maps a problem's location to its path.
    """
    lines = []
    for problem in error.errors():
        path = where(problem["loc"])
        if problem["type"] == "missing":
            lines.append(f"{path} is missing.")
        elif problem["type"] == "extra_forbidden":
            lines.append(unknown(path, names))
        else:
            rule = problem["msg"].removeprefix("Value error, ")
            rule = re.sub(r"^\w+ should", "must", rule)
            rule = re.sub(r"valid dictionary.*", "section of keys and values", rule)
            lines.append(f"{path} {rule}, got {problem['input']!r}.")
    return lines


def unknown(path: str, names: Sequence[str]) -> str:
    """A message for an unknown path, with the nearest: the same key elsewhere, or a similar one."""
    same_key = [name for name in names if name.split(".")[-1] == path.split(".")[-1]]
    nearest = (same_key or get_close_matches(path, names, n=1, cutoff=0))[0]
    return f"{path} is not a parameter; did you mean {nearest}?"


def alternatives(names: Sequence[str]) -> str:
    """The names as `'a', 'b' or 'c'`."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last
