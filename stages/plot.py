"""Curves as data for DVC, and pictures: predictions, metrics -> plots/<category>.

What the report shows of the category goes to figures/<category>.json.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from anomaly_detection.config import Plots, load_config
from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.metrics import visualization as figures
from anomaly_detection.metrics.curves import precision_recall, roc
from anomaly_detection.thumbnails import thumbnails
from stages import run, write_json


def main(category: str) -> None:
    """Plot the results of `category`."""
    plots = load_config().plots
    predictions, output = Path("predictions") / category, Path("plots") / category
    history, metrics = (
        json.loads((Path("metrics") / category / name).read_text())
        for name in ("train.json", "evaluate.json")
    )
    with (predictions / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    maps = np.load(predictions / "anomaly_maps.npy", mmap_mode="r")
    test = PreparedArrays(Path("data/prepared") / category, "test")

    curves = plot_scores(rows, metrics["threshold"], output)
    plot_loss(history, output)
    plot_detection(metrics.get("synthetic"), output)
    plot_gallery(rows, test, maps, metrics["threshold"], plots, output)
    map_limit = float(max(image.max() for image in maps)) or 1.0
    masks = [test.mask(i) for i in range(len(test))]
    small = thumbnails(test.pictures(), maps, masks, map_limit)
    content = {
        "name": category,
        "metrics": metrics,
        "training": history,
        "curves": curves,
        "images": [describe(row) | pictures for row, pictures in zip(rows, small, strict=True)],
        "colors": colormaps[plots.colormap](np.arange(256), bytes=True)[:, :3].ravel().tolist(),
        "map_limit": map_limit,
    }
    write_json(Path("figures") / f"{category}.json", content, indent=None)


def describe(row: dict[str, str]) -> dict[str, Any]:
    """What the report says of an image; the score is exactly what was compared."""
    return {
        "path": row["path"],
        "defect_type": row["defect_type"],
        "label": int(row["label"]),
        "score": float(np.float32(row["score"])),
    }


def plot_scores(rows: list[dict[str, str]], threshold: float, output: Path) -> dict[str, list]:
    """Histogram, confusion matrix and curves; returns the latter's points."""
    labels, verdicts = (
        np.array([int(row[column]) for row in rows]) for column in ("label", "pred_label")
    )
    scores = np.array([float(row["score"]) for row in rows])
    figures.plot_score_histogram(labels, scores, threshold, output / "scores.png")
    figures.plot_confusion_matrix(labels, verdicts, output / "confusion_matrix.png")
    names = np.array(["normal", "anomalous"])
    write_csv(output / "confusion_matrix.csv", truth=names[labels], verdict=names[verdicts])
    return plot_curves(labels, scores, output)


def plot_curves(labels: np.ndarray, scores: np.ndarray, output: Path) -> dict[str, list]:
    """ROC and precision-recall, which one class alone does not have: then without a line.

    Returns their points for the report.
    """
    defined = len(np.unique(labels)) == 2
    if defined:
        figures.plot_roc_curve(labels, scores, output / "roc.png")
        figures.plot_precision_recall_curve(labels, scores, output / "precision_recall.png")
        curves = {"roc": roc(labels, scores), "precision_recall": precision_recall(labels, scores)}
    else:
        for name in ("roc", "precision_recall"):
            reason = "not defined: the test images are of one class only"
            figures.plot_nothing(reason, output / f"{name}.png")
        curves = {"roc": np.empty((0, 4)), "precision_recall": np.empty((0, 2))}
    false_rejects, detected, low, high = curves["roc"].T
    columns = {"false_reject_rate": false_rejects, "detection_rate": detected}
    write_csv(output / "roc.csv", **columns, low=low, high=high)
    recall, precision = curves["precision_recall"].T
    write_csv(output / "precision_recall.csv", recall=recall, precision=precision)
    return {name: points.round(4).tolist() for name, points in curves.items()} if defined else {}


def plot_loss(training: dict[str, Any], output: Path) -> None:
    """Training and validation loss by epoch."""
    epochs, fit, validation = (
        [row[key] for row in training["history"]] for key in ("epoch", "train_loss", "val_loss")
    )
    figures.plot_losses(fit, validation, training["best_epoch"], output / "loss.png")
    splits = ["training"] * len(epochs) + ["validation"] * len(epochs)
    write_csv(output / "loss.csv", epoch=epochs * 2, loss=fit + validation, split=splits)


def plot_detection(synthetic: dict[str, Any] | None, output: Path) -> None:
    """Probability of detection against size, if there were synthetic defects."""
    curve = synthetic["detection_by_size"] if synthetic else []
    if synthetic:
        figures.plot_detection_by_size(
            curve,
            synthetic["size_detected_in_90_percent"],
            synthetic["rejected_without_defect"],
            output / "detection.png",
        )
    else:
        reason = "no synthetic defects: evaluation.synthetic_images is 0, or no normal test image"
        figures.plot_nothing(reason, output / "detection.png")
    columns = {key: [row[key] for row in curve] for key in ("size", "detection_rate")}
    write_csv(output / "detection.csv", **columns)


def plot_gallery(
    rows: list[dict[str, str]],
    test: PreparedArrays,
    maps: np.ndarray,
    threshold: float,
    plots: Plots,
    output: Path,
) -> None:
    """Images with their maps: the highest scores, those nearest to the threshold, the lowest."""
    scores = np.array([float(row["score"]) for row in rows])
    chosen = {
        "highest scores": -scores,
        "nearest to the threshold": np.abs(scores - threshold),
        "lowest scores": scores,
    }
    figures.plot_gallery(
        test.pictures(),
        maps,
        [
            f"{Path(row['path']).name}\n{row['defect_type']}, {float(row['score']):.3g}"
            for row in rows
        ],
        {
            name: np.argsort(order, kind="stable")[: plots.gallery_size]
            for name, order in chosen.items()
        },
        color_limit=float(np.quantile([image.max() for image in maps], 0.9)),
        colormap=plots.colormap,
        save_path=output / "gallery.png",
    )


def write_csv(path: Path, **columns: Sequence[Any]) -> None:
    """Columns of equal length as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


if __name__ == "__main__":
    run(main, note_cost=True)
