"""The page: figures and pictures of all categories, in one file that opens from disk."""

from pathlib import Path
from typing import Any

import jinja2
import numpy as np

HERE = Path(__file__).parent
BINS = 36


def render(categories: list[dict[str, Any]], provenance: dict[str, Any]) -> str:
    """The report as HTML, with style, script, pictures and data in it.

    Args:
        categories: Of each, `name`; `metrics` (evaluate.json); `training` (train.json); `images`,
            dicts of `path`, `defect_type`, `label`, `score`, `picture`, `map` and `mask`; `curves`,
            `colors` and `map_limit`, as the plot stage writes them; `trends` (a dict of `Trend`, or
            a text that says why there are none).
        provenance: `revision`, `made`, `commands`, `params` (YAML) and `times`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        categories=categories,
        headlines={category["name"]: headlines(category) for category in categories},
        histograms={category["name"]: histogram(category) for category in categories},
        provenance=provenance,
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        script="".join((HERE / name).read_text("utf-8") for name in ("charts.js", "report.js")),
        data=[
            {key: value for key, value in category.items() if key != "trends"}
            for category in categories
        ],
    )


def headlines(category: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of the first screen, each with what a reader needs to judge it."""
    metrics, trends = category["metrics"], category["trends"]
    bounds = metrics["calibration"]["false_reject_rate"]
    notes = {
        "image_auroc": "share of pairs that are in the right order",
        "false_reject_rate": (
            f"{metrics['num_false_rejects']} of {metrics['num_normal']} good images. Expected "
            f"{_percent(bounds['expected'])}, at most {_percent(bounds['upper_95'])} (95 %), from "
            f"{metrics['calibration']['num_images']} calibration images"
        ),
        "miss_rate": f"{metrics['num_misses']} of {metrics['num_anomalous']} defective images",
    }
    names = {
        "image_auroc": "Image AUROC",
        "false_reject_rate": "False rejects",
        "miss_rate": "Misses",
    }
    return [
        {
            "name": name,
            "title": title,
            "value": metrics[name],
            "interval": metrics["intervals"][name],
            "text": _figure if name == "image_auroc" else _percent,
            "note": notes[name] if metrics[name] is not None else metrics["undefined"][name],
            "trend": trends.get(name) if isinstance(trends, dict) else None,
        }
        for name, title in names.items()
    ]


def histogram(category: dict[str, Any]) -> dict[str, Any]:
    """Scores as shares of their kind in BINS bins, scaled to [0, 1], and where the threshold is."""
    scores = np.array([image["score"] for image in category["images"]])
    labels = np.array([image["label"] for image in category["images"]])
    threshold = category["metrics"]["threshold"]
    low, high = min(scores.min(), threshold), max(scores.max(), threshold)
    high = high if high > low else low + 1
    counts = [np.histogram(scores[labels == x], BINS, (low, high))[0] for x in (0, 1)]
    shares = [count / max(count.sum(), 1) for count in counts]
    normal, anomalous = (share / max(share.max() for share in shares) for share in shares)
    return {
        "normal": normal.round(3).tolist(),
        "anomalous": anomalous.round(3).tolist(),
        "threshold": float((threshold - low) / (high - low)),
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
