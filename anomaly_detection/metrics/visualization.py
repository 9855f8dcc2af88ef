"""Plots of metrics and scores, each as a Figure and, given `save_path`, as a PNG file.

The colours are those of Okabe and Ito, which can be told apart with any colour vision.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from sklearn.metrics import confusion_matrix

from anomaly_detection.metrics.auroc import compute_auroc, compute_average_precision
from anomaly_detection.metrics.curves import precision_recall, roc

NORMAL, ANOMALOUS, NEUTRAL = "#0072B2", "#D55E00", "#555555"
TRUTHS, VERDICTS = ("good", "defective"), ("passed", "rejected")  # of the labels 0 and 1
ONE_CLASS = "not defined: the test images are all of one class"


def plot_roc_curve(
    scores: ArrayLike, labels: ArrayLike, save_path: str | Path | None = None
) -> Figure:
    """ROC curve with its area. Labels are 0 or 1; both have shape (N,).

    Raises:
        ValueError: As in `metrics.auroc.check_scores_and_labels`.
    """
    return draw_roc_curve(roc(scores, labels), compute_auroc(scores, labels), save_path)


def draw_roc_curve(
    points: np.ndarray, auroc: float | None, save_path: str | Path | None = None
) -> Figure:
    """ROC curve through points (K, 2 or more); without points, a picture that says so."""
    if not len(points):
        return plot_nothing(ONE_CLASS, save_path)
    figure, axes = new_axes("ROC curve", "False-reject rate", "Detection rate")
    axes.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", label="chance")
    axes.plot(*points.T[:2], color=NORMAL, linewidth=2, label=f"AUROC {auroc:.3f}")
    _unit_square(axes)
    return finished(figure, save_path)


def plot_precision_recall_curve(
    scores: ArrayLike, labels: ArrayLike, save_path: str | Path | None = None
) -> Figure:
    """Precision-recall curve with average precision. Labels are 0 or 1; both have shape (N,).

    Raises:
        ValueError: As in `metrics.auroc.check_scores_and_labels`.
    """
    points = precision_recall(scores, labels)
    average = compute_average_precision(scores, labels)
    chance = float(np.mean(np.asarray(labels)))
    return draw_precision_recall_curve(points, average, chance, save_path)


def draw_precision_recall_curve(
    points: np.ndarray,
    average_precision: float | None,
    chance: float,
    save_path: str | Path | None = None,
) -> Figure:
    """Precision-recall curve through points (K, 2); without points, a picture that says so."""
    if not len(points):
        return plot_nothing(ONE_CLASS, save_path)
    figure, axes = new_axes("Precision and recall", "Recall (detection rate)", "Precision")
    axes.axhline(chance, color=NEUTRAL, linestyle=":", label=f"chance ({chance:.2f})")
    name = f"average precision {average_precision:.3f}"
    axes.step(*points.T, color=NORMAL, linewidth=2, where="post", label=name)
    _unit_square(axes)
    return finished(figure, save_path)


def plot_score_histogram(
    scores: ArrayLike,
    labels: ArrayLike,
    threshold: float | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Scores of good and defective images as shares of their class, with the threshold."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    edges = np.histogram_bin_edges(scores, bins=40).tolist()
    figure, axes = new_axes("Image scores", "Score", "Share of the images")
    for label, (name, color) in enumerate(zip(TRUTHS, (NORMAL, ANOMALOUS), strict=True)):
        chosen = scores[labels == label]
        if len(chosen):
            axes.hist(
                chosen,
                edges,
                weights=np.full(len(chosen), 1 / len(chosen)),
                label=f"{name} ({len(chosen)})",
                color=color,
                alpha=0.6,
                hatch="//" if label else None,
            )
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    axes.legend(frameon=False)
    return finished(figure, save_path)


def plot_confusion_matrix(
    predictions: ArrayLike, labels: ArrayLike, save_path: str | Path | None = None
) -> Figure:
    """Counts of good and defective images by verdict. Both are 0 or 1, shape (N,)."""
    counts = confusion_matrix(labels, predictions, labels=[0, 1])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = new_axes("Confusion matrix", "Verdict", "Truth", grid=False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(2, 2):
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=14)
    axes.set_xticks([0, 1], VERDICTS)
    axes.set_yticks([0, 1], TRUTHS, rotation=90, va="center")
    return finished(figure, save_path)


def plot_nothing(reason: str, save_path: str | Path | None = None) -> Figure:
    """A picture that says why there is no plot."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    figure.text(0.5, 0.5, reason, ha="center", va="center", wrap=True)
    return finished(figure, save_path)


def new_axes(title: str, xlabel: str, ylabel: str, grid: bool = True) -> tuple[Figure, Axes]:
    """A figure with one plot in the style of all."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, axes


def _unit_square(axes: Axes) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.legend(loc="lower right", frameon=False)


def finished(figure: Figure, save_path: str | Path | None) -> Figure:
    """The figure, written if there is a path: the same plot gives the same bytes."""
    if save_path is not None:
        Path(save_path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(save_path, dpi=150, metadata={"Software": None})  # not matplotlib's version
    return figure
