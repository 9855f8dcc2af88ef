"""Report all categories on one page, and sum up: report_data -> report, metrics/summary.json."""

import json
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from anomaly_detection.config import load_config
from anomaly_detection.files import write_text
from anomaly_detection.report import DifferentTestImages, Trend, render, trends
from stages import run, write_json
from stages.provenance import committed, provenance

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
    """Report the categories in params.yaml only; removed ones may have left files behind."""
    names = load_config().data.categories
    categories = [json.loads(Path(f"report_data/{name}.json").read_text()) for name in names]
    for category in categories:
        parity = Path("report_data/parity") / f"{category['name']}.json"
        category |= {"trends": trend(category), "parity": json.loads(parity.read_text())}
    page = render(
        categories,
        provenance()
        | {
            "made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
            "times": times(names),
        },
    )
    summary = {category["name"]: headlines(category["metrics"]) for category in categories}
    write_text(Path("report/index.html"), page)
    write_json(Path("metrics/summary.json"), summary | {"mean": mean(list(summary.values()))})


def trend(category: dict[str, Any]) -> dict[str, Trend] | str:
    """What has changed since the last commit, or why that is unknown."""
    before = committed(f"metrics/{category['name']}/evaluate.json")
    if before is None:
        return "There are no committed metrics to compare with."
    try:
        return trends(category["metrics"], json.loads(before))
    except DifferentTestImages:
        return (
            "Not compared with the committed metrics: they are from other test images, and metrics "
            "from different test sets do not compare."
        )


def times(names: list[str]) -> list[dict[str, Any]]:
    """The cost of each stage, in pipeline order."""
    stages = [Path("times/fetch.json")]
    stages += [
        Path("times") / name / f"{stage}.json"
        for name in names
        for stage in ("prepare", "pretrain", "train", "evaluate", "export", "plot")
    ]
    return [json.loads(path.read_text()) for path in stages]


def headlines(metrics: dict) -> dict:
    """The metrics that `dvc metrics diff` compares; each end of an interval is its own metric."""
    row = {name: metrics[name] for name in HEADLINES if name in metrics}
    for name, interval in metrics["intervals"].items():
        if interval is not None:
            row[f"{name}_low"], row[f"{name}_high"] = interval
    if "synthetic" in metrics:
        row["synthetic_size_detected"] = metrics["synthetic"]["size_detected_in_90_percent"]
    near_duplicates = metrics["data"]["num_near_duplicates"]["test"]
    row["num_near_duplicates"] = near_duplicates["pairs"]
    row["num_near_duplicate_images"] = near_duplicates["images"]
    return row


def mean(rows: list[dict[str, float | None]]) -> dict[str, float]:
    """The mean over categories of each headline metric that all of them have."""
    known = {name: [x for row in rows if (x := row.get(name)) is not None] for name in HEADLINES}
    return {name: fmean(values) for name, values in known.items() if len(values) == len(rows)}


if __name__ == "__main__":
    run(main)
