"""Inference and metrics, for any model that gives each image a score."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anomaly_detection.metrics import (
    PixelHistogram,
    auroc_interval,
    compute_auroc,
    compute_average_precision,
    compute_f1,
    compute_f1_max,
    f1_interval,
    share_interval,
)
from anomaly_detection.progress import progress
from anomaly_detection.trainer import choose_device

Batch = dict[str, Any]
Outputs = dict[str, Tensor]


def predict(
    model: nn.Module, dataloader: Iterable[Batch], device: str | torch.device = "auto"
) -> Iterator[tuple[Batch, Outputs]]:
    """Each batch with the model's outputs on the CPU; runs in eval mode, then restores the mode.

    A model that returns a tensor (N,) gives these as `pred_score`.
    """
    was_training, inputs = model.training, getattr(model, "inputs", ("image",))
    device = choose_device(device)
    model.to(device).eval()
    try:
        for batch in progress(dataloader, "inference", "batches"):
            with torch.inference_mode():
                outputs = model(*(batch[name].to(device) for name in inputs))
            if isinstance(outputs, Tensor):
                outputs = {"pred_score": outputs.flatten()}
            yield batch, {key: value.float().cpu() for key, value in outputs.items()}
    finally:
        model.train(was_training)


def predict_scores(
    model: nn.Module, dataloader: Iterable[Batch], device: str | torch.device = "auto"
) -> np.ndarray:
    """The image scores (N,) of all batches."""
    batches = predict(model, dataloader, device)
    return np.concatenate([outputs["pred_score"].numpy() for _, outputs in batches])


def evaluate(
    model: nn.Module,
    dataloader: Iterable[Batch],
    device: str | torch.device = "auto",
    *,
    threshold: float | None = None,
    aupro_limit: float = 0.3,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Score all images, and compare with what is known of them.

    The maps of all images are in memory at once; `measure` needs that of one batch.

    Args:
        model: Returns, in eval mode, scores (N,), or a dict with `pred_score` (N,) and perhaps
            `anomaly_map` (N, 1, H, W).
        dataloader: Batches with `image` and `label`, and perhaps `mask` and `defect_type`.
        device: Where the model runs.
        threshold: As in `measure`.
        aupro_limit: As in `measure`.

    Returns:
        Metrics as in `measure`, where one that is not defined is nan, with a warning; scores (N,);
        labels (N,); and predictions, a dict with `pred_score` and `pred_label` (N,), and
        `anomaly_map` (N, 1, H, W) where the model gives maps.
    """
    maps: list[np.ndarray] = []

    def collect(batch: Batch, outputs: Outputs) -> None:
        if "anomaly_map" in outputs:
            maps.append(outputs["anomaly_map"].numpy())

    metrics, scores, labels, verdicts = measure(
        predict(model, dataloader, device),
        threshold=threshold,
        aupro_limit=aupro_limit,
        on_batch=collect,
    )
    if undefined := metrics.get("undefined", {}):
        reason = next(iter(undefined.values()))
        warnings.warn(f"{', '.join(undefined)} are not defined: {reason}", stacklevel=2)
        metrics |= dict.fromkeys(undefined, math.nan)
    predictions = {"pred_score": scores, "pred_label": verdicts}
    if maps:
        predictions["anomaly_map"] = np.concatenate(maps)
    return metrics, scores, labels, predictions


