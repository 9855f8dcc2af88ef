"""Pictures of figures. Each function returns a Figure and, given `save_path`, writes it as PNG.

Colours are of the Okabe-Ito palette, which people with any colour vision tell apart.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, confusion_matrix

from anomaly_detection.metrics.curves import precision_recall, roc
from anomaly_detection.metrics.image import compute_auroc

NORMAL, ANOMALOUS, NEUTRAL = "#0072B2", "#D55E00", "#555555"


def plot_roc_curve(
    labels: ArrayLike, scores: ArrayLike, save_path: str | Path | None = None
) -> Figure:
    """ROC curve with its area, of labels 0 or 1 and scores, shape (N,).

    Raises:
        ValueError: There is one class only, or the arrays do not fit.
    """
    false_rejects, detected, *_ = roc(labels, scores).T
    figure, axes = _figure("ROC curve", "False-reject rate", "Detection rate")
    axes.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", label="chance")
    area = compute_auroc(labels, scores)
    axes.plot(false_rejects, detected, color=NORMAL, linewidth=2, label=f"AUROC {area:.3f}")
    _unit_square(axes)
    return _finish(figure, save_path)


def plot_precision_recall_curve(
    labels: ArrayLike, scores: ArrayLike, save_path: str | Path | None = None
) -> Figure:
    """Precision-recall curve with average precision, of labels 0 or 1 and scores, shape (N,).

    Raises:
        ValueError: There is one class only, or the arrays do not fit.
    """
    recall, precision = precision_recall(labels, scores).T
    figure, axes = _figure("Precision and recall", "Recall (detection rate)", "Precision")
    share = np.mean(labels)
    axes.axhline(share, color=NEUTRAL, linestyle=":", label=f"chance ({share:.2f})")
    name = f"average precision {average_precision_score(labels, scores):.3f}"
    axes.step(recall, precision, color=NORMAL, linewidth=2, where="post", label=name)
    _unit_square(axes)
    return _finish(figure, save_path)


def plot_score_histogram(
    labels: ArrayLike,
    scores: ArrayLike,
    threshold: float | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Scores of normal and anomalous images, as shares of their kind, with the threshold."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    edges = np.histogram_bin_edges(scores, bins=40)
    figure, axes = _figure("Image scores", "Score", "Share of the images")
    for label, name, color in ((0, "normal", NORMAL), (1, "anomalous", ANOMALOUS)):
        chosen = scores[labels == label]
        if len(chosen):
            weights = np.full(len(chosen), 1 / len(chosen))
            style = {"color": color, "alpha": 0.6, "hatch": "//" if label else None}
            axes.hist(chosen, edges, weights=weights, label=f"{name} ({len(chosen)})", **style)
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    axes.legend(frameon=False)
    return _finish(figure, save_path)


def plot_confusion_matrix(
    labels: ArrayLike, predictions: ArrayLike, save_path: str | Path | None = None
) -> Figure:
    """Counts of normal and anomalous images by verdict, of labels and predictions 0 or 1, (N,)."""
    counts = confusion_matrix(labels, predictions, labels=[0, 1])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _figure("Confusion matrix", "Verdict", "Truth", grid=False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(2, 2):
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=14)
    axes.set_xticks([0, 1], ["normal", "anomalous"])
    axes.set_yticks([0, 1], ["normal", "anomalous"], rotation=90, va="center")
    return _finish(figure, save_path)


def plot_losses(
    training: Sequence[float],
    validation: Sequence[float],
    best_epoch: int | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Training and validation loss of each epoch, counted from 1, and the epoch that was kept."""
    epochs = np.arange(1, len(training) + 1)
    figure, axes = _figure("Loss", "Epoch", "Loss")
    axes.plot(epochs, training, color=NORMAL, marker=".", label="training")
    axes.plot(epochs, validation, color=ANOMALOUS, marker=".", linestyle="--", label="validation")
    if best_epoch:
        axes.axvline(best_epoch, color=NEUTRAL, linestyle=":", label=f"kept: epoch {best_epoch}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _finish(figure, save_path)


def plot_gallery(
    images: ArrayLike,
    anomaly_maps: ArrayLike,
    captions: Sequence[str],
    rows: dict[str, Sequence[int]],
    color_limit: float,
    colormap: str = "inferno",
    save_path: str | Path | None = None,
) -> Figure:
    """Images above their heat maps, in named rows, all on one colour scale.

    Args:
        images: uint8 of shape (N, 3, H, W).
        anomaly_maps: Shape (N, H, W), not negative.
        captions: N texts.
        rows: For each row's title, which of the N images it shows.
        color_limit: The map value with the brightest colour; the scale goes by its square root.
        colormap: By matplotlib's names.
        save_path: PNG to write.
    """
    columns = max(len(chosen) for chosen in rows.values())
    figure = Figure(figsize=(1.6 * columns + 1.0, 3.9 * len(rows)), layout="constrained")
    norm = PowerNorm(0.5, 0, max(color_limit, np.finfo(np.float32).tiny))
    panels = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for panel, (title, chosen) in zip(panels, rows.items(), strict=True):
        panel.suptitle(title, fontsize=12, fontweight="bold")
        cells = panel.subplots(2, columns, squeeze=False)
        for cell in cells.flat:
            cell.set_axis_off()
        for (above, below), index in zip(cells.T, chosen, strict=False):
            picture = np.moveaxis(np.asarray(images[index]), 0, -1)
            above.imshow(picture)
            above.set_title(captions[index], fontsize=8)
            below.imshow(picture.mean(axis=-1), cmap="gray")
            heat = below.imshow(anomaly_maps[index], cmap=colormap, norm=norm, alpha=0.65)
        panel.colorbar(heat, ax=cells, label="anomaly map", fraction=0.05, aspect=40)
    return _finish(figure, save_path)


def plot_detection_by_size(
    curve: Sequence[dict[str, float]],
    size_detected: float | None = None,
    rejected_without_defect: float | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Probability of detection against defect size, with its limits.

    Args:
        curve: Rows with `size` (a share of the image's side), `detection_rate`, `low` and `high`.
        size_detected: Marked, if there is one.
        rejected_without_defect: Share of the same images that is rejected as it is.
        save_path: PNG to write.
    """
    sizes, rates, lows, highs = (
        np.array([row[key] for row in curve]) for key in ("size", "detection_rate", "low", "high")
    )
    title = "Detection of synthetic defects"
    figure, axes = _figure(title, "Size, % of the image's side", "Detection rate")
    axes.fill_between(100 * sizes, lows, highs, color=NORMAL, alpha=0.2, label="95 % interval")
    axes.plot(100 * sizes, rates, color=NORMAL, marker="o", linewidth=2)
    axes.axhline(0.9, color=NEUTRAL, linestyle=":")
    if size_detected is not None:
        label = f"90 % from {100 * size_detected:.1f} %"
        axes.axvline(100 * size_detected, color="black", linestyle="--", label=label)
    axes.set_xscale("log")
    axes.set_xticks(100 * sizes, [f"{100 * size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(-0.01, 1.01)
    if rejected_without_defect is not None:
        label = f"without a defect {rejected_without_defect:.0%}"
        axes.axhline(rejected_without_defect, color=ANOMALOUS, linestyle="-.", label=label)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9)
    return _finish(figure, save_path)


def plot_nothing(reason: str, save_path: str | Path | None = None) -> Figure:
    """A picture that says why there is none."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    figure.text(0.5, 0.5, reason, ha="center", va="center", wrap=True)
    return _finish(figure, save_path)


def _figure(title: str, xlabel: str, ylabel: str, grid: bool = True) -> tuple[Figure, Axes]:
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


def _finish(figure: Figure, save_path: str | Path | None) -> Figure:
    if save_path is not None:
        Path(save_path).parent.mkdir(parents=True, exist_ok=True)
        # Without the version in its header, the same figure is the same file.
        figure.savefig(save_path, dpi=150, metadata={"Software": None})
    return figure
