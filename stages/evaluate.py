"""Threshold from the calibration split, figures from the test split: -> predictions, metrics."""

import csv
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from anomaly_detection.config import Evaluation, load_config
from anomaly_detection.data import PreparedDataset, create_dataloader
from anomaly_detection.evaluator import evaluate, predict_scores
from anomaly_detection.models import load_model
from anomaly_detection.thresholds import false_reject_threshold, quantile_threshold
from anomaly_detection.trainer import choose_device
from stages import run, write_json


def main(category: str) -> None:
    """Evaluate the detector of `category`."""
    config = load_config()
    evaluation = config.evaluation
    prepared, output = Path("data/prepared") / category, Path("predictions") / category
    output.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.training.device)
    model = load_model(Path("checkpoints") / category / "best_model.pth")
    calibration, test = (PreparedDataset(prepared, split) for split in ("calibration", "test"))

    loader = create_dataloader(calibration, evaluation.batch_size)
    normal_scores = predict_scores(model, loader, device)
    threshold = choose_threshold(normal_scores, evaluation)

    shape = (len(test), test.image_size, test.image_size)
    maps = open_memmap(output / "anomaly_maps.npy", "w+", np.float32, shape)
    position = iter(range(len(test)))

    def keep_maps(batch, outputs):
        for anomaly_map in outputs["anomaly_map"][:, 0]:
            maps[next(position)] = anomaly_map

    metrics, scores, labels, predictions = evaluate(
        model,
        create_dataloader(test, evaluation.batch_size),
        device,
        threshold=threshold,
        aupro_limit=evaluation.aupro_limit,
        on_batch=keep_maps,
    )
    maps.flush()
    with (output / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "defect_type", "label", "score", "pred_label"])
        for row, *values in zip(test.rows, labels, scores, predictions, strict=True):
            writer.writerow([row["path"], row["defect_type"], *values])
    metrics["threshold_method"] = evaluation.threshold_method
    metrics["num_calibration"] = len(calibration)
    # report depends on predictions/, the folder above all categories; in metrics/ stands its own
    # output, so that it cannot depend on that.
    for folder in (output, Path("metrics") / category):
        write_json(folder / "evaluate.json", metrics)


def choose_threshold(normal_scores: np.ndarray, evaluation: Evaluation) -> float:
    """The threshold by `evaluation.threshold_method`."""
    if evaluation.threshold_method == "manual":
        return evaluation.threshold
    if evaluation.threshold_method == "quantile":
        return quantile_threshold(normal_scores, evaluation.quantile)
    return false_reject_threshold(normal_scores, evaluation.false_reject_rate)


if __name__ == "__main__":
    run(main)
