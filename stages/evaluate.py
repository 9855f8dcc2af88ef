"""Threshold from the calibration split, figures from the test split: -> predictions, metrics."""

import csv
import json
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from torch import nn

from anomaly_detection.config import Evaluation, load_config
from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.data.synthetic import (
    SIZES,
    every_defect,
    one_defect_each,
    synthetic_batches,
)
from anomaly_detection.detectability import detection_by_size, evaluate_synthetic, largest_region
from anomaly_detection.evaluator import evaluate, predict_scores
from anomaly_detection.models import load_model
from anomaly_detection.thresholds import (
    adaptive_threshold,
    false_reject_bounds,
    false_reject_threshold,
    quantile_threshold,
)
from anomaly_detection.trainer import choose_device, choose_dtype
from stages import run, write_json

SEED = 0  # of the synthetic defects, the same for all experiments


def main(category: str) -> None:
    """Evaluate the detector of `category`."""
    config = load_config()
    evaluation = config.evaluation
    prepared, output = Path("data/prepared") / category, Path("predictions") / category
    output.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.training.device)
    dtype = choose_dtype(evaluation.precision, device)
    model = load_model(Path("checkpoints") / category / "best_model.pth", device, dtype)
    calibration, test = (PreparedDataset(prepared, split) for split in ("calibration", "test"))

    loader = create_dataloader(calibration, evaluation.batch_size)
    calibration_scores = predict_scores(model, loader, device)
    threshold = choose_threshold(calibration_scores, evaluation, model, calibration)

    shape = (len(test), test.image_size, test.image_size)
    maps = open_memmap(output / "anomaly_maps.npy", "w+", np.float32, shape)
    position = iter(range(len(test)))
    sizes = []

    def keep_maps_and_sizes(batch, outputs):
        for anomaly_map in outputs["anomaly_map"][:, 0]:
            maps[next(position)] = anomaly_map
        sizes.extend(largest_region(mask) for mask in batch["mask"][:, 0].numpy())

    metrics, scores, labels, predictions = evaluate(
        model,
        create_dataloader(test, evaluation.batch_size),
        device,
        threshold=threshold,
        aupro_limit=evaluation.aupro_limit,
        on_batch=keep_maps_and_sizes,
    )
    maps.flush()
    metrics["threshold_method"] = evaluation.threshold_method
    metrics["calibration"] = {
        "num_images": len(calibration),
        "false_reject_rate": false_reject_bounds(calibration_scores, threshold),
    }
    if any(sizes):
        known = np.array(sizes) > 0
        metrics["detection_by_size"] = detection_by_size(
            np.array(sizes)[known], predictions[known], (*SIZES, 1.0)
        )
    count = min(evaluation.synthetic_images, metrics["num_normal"])
    if count:
        normal = np.random.default_rng(SEED).choice(np.flatnonzero(labels == 0), count, False)
        cases = every_defect(test.pictures()[normal])
        metrics["synthetic"] = evaluate_synthetic(
            model,
            synthetic_batches(cases, SEED, evaluation.batch_size),
            scores[normal],
            threshold,
            device,
            evaluation.aupro_limit,
        )
    metrics["data"] = json.loads((Path("metrics") / category / "audit.json").read_text())

    with (output / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "sha256", "defect_type", "label", "score", "pred_label"])
        for row, *values in zip(test.rows, labels, scores, predictions, strict=True):
            writer.writerow([row["path"], row["sha256"], row["defect_type"], *values])
    write_json(Path("metrics") / category / "evaluate.json", metrics)


def choose_threshold(
    scores: np.ndarray, evaluation: Evaluation, model: nn.Module, calibration: PreparedDataset
) -> float:
    """The threshold by `evaluation.threshold_method`, from calibration images alone."""
    if evaluation.threshold_method == "manual":
        return evaluation.threshold
    if evaluation.threshold_method == "quantile":
        return quantile_threshold(scores, evaluation.quantile)
    if evaluation.threshold_method == "adaptive":
        cases = one_defect_each(calibration.pictures())
        batches = synthetic_batches(cases, SEED, evaluation.batch_size)
        device = next(model.parameters()).device
        return adaptive_threshold(scores, predict_scores(model, batches, device))
    return false_reject_threshold(scores, evaluation.false_reject_rate)


if __name__ == "__main__":
    run(main, note_cost=True)