def measure(
    found: Iterable[tuple[Batch, Outputs]],
    *,
    threshold: float | None = None,
    aupro_limit: float = 0.3,
    on_batch: Callable[[Batch, Outputs], None] | None = None,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """Compare scores with labels, and maps with masks where both exist.

    Args:
        found: Batches as in `evaluate`, with a model's outputs; the pixels are not needed.
        threshold: An image is anomalous if its score is above this. None takes the threshold with
            the best F1 on these same images, which makes the verdicts an upper bound; the highest
            score if they are of one class.
        aupro_limit: Highest false-positive rate for AUPRO.
        on_batch: Called with each batch and its outputs.

    Returns:
        Metrics (see `image_metrics`, plus `pixel_*` and `aupro` if there are anomalous masks),
        scores (N,), labels (N,) and predictions (N,), 0 or 1.
    """
    score_batches, label_batches, defect_types = [], [], []
    pixels: dict[str, PixelHistogram] = defaultdict(PixelHistogram)
    for batch, outputs in found:
        batch_labels = np.asarray(batch["label"])
        names = np.where(batch_labels == 0, "good", batch.get("defect_type", "anomalous"))
        score_batches.append(outputs["pred_score"].numpy())
        label_batches.append(batch_labels)
        defect_types += names.tolist()
        if "mask" in batch and "anomaly_map" in outputs:
            maps, masks = outputs["anomaly_map"].numpy()[:, 0], np.asarray(batch["mask"])[:, 0]
            for name in np.unique(names):
                pixels[str(name)].update(maps[names == name], masks[names == name])
        if on_batch:
            on_batch(batch, outputs)
    scores, labels = np.concatenate(score_batches), np.concatenate(label_batches)
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {(~np.isfinite(scores)).sum()} that are not.")
    if threshold is None:
        both = len(np.unique(labels)) == 2
        threshold = compute_f1_max(scores, labels)[1] if both else float(scores.max())
    metrics = image_metrics(scores, labels, threshold, defect_types)
    metrics |= pixel_metrics(pixels.values(), aupro_limit)
    for name, of_type in metrics["per_defect_type"].items():
        histograms = [pixels[key] for key in ("good", name) if key in pixels]
        of_type |= pixel_metrics(histograms, aupro_limit)
    return metrics, scores, labels, (scores > np.float32(threshold)).astype(int)


def pixel_metrics(parts: Iterable[PixelHistogram], aupro_limit: float) -> dict[str, float]:
    """The metrics of several histograms combined; empty without an anomalous pixel."""
    whole = PixelHistogram()
    for part in parts:
        whole.merge(part)
    defined = whole.anomalous.any() and whole.normal.any()
    return whole.compute(aupro_limit) if defined else {}


def image_metrics(
    scores: np.ndarray, labels: np.ndarray, threshold: float, defect_types: list[str]
) -> dict[str, Any]:
    """Metrics of one score per image, with their 95 % confidence limits under `intervals`.

    A metric that is undefined for these images (one class only) is None, with the reason under
    `undefined`. `image_f1_max` is the best F1 of any threshold on these images: an upper bound.
    """
    rejected = scores > np.float32(threshold)
    normal, anomalous = labels == 0, labels == 1
    types = np.asarray(defect_types) if defect_types else np.where(anomalous, "anomalous", "good")
    two_classes = normal.any() and anomalous.any()
    undefined: dict[str, str] = {}

    def defined(name: str, compute: Callable[[], Any]) -> Any:
        if two_classes:
            return compute()
        undefined[name] = f"there are no {'good' if anomalous.any() else 'defective'} images."
        return None

    def share(name: str, of: np.ndarray, what: str) -> float | None:
        if not len(of):
            undefined[name] = f"there are no {what} images."
        return float(of.mean()) if len(of) else None

    def rate_interval(of: np.ndarray) -> list[float] | None:
        return list(share_interval(int(of.sum()), len(of))) if len(of) else None

    metrics: dict[str, Any] = {
        "image_auroc": defined("image_auroc", lambda: compute_auroc(scores, labels)),
        "image_average_precision": defined(
            "image_average_precision", lambda: compute_average_precision(scores, labels)
        ),
        "image_f1": defined("image_f1", lambda: compute_f1(rejected, labels)),
        "image_f1_max": defined("image_f1_max", lambda: compute_f1_max(scores, labels)[0]),
        "threshold": float(threshold),
        "false_reject_rate": share("false_reject_rate", rejected[normal], "good"),
        "miss_rate": share("miss_rate", ~rejected[anomalous], "defective"),
        "intervals": {
            "image_auroc": list(auroc_interval(scores, labels)) if two_classes else None,
            "image_f1": list(f1_interval(rejected, labels)) if two_classes else None,
            "false_reject_rate": rate_interval(rejected[normal]),
            "miss_rate": rate_interval(~rejected[anomalous]),
        },
        "num_normal": int(normal.sum()),
        "num_anomalous": int(anomalous.sum()),
        "num_false_rejects": int(rejected[normal].sum()),
        "num_misses": int((~rejected)[anomalous].sum()),
        "per_defect_type": {},
    }
    for name in np.unique(types[anomalous]):
        chosen = anomalous & (types == name)
        beside_normal = normal | chosen
        auroc = interval = None
        if normal.any():
            auroc = compute_auroc(scores[beside_normal], labels[beside_normal])
            interval = list(auroc_interval(scores[beside_normal], labels[beside_normal]))
        metrics["per_defect_type"][str(name)] = {
            "num_images": int(chosen.sum()),
            "image_auroc": auroc,
            "detection_rate": float(rejected[chosen].mean()),
            "intervals": {
                "image_auroc": interval,
                "detection_rate": rate_interval(rejected[chosen]),
            },
        }
    if undefined:
        metrics["undefined"] = undefined
    return metrics
