"""The page: metrics and pictures of all categories, in one file that opens from disk.

The same results give the same bytes. What differs by run although they do not is in a script beside
it, which names the results that it belongs to.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from anomaly_detection.files import fingerprint
from anomaly_detection.report.advice import next_steps

HERE = Path(__file__).parent
BINS = 36
NONE = "–"
SCRIPTS = ("charts.js", "report.js", "facts.js")
# The script does not need these.
NOT_FOR_THE_SCRIPT = ("training", "parity", "pairs", "peaks", "sides")


def render(categories: list[dict[str, Any]]) -> str:
    """The report as HTML, with its style, script, pictures and data inside.

    Args:
        categories: For each, what `category.page_data` returns, with `parity`: what the exports
            were found to do.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # curves keep their order
    shown = {category["name"]: headlines(category) for category in categories}
    return environment.get_template("page.html").render(
        categories=categories,
        headlines=shown,
        titles={row["name"]: row["title"] for rows in shown.values() for row in rows},
        cells={
            name: {row["name"]: row["text"](row["value"]) for row in rows}
            for name, rows in shown.items()
        },
        histograms={category["name"]: histogram(category) for category in categories},
        has_maps=any(image.get("map") for category in categories for image in category["images"]),
        parameters=side_by_side([flat(x["training"]["parameters"]) for x in categories]),
        fits=side_by_side([fit(x["training"]) for x in categories]),
        results=fingerprint(categories, []),
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        script="".join((HERE / name).read_text("utf-8") for name in SCRIPTS),
        data=[
            {key: value for key, value in category.items() if key not in NOT_FOR_THE_SCRIPT}
            | {"best_epoch": category["training"]["best_epoch"], "next": next_steps(category)}
            for category in categories
        ],
    )


def facts_script(categories: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The script `run.js`, by which the page of these categories shows the facts of a run.

    Args:
        categories: As given to `render`.
        facts: `revision`, `made` and `commands`; `trends`: for each category a dict of `Trend`, or
            a text that says why there are none; `times`, a list with the cost of each stage;
            `speeds`, for each category those of its exports; and `next`, for each category what to
            try next, by what `tools.select` has found as well.
    """
    content = {"results": fingerprint(categories, []), **facts}
    return f"const RUN = {json.dumps(content, indent=1)};\n"


def headlines(category: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of the first screen, each with what a reader needs to judge it.

    Without defective test images, synthetic defects come first.
    """
    metrics = category["metrics"]
    bounds = metrics["calibration"]["false_reject_rate"]
    notes = {
        "image_auroc": "share of (good, defective) pairs that the scores rank correctly",
        "false_reject_rate": (
            f"{metrics['num_false_rejects']} of {metrics['num_normal']} good images; expected "
            f"{_percent(bounds['expected'])}, at most {_percent(bounds['upper_95'])} (95 %), from "
            f"{metrics['calibration']['num_images']} calibration images"
        ),
        "miss_rate": f"{metrics['num_misses']} of {metrics['num_anomalous']} defective images",
    }
    titles = {
        "image_auroc": "Image AUROC",
        "false_reject_rate": "False rejects",
        "miss_rate": "Misses",
    }
    first = []
    if not metrics["num_anomalous"]:
        first = [synthetic_headline(metrics)]
        titles = {"false_reject_rate": titles["false_reject_rate"]}
    return first + [
        {
            "name": name,
            "title": title,
            "value": metrics[name],
            "interval": metrics["intervals"][name],
            "text": _number if name == "image_auroc" else _percent,
            "note": notes[name] if metrics[name] is not None else metrics["undefined"][name],
        }
        for name, title in titles.items()
    ]


def synthetic_headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The size of synthetic defects that are detected, as a row of `headlines`."""
    synthetic, unit = metrics.get("synthetic"), metrics["size_unit"]
    short = unit["name"].split()[0]
    size = synthetic and synthetic["size_detected_in_90_percent"]
    if not synthetic:
        note = "not measured: evaluation.synthetic_images is 0"
    elif size is None:
        note = f"of {synthetic['num_images']}, less than 90 % are detected at the largest size"
    else:
        note = f"size, {unit['name']}, from which on 90 % of {synthetic['num_images']} are detected"
    return {
        "name": "size_detected",
        "title": "Synthetic defects",
        "value": size,
        "interval": None,
        "text": lambda x: NONE if x is None else f"{unit['per_side'] * x:.3g}\u00a0{short}",
        "note": f"{note}; there are no defective test images",
    }


def histogram(category: dict[str, Any]) -> dict[str, Any]:
    """Scores of each class as shares in BINS bins, scaled to [0, 1], and the threshold's place."""
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


def fit(training: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was fitted, from train.json, but for its parameters."""
    titles = {"cpu": "CPU", "gpu": "GPU", "instructions": "instruction set"}
    return {
        "model": training["model"],
        "kept epoch": NONE if training["best_epoch"] is None else training["best_epoch"],
        "device": training["device"],
        "precision": training["precision"],
        **{titles.get(key, key): value for key, value in training["hardware"].items()},
        **training["versions"],
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys like training.learning_rate."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        result |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return result


def side_by_side(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of a key and its value in each column, as texts; a dash where a column has no such key.

    Keys with the same section, what is before their last dot, stay together.
    """
    found = dict.fromkeys(key for column in columns for key in column)
    sections = list(dict.fromkeys(key.rpartition(".")[0] for key in found))
    keys = sorted(found, key=lambda key: sections.index(key.rpartition(".")[0]))
    return [(key, [_text(x[key]) if key in x else NONE for x in columns]) for key in keys]


def _text(value: Any) -> str:
    """As params.yaml has it, but for quotes."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return json.dumps(value)


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}\u00a0%"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
