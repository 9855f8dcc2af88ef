"""Report all categories on one page, and sum up: report_data -> report, metrics/summary.json.

The page, report/index.html, depends on the results alone. report/run.js, which DVC does not know,
tells it of the run: commit, times, and what has changed since the last commit.
"""

import json
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from anomaly_detection.config import load_config
from anomaly_detection.files import fingerprint, write_text
from anomaly_detection.report import (
    DifferentTestImages,
    Trend,
    facts_script,
    next_steps,
    render,
    trends,
)
from stages import SELECTION, TIMES, run, write_json
from stages.provenance import ROOT, committed, provenance

HEADLINES = (
    "image_auroc",
    "image_f1",
    "image_f1_max",
    "false_reject_rate",
    "miss_rate",
    "pixel_auroc",
    "aupro",
)
FEW = 3  # categories, whose names the summary's mean gives


def main() -> None:
    """Report the categories in params.yaml only; removed ones may have left files behind."""
    names = load_config().data.categories
    categories = [json.loads(Path(f"report_data/{name}.json").read_text()) for name in names]
    for category in categories:
        parity = Path("report_data/parity") / f"{category['name']}.json"
        category["parity"] = json.loads(parity.read_text())
    chosen = selections()
    facts = provenance() | {
        "made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "trends": {category["name"]: trend(category) for category in categories},
        "times": times(names),
        "next": {x["name"]: next_steps(x, chosen.get(x["name"])) for x in categories},
        "speeds": {name: x for name in names if (x := noted(TIMES / name / "speeds.json"))},
    }
    summary = {category["name"]: headlines(category["metrics"]) for category in categories}
    write_text(Path("report/run.js"), facts_script(categories, facts))
    write_text(Path("report/index.html"), render(categories))
    whole = mean(list(summary.values())) | {"test_images": test_images(categories)}
    write_json(Path("metrics/summary.json"), summary | {"mean": whole})


def selections() -> dict[str, Any]:
    """What `python -m tools.select` has found last, by category; empty if it has not run."""
    return noted(Path(ROOT) / SELECTION) or {}


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
    """The cost of each stage that has run here, in pipeline order."""
    stages = [TIMES / "fetch.json"]
    stages += [
        TIMES / name / f"{stage}.json"
        for name in names
        for stage in ("prepare", "pretrain", "train", "evaluate", "export", "plot")
    ]
    return [cost for path in stages if (cost := noted(path))]


def noted(path: Path) -> Any:
    """The content of a file that DVC does not know; None if what writes it has not run here."""
    return json.loads(path.read_text()) if path.is_file() else None


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


def test_images(categories: list[dict[str, Any]]) -> str:
    """What the mean is of, a name for exactly these images: only means of the same ones compare."""
    contents = {x["name"]: x["metrics"]["data"]["content"]["test"] for x in categories}
    named = ", ".join(contents) if len(contents) <= FEW else f"{len(contents)} categories"
    return f"{named}: {fingerprint(contents, [])[:8]}"


if __name__ == "__main__":
    run(main)
