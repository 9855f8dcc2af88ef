"""Plots of metrics, scores and images, each as a Figure and, given `save_path`, as a PNG file.

The colours are those of Okabe and Ito, which can be told apart with any colour vision.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from sklearn.metrics import confusion_matrix

from anomaly_detection.data.format import visible
from anomaly_detection.metrics.curves import precision_recall, roc
from anomaly_detection.metrics.image import compute_auroc, compute_average_precision
from anomaly_detection.report.history import history_curves

NORMAL, ANOMALOUS, NEUTRAL = "#0072B2", "#D55E00", "#555555"
LINES = ((NORMAL, "-"), (ANOMALOUS, "--"), ("#009E73", "-."), ("#CC79A7", ":"))
TRUTHS, VERDICTS = ("good", "defective"), ("passed", "rejected")  # of the labels 0 and 1
ONE_CLASS = "not defined: the test images are all of one class"


def plot_roc_curve(
    labels: ArrayLike, scores: ArrayLike, save_path: str | Path | None = None
) -> Figure:
    """ROC curve with its area. Labels are 0 or 1; both have shape (N,).

    Raises:
        ValueError: There is only one class, or the arrays do not match.
    """
    return draw_roc_curve(roc(labels, scores), compute_auroc(labels, scores), save_path)


def draw_roc_curve(
    points: np.ndarray, auroc: float | None, save_path: str | Path | None = None
) -> Figure:
    """ROC curve through points (K, 2 or more); without points, a picture that says so."""
    if not len(points):
        return plot_nothing(ONE_CLASS, save_path)
    figure, axes = _axes("ROC curve", "False-reject rate", "Detection rate")
    axes.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", label="chance")
    axes.plot(*points.T[:2], color=NORMAL, linewidth=2, label=f"AUROC {auroc:.3f}")
    _unit_square(axes)
    return _finish(figure, save_path)


def plot_precision_recall_curve(
    labels: ArrayLike, scores: ArrayLike, save_path: str | Path | None = None
) -> Figure:
    """Precision-recall curve with average precision. Labels are 0 or 1; both have shape (N,).

    Raises:
        ValueError: There is only one class, or the arrays do not match.
    """
    points = precision_recall(labels, scores)
    average = compute_average_precision(labels, scores)
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
    figure, axes = _axes("Precision and recall", "Recall (detection rate)", "Precision")
    axes.axhline(chance, color=NEUTRAL, linestyle=":", label=f"chance ({chance:.2f})")
    name = f"average precision {average_precision:.3f}"
    axes.step(*points.T, color=NORMAL, linewidth=2, where="post", label=name)
    _unit_square(axes)
    return _finish(figure, save_path)


def plot_score_histogram(
    labels: ArrayLike,
    scores: ArrayLike,
    threshold: float | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Scores of good and defective images as shares of their class, with the threshold."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    edges = np.histogram_bin_edges(scores, bins=40).tolist()
    figure, axes = _axes("Image scores", "Score", "Share of the images")
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
    return _finish(figure, save_path)


def plot_confusion_matrix(
    labels: ArrayLike, predictions: ArrayLike, save_path: str | Path | None = None
) -> Figure:
    """Counts of good and defective images by verdict. Both are 0 or 1, shape (N,)."""
    counts = confusion_matrix(labels, predictions, labels=[0, 1])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _axes("Confusion matrix", "Verdict", "Truth", grid=False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(2, 2):
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=14)
    axes.set_xticks([0, 1], VERDICTS)
    axes.set_yticks([0, 1], TRUTHS, rotation=90, va="center")
    return _finish(figure, save_path)


def plot_losses(
    history: Sequence[Mapping[str, Any]],
    best_epoch: int | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Losses by epoch, or other metrics where no loss was recorded; see `history_curves`.

    Args:
        history: A dict for each epoch, with `epoch`. None of them makes a picture that says so.
        best_epoch: The epoch that was kept, if any.
        save_path: PNG to write.
    """
    title, curves = history_curves(history)
    if not curves:
        return plot_nothing("this model is not trained in epochs", save_path)
    figure, axes = _axes(title, "Epoch", "Loss" if title == "Loss" else "Value")
    for k, (label, points) in enumerate(curves.items()):
        color, style = LINES[k % len(LINES)]
        axes.plot(*zip(*points, strict=True), color=color, marker=".", linestyle=style, label=label)
    if best_epoch:
        label = f"kept: epoch {best_epoch}"
        axes.axvline(best_epoch, color=NEUTRAL, linestyle=":", label=label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    if axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _finish(figure, save_path)


def plot_gallery(
    images: ArrayLike,
    anomaly_maps: ArrayLike | None,
    captions: Sequence[str],
    rows: Mapping[str, Sequence[int] | np.ndarray],
    color_limit: float = 1.0,
    colormap: str = "inferno",
    save_path: str | Path | None = None,
    *,
    color_low: float = 0.0,
    aspects: Sequence[float] | None = None,
) -> Figure:
    """Images in named rows, above their heat maps on one colour scale if there are maps.

    Args:
        images: uint8 or uint16 of shape (N, 3 or more, H, W), of which 8 bits of 3 are shown.
        anomaly_maps: Shape (N, H, W), or None for the images alone.
        captions: N texts.
        rows: For each row's title, which of the N images it shows.
        color_limit: The map value with the brightest colour; the scale goes by the square root.
        colormap: By matplotlib's names.
        save_path: PNG to write.
        color_low: The map value with the darkest colour.
        aspects: N ratios of width to height to show the images and maps in; None: W / H.
    """
    images = np.asarray(images)
    maps = None if anomaly_maps is None else np.asarray(anomaly_maps)
    columns = max(len(chosen) for chosen in rows.values())
    height = 2.1 if maps is None else 3.9
    figure = Figure(figsize=(1.6 * columns + 1.0, height * len(rows)), layout="constrained")
    norm = PowerNorm(0.5, color_low, color_limit if color_limit > color_low else color_low + 1)
    panels = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for panel, (title, chosen) in zip(panels, rows.items(), strict=True):
        panel.suptitle(title, fontsize=12, fontweight="bold")
        cells = panel.subplots(1 if maps is None else 2, columns, squeeze=False)
        for cell in cells.flat:
            cell.set_axis_off()
        for column, index in zip(cells.T, chosen, strict=False):
            picture = np.moveaxis(visible(images[index]), 0, -1)
            height, width = picture.shape[:2]
            ratio = 1.0 if aspects is None else width / height / aspects[index]  # of a pixel
            column[0].imshow(picture, aspect=ratio)
            column[0].set_title(captions[index], fontsize=8)
            if maps is not None:
                column[1].imshow(picture.mean(axis=-1), cmap="gray", aspect=ratio)
                heat = column[1].imshow(
                    maps[index], cmap=colormap, norm=norm, alpha=0.65, aspect=ratio
                )
        if maps is not None:
            panel.colorbar(heat, ax=cells, label="anomaly map", fraction=0.05, aspect=40)
    return _finish(figure, save_path)


def plot_detection_by_size(
    curve: Sequence[Mapping[str, float]],
    size_detected: float | None = None,
    rejected_without_defect: float | None = None,
    save_path: str | Path | None = None,
    *,
    unit: str = "% of the image's side",
    per_side: float = 100,
    num_without_defect: int | None = None,
    interval: Sequence[float] | None = None,
) -> Figure:
    """Probability of detection against defect size, with its 95 % interval.

    Args:
        curve: Rows with `size` (a share of the image's side), `detection_rate`, `low` and `high`.
            None of them makes a picture that says so.
        size_detected: Marked, if given.
        rejected_without_defect: Share of the same images that is rejected without a defect.
        save_path: PNG to write.
        unit: What sizes are shown in.
        per_side: How many of it are a side.
        num_without_defect: How many images that share is of, if known.
        interval: The 95 % interval of that share, likewise.
    """
    if not curve:
        return plot_nothing("not measured: there were no synthetic defects", save_path)
    sizes, rates, lows, highs = (
        np.array([row[key] for row in curve]) for key in ("size", "detection_rate", "low", "high")
    )
    sizes = per_side * sizes
    title = "Detection of synthetic defects"
    figure, axes = _axes(title, f"Size, {unit}", "Detection rate")
    axes.fill_between(sizes, lows, highs, color=NORMAL, alpha=0.2, label="95 % interval")
    axes.plot(sizes, rates, color=NORMAL, marker="o", linewidth=2)
    axes.axhline(0.9, color=NEUTRAL, linestyle=":")
    if size_detected is not None:
        at = per_side * size_detected
        label = f"90 % from {at:.3g} {unit.split()[0]}"
        axes.axvline(at, color="black", linestyle="--", label=label)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(-0.01, 1.01)
    if rejected_without_defect is not None:
        label = f"without a defect: {rejected_without_defect:.0%}"
        if num_without_defect is not None:
            label += f" of {num_without_defect} images rejected"
        if interval is not None:
            label += f"\n(95 %: {interval[0]:.0%} to {interval[1]:.0%})"
        axes.axhline(rejected_without_defect, color=ANOMALOUS, linestyle="-.", label=label)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9)
    return _finish(figure, save_path)


def plot_nothing(reason: str, save_path: str | Path | None = None) -> Figure:
    """A picture that says why there is no plot."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    figure.text(0.5, 0.5, reason, ha="center", va="center", wrap=True)
    return _finish(figure, save_path)


def _axes(title: str, xlabel: str, ylabel: str, grid: bool = True) -> tuple[Figure, Axes]:
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
        # Without matplotlib's version in the header, the same plot gives the same bytes.
        figure.savefig(save_path, dpi=150, metadata={"Software": None})
    return figure
