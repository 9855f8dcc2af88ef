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
        summary[category] = headlines(metrics)
    write_json(Path("metrics/summary.json"), summary | {"mean": mean(list(summary.values()))})


def headlines(metrics: dict) -> dict:
    """What `dvc metrics diff` compares; the ends of intervals are figures of their own."""
    row = {name: metrics[name] for name in HEADLINES if name in metrics}
    for name, interval in metrics["intervals"].items():
        if interval is not None:
            row[f"{name}_low"], row[f"{name}_high"] = interval
    if "synthetic" in metrics:
        row["synthetic_size_detected"] = metrics["synthetic"]["size_detected_in_90_percent"]
    row["num_near_duplicates"] = len(metrics["data"]["near_duplicates"])
    return row


def mean(rows: list[dict[str, float | None]]) -> dict[str, float]:
    """The mean of each headline over the categories, if all have it."""
    return {
        name: fmean(row[name] for row in rows)
        for name in HEADLINES
        if all(row.get(name) is not None for row in rows)
    }


if __name__ == "__main__":
    run(main)
