"""Inference and its figures, for any model whose outputs have a `pred_score`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from anomaly_detection.metrics import (
    PixelHistogram,
    compute_auroc,
    compute_auroc_per_class,
    compute_average_precision,
    compute_f1,
    compute_f1_max,
)

Batch = dict[str, Any]
Outputs = dict[str, Tensor]


def predict(
    model: nn.Module, dataloader: Iterable[Batch], device: str | torch.device = "cpu"
) -> Iterator[tuple[Batch, Outputs]]:
    """Each batch with the model's outputs on the CPU; in eval mode, which is undone at the end."""
    was_training = model.training
    model.to(device).eval()
    try:
        for batch in tqdm(dataloader, desc="evaluate", unit="batch", leave=False, disable=None):
            with torch.inference_mode():
                outputs = model(batch["image"].to(device))
            yield batch, {key: value.float().cpu() for key, value in outputs.items()}
    finally:
        model.train(was_training)


def predict_scores(
    model: nn.Module, dataloader: Iterable[Batch], device: str | torch.device = "cpu"
) -> np.ndarray:
    """The image scores (N,) of all batches."""
    return np.concatenate(
        [out["pred_score"].numpy() for _, out in predict(model, dataloader, device)]
    )


def evaluate(
    model: nn.Module,
    dataloader: Iterable[Batch],
    device: str | torch.device = "cpu",
    *,
    threshold: float | None = None,
    aupro_limit: float = 0.3,
    on_batch: Callable[[Batch, Outputs], None] | None = None,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """Score all images and compare with their labels, and maps with masks where both exist.

    Args:
        model: Returns, in eval mode, `pred_score` (N,) and optionally `anomaly_map` (N, 1, H, W).
        dataloader: Batches with `image` and `label`, and optionally `mask` and `defect_type`.
        device: Where the model runs.
        threshold: An image is anomalous if its score is above. None takes the one with the best F1
            on these very images, so that the verdicts are an upper bound.
        aupro_limit: Highest false-positive rate for AUPRO.
        on_batch: Called with each batch and its outputs.

    Returns:
        Figures (see `image_metrics`, with `pixel_*` and `aupro` where there are anomalous masks),
        scores (N,), labels (N,) and predictions (N,), 0 or 1.
    """
    scores, labels, defect_types = [], [], []
    pixels = PixelHistogram()
    for batch, outputs in predict(model, dataloader, device):
        scores.append(outputs["pred_score"].numpy())
        labels.append(np.asarray(batch["label"]))
        defect_types += batch.get("defect_type", [])
        if "mask" in batch and "anomaly_map" in outputs:
            pixels.update(outputs["anomaly_map"].numpy()[:, 0], np.asarray(batch["mask"])[:, 0])
        if on_batch:
            on_batch(batch, outputs)
    scores, labels = np.concatenate(scores), np.concatenate(labels)
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {(~np.isfinite(scores)).sum()} that are not.")
    if threshold is None:
        threshold = compute_f1_max(labels, scores)[1]
    metrics = image_metrics(labels, scores, threshold, defect_types)
    if pixels.anomalous.any() and pixels.normal.any():
        metrics |= pixels.compute(aupro_limit)
    return metrics, scores, labels, (scores > threshold).astype(int)


def image_metrics(
    labels: np.ndarray, scores: np.ndarray, threshold: float, defect_types: list[str]
) -> dict[str, Any]:
    """The figures of one score per image.

    A figure that the images do not define (one class only) is None, with the reason under
    `undefined`. `image_f1_max` is the best F1 of any threshold on these images: an upper bound.
    """
    rejected = scores > threshold
    normal, anomalous = labels == 0, labels == 1
    undefined: dict[str, str] = {}

    def figure(name: str, compute: Callable[[], float]) -> float | None:
        try:
            return compute()
        except ValueError as error:
            undefined[name] = str(error)
            return None

    def share(name: str, of: np.ndarray, what: str) -> float | None:
        if not len(of):
            undefined[name] = f"there are no {what} images."
        return float(of.mean()) if len(of) else None

    metrics: dict[str, Any] = {
        "image_auroc": figure("image_auroc", lambda: compute_auroc(labels, scores)),
        "image_average_precision": figure(
            "image_average_precision", lambda: compute_average_precision(labels, scores)
        ),
        "image_f1": figure("image_f1", lambda: compute_f1(labels, rejected)),
        "image_f1_max": figure("image_f1_max", lambda: compute_f1_max(labels, scores)[0]),
        "threshold": float(threshold),
        "false_reject_rate": share("false_reject_rate", rejected[normal], "normal"),
        "miss_rate": share("miss_rate", ~rejected[anomalous], "anomalous"),
        "num_normal": int(normal.sum()),
        "num_anomalous": int(anomalous.sum()),
        "num_false_rejects": int(rejected[normal].sum()),
        "num_misses": int((~rejected)[anomalous].sum()),
    }
    types = np.asarray(defect_types) if defect_types else np.where(anomalous, "anomalous", "good")
    aurocs = figure("per_defect_type", lambda: compute_auroc_per_class(labels, scores, types)) or {}
    metrics["per_defect_type"] = {
        str(name): {
            "num_images": int(chosen.sum()),
            "image_auroc": aurocs.get(name),
            "detection_rate": float(rejected[chosen].mean()),
        }
        for name in np.unique(types[anomalous])
        for chosen in [anomalous & (types == name)]
    }
    if undefined:
        metrics["undefined"] = undefined
    return metrics
