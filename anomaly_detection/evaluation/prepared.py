"""Evaluate a model on a prepared test split: metrics, verdicts and maps."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import nn

from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.evaluation.detectability import (
    detection_by_size,
    evaluate_synthetic,
    largest_region,
)
from anomaly_detection.evaluation.run import Batch, Outputs, evaluate, predict_scores
from anomaly_detection.evaluation.synthetic import (
    SIZES,
    every_defect,
    one_defect_each,
    synthetic_batches,
)
from anomaly_detection.evaluation.thresholds import choose_threshold

SEED = 0  # for the synthetic defects, so that experiments are comparable


def calibrate(
    parts: Sequence[tuple[nn.Module, PreparedDataset]],
    method: str,
    *,
    device: str | torch.device,
    batch_size: int,
    **options: float,
) -> tuple[np.ndarray, float]:
    """Scores (n,) of normal images, and the threshold that they give.

    Args:
        parts: Models as in `evaluate`, each with normal images that it was not fitted to: one model
            and the calibration split, or a model for each fold.
        method: As in `choose_threshold`.
        device: Where the models run.
        batch_size: Images at a time.
        **options: As in `choose_threshold`.

    Raises:
        ThresholdError: The scores cannot carry the threshold that is asked for.
    """

    def scores_of(batches: Callable[[PreparedDataset], Iterable[Batch]]) -> np.ndarray:
        return np.concatenate(
            [predict_scores(model, batches(images), device) for model, images in parts]
        )

    def with_defects(images: PreparedDataset) -> Iterable[Batch]:
        cases = one_defect_each(images.pictures(), images.channels)
        return synthetic_batches(cases, SEED, batch_size)

    scores = scores_of(lambda images: create_dataloader(images, batch_size))
    threshold = choose_threshold(
        method, scores, synthetic_scores=lambda: scores_of(with_defects), **options
    )
    return scores, threshold


class Results(NamedTuple):
    """Results on N test images."""

    metrics: dict[str, Any]
    scores: np.ndarray  # (N,)
    labels: np.ndarray  # (N,), 0 or 1
    verdicts: np.ndarray  # (N,), 0 or 1


def evaluate_prepared(
    model: nn.Module,
    test: PreparedDataset,
    threshold: float,
    *,
    device: str | torch.device,
    batch_size: int,
    aupro_limit: float,
    synthetic_images: int,
    maps_path: Path,
) -> Results:
    """Metrics on the test images, on their real defects by size, and on synthetic defects.

    Args:
        model: As in `evaluate`.
        test: The test split.
        threshold: An image is anomalous if its score is above this.
        device: Where the model runs.
        batch_size: Images per batch.
        aupro_limit: Highest false-positive rate for AUPRO.
        synthetic_images: How many normal images get synthetic defects.
        maps_path: The .npy file to write anomaly maps to, (N, S, S), if the model gives any.
    """
    maps_path.unlink(missing_ok=True)
    keep = _Kept(maps_path, len(test))
    loader = create_dataloader(test, batch_size)
    metrics, scores, labels, verdicts = evaluate(
        model, loader, device, threshold=threshold, aupro_limit=aupro_limit, on_batch=keep
    )
    sizes = np.array(keep.sizes)
    if sizes.any():
        known = sizes > 0
        metrics["detection_by_size"] = detection_by_size(
            sizes[known], verdicts[known], (*SIZES, 1.0)
        )
    count = min(synthetic_images, metrics["num_normal"])
    if count:
        normal = np.random.default_rng(SEED).choice(np.flatnonzero(labels == 0), count, False)
        cases = every_defect(test.pictures()[normal], test.channels)
        batches = synthetic_batches(cases, SEED, batch_size)
        metrics["synthetic"] = evaluate_synthetic(
            model, batches, scores[normal], threshold, device, aupro_limit
        )
    return Results(metrics, scores, labels, verdicts)


class _Kept:
    """Write the maps of each batch, and record the sizes of the defects in its masks."""

    def __init__(self, path: Path, num_images: int) -> None:
        self.path, self.num_images = path, num_images
        self.maps: np.memmap | None = None
        self.sizes: list[float] = []

    def __call__(self, batch: Batch, outputs: Outputs) -> None:
        if "anomaly_map" in outputs:
            maps = outputs["anomaly_map"][:, 0].numpy()
            if self.maps is None:
                shape = (self.num_images, *maps.shape[1:])
                self.maps = open_memmap(self.path, "w+", np.float32, shape)
            self.maps[len(self.sizes) : len(self.sizes) + len(maps)] = maps
        self.sizes += [largest_region(mask) for mask in batch["mask"][:, 0].numpy()]
