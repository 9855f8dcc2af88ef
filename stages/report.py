"""The headline figures of all categories and their mean: predictions/*/ -> metrics/summary.json."""

import json
from pathlib import Path
from statistics import fmean

from anomaly_detection.config import load_config
from stages import run, write_json

HEADLINES = (
    "image_auroc",
    "image_f1",
    "image_f1_max",
    "false_reject_rate",
    "miss_rate",
    "pixel_auroc",
    "aupro",
)


def main() -> None:
    """Summarise the categories that params.yaml names; others may have left files behind."""
    summary = {}
    for category in load_config().data.categories:
        metrics = json.loads((Path("predictions") / category / "evaluate.json").read_text())
        summary[category] = {name: metrics[name] for name in HEADLINES if name in metrics}
    write_json(Path("metrics/summary.json"), summary | {"mean": mean(list(summary.values()))})


def mean(rows: list[dict[str, float | None]]) -> dict[str, float]:
    """The mean of each figure over the categories, if all have it."""
    return {
        name: fmean(row[name] for row in rows)
        for name in HEADLINES
        if all(row.get(name) is not None for row in rows)
    }


if __name__ == "__main__":
    run(main)
