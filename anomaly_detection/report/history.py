"""Curves from the history of a fit, whatever its model recorded."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LABELS = {"train_loss": "training", "val_loss": "validation"}


class History(NamedTuple):
    """What a fit recorded by epoch, ready to be drawn."""

    title: str
    curves: dict[str, list[tuple[int, float]]]  # label -> (epoch, value)


def history_curves(history: Sequence[Mapping[str, Any]]) -> History:
    """The losses that were recorded under `train_*` and `val_*`, or all such metrics if none is.

    Args:
        history: A dict for each epoch, with `epoch`. A metric may be missing or None in some.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith(("train_", "val_")) and value is not None:
                curves.setdefault(key, []).append((row["epoch"], value))
    losses = [key for key in curves if "loss" in key]
    labels = {key: LABELS.get(key, key.replace("_", " ")) for key in losses or curves}
    title = "Loss" if losses else "Training"
    return History(title, {label: curves[key] for key, label in labels.items()})
