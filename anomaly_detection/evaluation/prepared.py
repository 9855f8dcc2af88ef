"""Evaluate a model on a prepared test split: metrics, verdicts and maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import nn

from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.evaluation.detectability import (
    detection_by_size,
    evaluate_synthetic,
    largest_region,
)
from anomaly_detection.evaluation.synthetic import (
    SIZES,
    every_defect,
    one_defect_each,
    synthetic_batches,
)
from anomaly_detection.evaluation.thresholds import choose_threshold
from anomaly_detection.evaluation.tiled import (
    one_tile_each,
    predict_images,
    scores_by_tile,
    tile_scores_of,
    with_others,
)
from anomaly_detection.evaluator import Batch, Outputs, measure, predict
from anomaly_detection.progress import part

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
    with part("calibration"):
        by_tile = [scores_by_tile(model, images, batch_size, device) for model, images in parts]

    def with_defects() -> np.ndarray:
        scores = [
            defect_scores(model, images, known, batch_size, device)
            for (model, images), known in zip(parts, by_tile, strict=True)
        ]
        return np.concatenate(scores)

    scores = np.array([own.max() for known in by_tile for own in known])
    return scores, choose_threshold(method, scores, synthetic_scores=with_defects, **options)


def defect_scores(
    model: nn.Module,
    images: PreparedDataset,
    tile_scores: Sequence[np.ndarray],
    batch_size: int,
    device: str | torch.device,
) -> np.ndarray:
    """The scores (N,) of images with a synthetic defect each."""
    tiles = one_tile_each(images, range(len(images.rows)), tile_scores, SEED)
    batches = synthetic_batches(tiles.cases(one_defect_each), SEED, batch_size)
    with part("synthetic defects"):
        found = with_others(predict(model, batches, device))
        return np.concatenate([outputs["pred_score"].numpy() for _, outputs in found])


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
    pixel_size: float | None = None,
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
        maps_path: The .npy file to write anomaly maps to, (N, S, S), if the model gives any; of
            tiled images, as by `PreparedArrays.shown`.
        pixel_size: Side of an image's pixel on the part, in millimetres, if known.
    """
    maps_path.unlink(missing_ok=True)
    keep = _Kept(maps_path, test)
    with part("test"):
        metrics, scores, labels, verdicts = measure(
            predict_images(model, test, batch_size, device),
            threshold=threshold,
            aupro_limit=aupro_limit,
            on_batch=keep,
        )
    metrics["size_unit"] = size_unit(test, pixel_size)
    sizes = np.array(keep.sizes)
    if sizes.any():
        known = sizes > 0
        metrics["detection_by_size"] = detection_by_size(
            sizes[known], verdicts[known], (*SIZES, 1.0)
        )
    count = min(synthetic_images, metrics["num_normal"])
    if count:
        normal = np.random.default_rng(SEED).choice(np.flatnonzero(labels == 0), count, False)
        tiles = one_tile_each(test, normal, keep.tile_scores, SEED)
        batches = synthetic_batches(tiles.cases(every_defect), SEED, batch_size)
        with part("synthetic defects"):
            found = evaluate_synthetic(
                model, batches, scores[normal], threshold, device, aupro_limit
            )
        metrics["synthetic"] = found
        if (size := found["size_detected_in_90_percent"]) is not None and test.side:
            found["pixels_detected_in_90_percent"] = size * test.side
            if pixel_size:
                found["mm_detected_in_90_percent"] = size * test.side * pixel_size
    return Results(metrics, scores, labels, verdicts)


def size_unit(images: PreparedArrays, pixel_size: float | None) -> dict[str, Any]:
    """What people read sizes of defects in, which are shares of a side: `name`, and `per_side`.

    Millimetres if a pixel's size is known, pixels of the image if it is tiled, else percent.
    """
    if pixel_size and images.side:
        return {"name": "mm", "per_side": images.side * pixel_size}
    if images.is_tiled:
        return {"name": "pixels", "per_side": images.side}
    return {"name": "% of the image's side", "per_side": 100}


class _Kept:
    """Write the maps of each batch, and record the scores of tiles and the sizes of defects."""

    def __init__(self, path: Path, images: PreparedDataset) -> None:
        self.path, self.images = path, images
        self.maps: np.memmap | None = None
        self.sizes: list[float] = []  # shares of a tile's side
        self.tile_scores: list[np.ndarray] = []

    def __call__(self, batch: Batch, outputs: Outputs) -> None:
        if "anomaly_map" in outputs:
            maps = outputs["anomaly_map"][:, 0].numpy()
            maps = np.stack([self.images.shown(anomaly_map) for anomaly_map in maps])
            if self.maps is None:
                shape = (len(self.images.rows), *maps.shape[1:])
                self.maps = open_memmap(self.path, "w+", np.float32, shape)
            self.maps[len(self.sizes) : len(self.sizes) + len(maps)] = maps
        side = self.images.image_size
        self.sizes += [largest_region(mask) / side for mask in batch["mask"][:, 0].numpy()]
        self.tile_scores += tile_scores_of(outputs)
