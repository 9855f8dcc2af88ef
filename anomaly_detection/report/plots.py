"""Plots of trainings, images and detection by size; those of metrics are in `metrics`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from anomaly_detection.data.format import visible
from anomaly_detection.metrics.visualization import (
    ANOMALOUS,
    NEUTRAL,
    NORMAL,
    finished,
    new_axes,
    plot_nothing,
)
from anomaly_detection.report.history import history_curves

LINES = ((NORMAL, "-"), (ANOMALOUS, "--"), ("#009E73", "-."), ("#CC79A7", ":"))


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
    figure, axes = new_axes(title, "Epoch", "Loss" if title == "Loss" else "Value")
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
    return finished(figure, save_path)


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
    return finished(figure, save_path)


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
    figure, axes = new_axes(title, f"Size, {unit}", "Detection rate")
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
    return finished(figure, save_path)
