"""The results of one category as plots, as tables, and as the data of the report's page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps

from anomaly_detection.metrics import visualization
from anomaly_detection.metrics.curves import precision_recall, roc
from anomaly_detection.metrics.intervals import share_interval
from anomaly_detection.report import plots
from anomaly_detection.report.history import history_curves
from anomaly_detection.report.thumbnails import thumbnails

BORDER = 16  # the border of a map is this part of its side wide

Table = dict[str, Sequence[Any]]  # columns of equal length, by name


class Pair(NamedTuple):
    """Two near-duplicates: uint8 or uint16 (2, C, S, S), and the aspects to show them with."""

    pictures: np.ndarray
    aspects: tuple[float, float]


@dataclass(frozen=True)
class CategoryResults:
    """What is known of a category and its N test images.

    Attributes:
        name: The category.
        training: train.json: the model and how it was fitted.
        metrics: evaluate.json.
        rows: scores.csv, a dict of texts for each image.
        pictures: As in images.npy of `data.arrays`: squares, whatever they show.
        maps: Anomaly maps (N, S, S), of any sign; None if the model gives none.
        masks: N masks uint8 (S, S), or None.
        aspects: Width / height that each picture is shown with.
        pairs: The two pictures of each of the first near-duplicates in the metrics.
        side: The shortest side, in pixels, of what is seen of all images; None if they are tiled.
    """

    name: str
    training: Mapping[str, Any]
    metrics: Mapping[str, Any]
    rows: Sequence[Mapping[str, str]]
    pictures: np.ndarray
    maps: np.ndarray | None
    masks: Sequence[np.ndarray | None]
    aspects: Sequence[float]
    pairs: Sequence[Pair] = ()
    side: int | None = None

    @cached_property
    def labels(self) -> np.ndarray:
        """0 normal, 1 anomalous, shape (N,)."""
        return np.array([int(row["label"]) for row in self.rows])

    @cached_property
    def verdicts(self) -> np.ndarray:
        """0 passed, 1 rejected, shape (N,)."""
        return np.array([int(row["pred_label"]) for row in self.rows])

    @cached_property
    def scores(self) -> np.ndarray:
        """The scores (N,) exactly as they were compared with the threshold, float32."""
        return np.array([row["score"] for row in self.rows], dtype=np.float32)

    @cached_property
    def roc(self) -> np.ndarray:
        """Points of the ROC curve (K, 4), none if there is only one class; see `metrics.curves`."""
        return roc(self.scores, self.labels) if self._has_both_classes else np.empty((0, 4))

    @cached_property
    def precision_recall(self) -> np.ndarray:
        """Points of the precision-recall curve (K, 2), none if there is only one class."""
        if not self._has_both_classes:
            return np.empty((0, 2))
        return precision_recall(self.scores, self.labels)

    @property
    def _has_both_classes(self) -> bool:
        return len(np.unique(self.labels)) == 2

    @cached_property
    def map_levels(self) -> np.ndarray:
        """The median and the highest value of each map, (N, 2)."""
        maps = () if self.maps is None else self.maps
        return np.array([(np.median(image), image.max()) for image in maps]).reshape(-1, 2)

    @property
    def map_low(self) -> float:
        """The map value from which colours rise: half of all pixels, more or less, are below.

        Not 0, since distances to a memory bank, or logarithms, never come near it.
        """
        return 0.0 if self.maps is None else float(np.median(self.map_levels[:, 0]))

    @property
    def map_range(self) -> tuple[float, float]:
        """Where the page's colours begin and end.

        Maps without any signal get a range of 1, so that it is never empty.
        """
        low = self.map_low
        high = low if self.maps is None else float(self.map_levels[:, 1].max())
        return low, high if high > low else low + 1

    @cached_property
    def peaks(self) -> dict[str, Any] | None:
        """In how many of the good images the map is highest `at_border`, of `num_images`.

        `area` is the border's share of a map, what chance would give; `low` the lower end of the
        95 % interval of the share of images. None without maps, or where images are tiled.
        """
        if self.maps is None or self.side is None:
            return None
        side = self.maps.shape[-1]
        width = max(1, side // BORDER)
        inside = slice(width, side - width)
        good = [image for image, label in zip(self.maps, self.labels, strict=True) if not label]
        with_peak = [image for image in good if image.max() > image.min()]
        at_border = sum(bool(x.max() > x[inside, inside].max()) for x in with_peak)
        return {
            "at_border": at_border,
            "num_images": len(with_peak),
            "low": share_interval(at_border, len(with_peak))[0] if with_peak else 0.0,
            "area": 1 - (1 - 2 * width / side) ** 2,
        }


def draw_plots(results: CategoryResults, folder: Path, gallery_size: int, colormap: str) -> None:
    """Write every plot of the category as PNG: the same files for any model and data set."""
    metrics, threshold = results.metrics, results.metrics["threshold"]
    synthetic = metrics.get("synthetic") or {}
    scores, labels, confusion = results.scores, results.labels, folder / "confusion_matrix.png"
    visualization.plot_score_histogram(scores, labels, threshold, folder / "scores.png")
    visualization.plot_confusion_matrix(results.verdicts, labels, confusion)
    visualization.draw_roc_curve(results.roc, metrics["image_auroc"], folder / "roc.png")
    visualization.draw_precision_recall_curve(
        results.precision_recall,
        metrics["image_average_precision"],
        float(labels.mean()),
        folder / "precision_recall.png",
    )
    plots.plot_losses(
        results.training["history"], results.training["best_epoch"], folder / "loss.png"
    )
    plots.plot_detection_by_size(
        synthetic.get("detection_by_size", ()),
        synthetic.get("size_detected_in_90_percent"),
        synthetic.get("rejected_without_defect"),
        folder / "detection.png",
        unit=metrics["size_unit"]["name"],
        per_side=metrics["size_unit"]["per_side"],
        num_without_defect=synthetic.get("num_without_defect"),
        interval=synthetic.get("rejected_without_defect_interval"),
    )
    draw_gallery(results, gallery_size, colormap, folder / "gallery.png")


def draw_gallery(results: CategoryResults, size: int, colormap: str, path: Path) -> None:
    """Write the gallery: `size` images in each row, with their maps if there are any."""
    rows = gallery_rows(results.scores, results.metrics["threshold"], size)
    low, limit = results.map_range
    if results.maps is not None:
        limit = float(np.quantile(results.map_levels[:, 1], 0.9))
    captions = [
        f"{Path(row['path']).name}\n{row['defect_type']}, {float(row['score']):.3g}"
        for row in results.rows
    ]
    plots.plot_gallery(
        results.pictures,
        results.maps,
        captions,
        rows,
        color_low=low,
        color_limit=limit,
        colormap=colormap,
        save_path=path,
        aspects=results.aspects,
    )


def gallery_rows(scores: np.ndarray, threshold: float, size: int) -> dict[str, np.ndarray]:
    """Which images the gallery shows: up to `size` indices for each row's title."""
    orders = {
        "highest scores": -scores,
        "nearest to the threshold": np.abs(scores - threshold),
        "lowest scores": scores,
    }
    return {title: np.argsort(order, kind="stable")[:size] for title, order in orders.items()}


