"""Curves as data for DVC, and everything as pictures: predictions, metrics -> plots/<category>."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from anomaly_detection.config import load_config
from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.metrics import visualization as figures
from stages import run


def main(category: str) -> None:
    """Plot the results of `category`."""
    plots = load_config().plots
    predictions, output = Path("predictions") / category, Path("plots") / category
    history = json.loads((Path("metrics") / category / "train.json").read_text())
    metrics = json.loads((predictions / "evaluate.json").read_text())
    threshold = metrics["threshold"]
    with (predictions / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([int(row["label"]) for row in rows])
    scores = np.array([float(row["score"]) for row in rows])
    verdicts = np.array([int(row["pred_label"]) for row in rows])

    plot_curves(labels, scores, output)
    figures.plot_score_histogram(labels, scores, threshold, output / "scores.png")
    figures.plot_confusion_matrix(labels, verdicts, output / "confusion_matrix.png")
    names = np.array(["normal", "anomalous"])
    write_csv(output / "confusion_matrix.csv", truth=names[labels], verdict=names[verdicts])
    epochs, training, validation = (
        [row[key] for row in history["history"]] for key in ("epoch", "train_loss", "val_loss")
    )
    figures.plot_losses(training, validation, history["best_epoch"], output / "loss.png")
    splits = ["training"] * len(epochs) + ["validation"] * len(epochs)
    write_csv(output / "loss.csv", epoch=epochs * 2, loss=training + validation, split=splits)

    plot_detection(metrics.get("synthetic"), output)

    captions = [
        f"{Path(row['path']).name}\n{row['defect_type']}, {float(row['score']):.3g}" for row in rows
    ]
    maps = np.load(predictions / "anomaly_maps.npy", mmap_mode="r")
    figures.plot_gallery(
        PreparedArrays(Path("data/prepared") / category, "test").pictures(),
        maps,
        captions,
        choose_rows(scores, threshold, plots.gallery_size),
        color_limit=float(np.quantile([image.max() for image in maps], 0.9)),
        colormap=plots.colormap,
        save_path=output / "gallery.png",
    )


def plot_curves(labels: np.ndarray, scores: np.ndarray, output: Path) -> None:
    """ROC and precision-recall, which one class alone does not have: then without a line."""
    if len(np.unique(labels)) == 2:
        figures.plot_roc_curve(labels, scores, output / "roc.png")
        figures.plot_precision_recall_curve(labels, scores, output / "precision_recall.png")
        false_rejects, detected, _ = roc_curve(labels, scores)
        precision, recall, _ = precision_recall_curve(labels, scores)
    else:
        for name in ("roc", "precision_recall"):
            reason = "not defined: the test images are of one class only"
            figures.plot_nothing(reason, output / f"{name}.png")
        false_rejects = detected = precision = recall = np.array([])
    write_csv(output / "roc.csv", false_reject_rate=false_rejects, detection_rate=detected)
    write_csv(output / "precision_recall.csv", recall=recall, precision=precision)


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


def choose_rows(scores: np.ndarray, threshold: float, count: int) -> dict[str, np.ndarray]:
    """Which test images the gallery shows, `count` in each row."""
    return {
        "highest scores": np.argsort(-scores, kind="stable")[:count],
        "nearest to the threshold": np.argsort(np.abs(scores - threshold), kind="stable")[:count],
        "lowest scores": np.argsort(scores, kind="stable")[:count],
    }


def write_csv(path: Path, **columns: Sequence[Any]) -> None:
    """Columns of equal length as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


if __name__ == "__main__":
    run(main)
