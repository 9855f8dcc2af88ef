"""The smallest defect that a detector catches: probability of detection against size."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from anomaly_detection.evaluation.tiled import with_others
from anomaly_detection.evaluator import Batch, Outputs, measure, predict
from anomaly_detection.metrics import compute_auroc, share_interval
from anomaly_detection.metrics.pixel import label_regions

DETECTED = 0.9


def evaluate_synthetic(
    model: nn.Module,
    batches: Iterable[Batch],
    normal_scores: np.ndarray,
    threshold: float,
    device: str | torch.device = "cpu",
    aupro_limit: float = 0.3,
) -> dict[str, Any]:
    """Metrics on synthetic defects, to be kept apart from those on real ones.

    Args:
        model: As in `evaluate`.
        batches: From `synthetic_batches`; of a tiled image, the defect is on one tile.
        normal_scores: Scores of the same images without a defect, shape (N,).
        threshold: An image is anomalous if its score is above this.
        device: Where the model runs.
        aupro_limit: Highest false-positive rate for AUPRO.

    Returns:
        `detection_by_size` over all kinds and for each, `size_detected_in_90_percent` (a share of
        the image's side, or None), `rejected_without_defect` (the rate at which the curve
        starts) with its 95 % interval and `num_without_defect`, `image_auroc` against the normal
        scores, and the pixel metrics.
    """
    sizes: list[float] = []
    kinds: list[str] = []

    def note(batch: Batch, outputs: Outputs) -> None:
        sizes.extend(batch["size"])
        kinds.extend(batch["defect_type"])

    metrics, scores, labels, detected = measure(
        with_others(predict(model, batches, device)),
        threshold=threshold,
        aupro_limit=aupro_limit,
        on_batch=note,
    )
    curve = detection_by_size(sizes, detected)
    by_kind = {
        kind: detection_by_size(np.asarray(sizes)[chosen], detected[chosen])
        for kind in sorted(set(kinds))
        for chosen in [np.asarray(kinds) == kind]
    }
    rejected = normal_scores > threshold
    both = np.concatenate([np.zeros(len(normal_scores), dtype=int), labels])
    return {
        "num_images": len(scores),
        "image_auroc": compute_auroc(np.concatenate([normal_scores, scores]), both),
        **{name: metrics[name] for name in metrics if name.startswith(("pixel_", "aupro"))},
        "num_without_defect": len(rejected),
        "rejected_without_defect": float(rejected.mean()),
        "rejected_without_defect_interval": list(
            share_interval(int(rejected.sum()), len(rejected))
        ),
        "size_detected_in_90_percent": size_detected(curve),
        "detection_by_size": curve,
        "detection_by_size_and_kind": by_kind,
    }


def detection_by_size(
    sizes: ArrayLike, detected: ArrayLike, edges: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """The detection rate of each size of defect, with its 95 % confidence limits.

    Args:
        sizes: Sizes of N defects.
        detected: 0 or 1 for each.
        edges: Groups sizes into (edge, next edge], named by the upper edge; None keeps
            each size separate.
    """
    sizes, detected = np.asarray(sizes, dtype=float), np.asarray(detected)
    if edges is not None:
        sizes = np.asarray(edges)[np.searchsorted(edges, sizes).clip(max=len(edges) - 1)]
    rows = []
    for size in np.unique(sizes):
        of_size = detected[sizes == size]
        low, high = share_interval(int(of_size.sum()), len(of_size))
        rows.append(
            {
                "size": float(size),
                "num_images": len(of_size),
                "detection_rate": float(of_size.mean()),
                "low": low,
                "high": high,
            }
        )
    return rows


def size_detected(curve: Sequence[dict[str, Any]], rate: float = DETECTED) -> float | None:
    """The size from which the detection rate stays at least `rate`, or None if it never does.

    Interpolated between two sizes of the curve.
    """
    first = len(curve)
    while first and curve[first - 1]["detection_rate"] >= rate:
        first -= 1
    if first == len(curve):
        return None
    if first == 0:
        return curve[0]["size"]
    below, above = curve[first - 1], curve[first]
    rise = above["detection_rate"] - below["detection_rate"]
    part = (rate - below["detection_rate"]) / rise
    return below["size"] + part * (above["size"] - below["size"])


def largest_region(mask: np.ndarray) -> float:
    """The diameter, in pixels, of a circle with the area of the largest 8-connected region, or 0.

    Args:
        mask: Shape (H, W); 1 is anomalous.
    """
    _, areas = label_regions(mask == 1)
    area = areas.max(initial=0)
    return float(2 * np.sqrt(area / np.pi))
