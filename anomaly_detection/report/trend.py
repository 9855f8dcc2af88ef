"""What has changed since an earlier evaluation, in words."""

from typing import Any, NamedTuple

HIGHER_IS_BETTER = {  # by name in evaluate.json
    "image_auroc": True,
    "image_f1": True,
    "false_reject_rate": False,
    "miss_rate": False,
}


class DifferentTestImages(Exception):
    """Two evaluations used different test images, so their metrics do not compare."""


class Trend(NamedTuple):
    """A metric's earlier value, and how it has changed."""

    before: float
    word: str  # better, worse, within noise, unchanged


def trends(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Trend]:
    """How each metric that two evaluations (evaluate.json) share has changed.

    A change is within noise if either value lies in the other's 95 % interval.

    Raises:
        DifferentTestImages: They used different test images.
    """
    contents = [metrics.get("data", {}).get("content", {}).get("test") for metrics in (now, before)]
    if contents[0] != contents[1]:
        raise DifferentTestImages
    return {
        name: Trend(before[name], _word(name, now, before))
        for name in HIGHER_IS_BETTER
        if now.get(name) is not None and before.get(name) is not None
    }


def _word(name: str, now: dict[str, Any], before: dict[str, Any]) -> str:
    if now[name] == before[name]:
        return "unchanged"
    if _within(now[name], before["intervals"][name]) or _within(
        before[name], now["intervals"][name]
    ):
        return "within noise"
    return "better" if (now[name] > before[name]) == HIGHER_IS_BETTER[name] else "worse"


def _within(value: float, interval: list[float] | None) -> bool:
    return interval is not None and interval[0] <= value <= interval[1]