def tables(results: CategoryResults) -> dict[str, Table]:
    """The numbers behind the plots, by the plot's name; without rows where there is no curve."""
    false_rejects, detected, low, high = results.roc.T
    recall, precision = results.precision_recall.T
    truths, verdicts = np.array(visualization.TRUTHS), np.array(visualization.VERDICTS)
    curves = history_curves(results.training["history"]).curves
    losses = [(*point, label) for label, points in curves.items() for point in points]
    by_size = (results.metrics.get("synthetic") or {}).get("detection_by_size", ())
    return {
        "roc": {
            "false_reject_rate": false_rejects,
            "detection_rate": detected,
            "low": low,
            "high": high,
        },
        "precision_recall": {"recall": recall, "precision": precision},
        "confusion_matrix": {
            "truth": truths[results.labels],
            "verdict": verdicts[results.verdicts],
        },
        "loss": {
            key: [row[i] for row in losses] for i, key in enumerate(("epoch", "loss", "split"))
        },
        "detection": {key: [row[key] for row in by_size] for key in ("size", "detection_rate")},
    }


def pairs_data(results: CategoryResults) -> list[dict[str, Any]]:
    """Near-duplicates with their pictures as data URLs, the most similar first."""
    if not results.pairs:
        return []
    pictures = np.concatenate([pair.pictures for pair in results.pairs])
    urls = [x["picture"] for x in thumbnails(pictures, None, [None] * len(pictures))]
    found = results.metrics["data"]["near_duplicates"]
    pairs = zip(found, results.pairs, urls[::2], urls[1::2], strict=False)
    return [
        {**known, "pictures": both, "aspects": _short(pair.aspects)} for known, pair, *both in pairs
    ]


def page_data(results: CategoryResults, colormap: str) -> dict[str, Any]:
    """What the report's page shows of the category, for JSON; see `page.render`."""
    low, limit = results.map_range
    small = thumbnails(results.pictures, results.maps, results.masks, map_low=low, map_limit=limit)
    curves = {"roc": results.roc, "precision_recall": results.precision_recall}
    return {
        "name": results.name,
        "metrics": results.metrics,
        "training": results.training,
        "history": history_curves(results.training["history"])._asdict(),
        "curves": {
            name: points.round(4).tolist() for name, points in curves.items() if len(points)
        },
        "images": [
            {
                "path": row["path"],
                "defect_type": row["defect_type"],
                "label": int(label),
                "score": float(score),
                "aspect": aspect,
                **pictures,
            }
            for row, label, score, aspect, pictures in zip(
                results.rows,
                results.labels,
                results.scores,
                _short(results.aspects),
                small,
                strict=True,
            )
        ],
        "pairs": pairs_data(results),
        "sides": results.side and {"image": results.side, "seen": results.pictures.shape[-1]},
        "peaks": results.peaks,
        "colors": colormaps[colormap](np.arange(256), bytes=True)[:, :3].ravel().tolist(),
        "map_low": low,
        "map_limit": limit,
    }


def _short(aspects: Sequence[float]) -> list[float]:
    return [round(aspect, 4) for aspect in aspects]
