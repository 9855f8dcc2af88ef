"""Calibrate a fitted model and test the detector: checkpoints -> detectors, predictions, metrics.

The threshold comes from normal images that the model, or the model of their fold, has not seen.
"""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anomaly_detection.config import Evaluation, load_config
from anomaly_detection.data import PreparedArrays
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.evaluation.prepared import Results, calibrate, evaluate_prepared
from anomaly_detection.evaluation.thresholds import false_reject_bounds, thresholds_by_rate
from anomaly_detection.evaluator import predict
from anomaly_detection.inference import encoded_example, save_detector, statistics_of_images
from anomaly_detection.models import SNAPSHOT, restore
from anomaly_detection.trainer import choose_device, choose_dtype, dtype_name
from stages import run, write_json


def main(category: str) -> None:
    """Calibrate and evaluate the detector of `category`."""
    config = load_config()
    evaluation = config.evaluation
    prepared, output = Path("data/prepared") / category, Path("predictions") / category
    output.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.hardware.device)
    dtype = choose_dtype(evaluation.precision, device)
    calibration, test = (PreparedDataset(prepared, split) for split in ("calibration", "test"))
    checkpoint = torch.load(f"checkpoints/{category}/best_model.pth", weights_only=True)
    model = restore(checkpoint, device, dtype)
    unseen = folds(category, device, dtype) or [(model, calibration)]
    calibration_scores, threshold = calibrate(
        unseen,
        evaluation.threshold_method,
        device=device,
        batch_size=evaluation.batch_size,
        false_reject_rate=evaluation.false_reject_rate,
        quantile=evaluation.quantile,
        manual=evaluation.threshold,
    )
    results = evaluate_prepared(
        model,
        test,
        threshold,
        device=device,
        batch_size=evaluation.batch_size,
        aupro_limit=evaluation.aupro_limit,
        synthetic_images=evaluation.synthetic_images,
        maps_path=output / "anomaly_maps.npy",
        pixel_size=config.data.pixel_size,
    )
    audit = json.loads((Path("metrics") / category / "audit.json").read_text())
    metrics = results.metrics | {
        "threshold_method": evaluation.threshold_method,
        "calibration": {
            "method": evaluation.calibration,
            "num_images": len(calibration_scores),
            "requested_rate": requested_rate(evaluation),
            "false_reject_rate": false_reject_bounds(calibration_scores, threshold),
            "thresholds": thresholds_by_rate(calibration_scores),
        },
        "data": audit,
    }
    write_scores(test, results, output / "scores.csv")
    save_detector(
        Path("detectors") / f"{category}.pt",
        model={key: checkpoint[key] for key in SNAPSHOT},
        threshold=threshold,
        calibration_scores=calibration_scores.tolist(),
        preprocessing=test.preprocessing(config.data.bit_depth),
        fit_statistics=statistics_of_images(PreparedArrays(prepared, "fit")),
        example=example(model, calibration, device),
        precision=dtype_name(dtype),
        parameters=checkpoint["parameters"],
        provenance={
            "category": category,
            "calibration": evaluation.calibration,
            "data": audit["content"],
            "versions": checkpoint["versions"],
        },
    )
    # Last, since git does not ignore metrics: a stage that fails leaves none.
    write_json(Path("metrics") / category / "evaluate.json", metrics)


def requested_rate(evaluation: Evaluation) -> float | None:
    """The false-reject rate that the parameters ask for; None if they do not speak of one."""
    rates = {
        "false_reject_rate": evaluation.false_reject_rate,
        "quantile": 1 - evaluation.quantile,
    }
    return rates.get(evaluation.threshold_method)


def folds(
    category: str, device: torch.device, dtype: torch.dtype
) -> list[tuple[nn.Module, PreparedDataset]]:
    """The models of the folds, if there are any, each with the images that it has not seen."""
    prepared, parts = Path("data/prepared") / category, []
    for path in sorted(Path(f"checkpoints/{category}/folds").glob("*.pth")):
        fold = torch.load(path, weights_only=True)
        images = PreparedDataset(prepared, ("fit", "calibration"), contents=set(fold["held_out"]))
        parts.append((restore(fold, device, dtype), images))
    return parts


def example(model: nn.Module, images: PreparedDataset, device: torch.device) -> dict[str, Any]:
    """The first tile of some images as a detector's test picture."""
    ((_, outputs),) = predict(model, [images.__getitems__([0])], device)
    score = outputs["pred_score"].item()
    return encoded_example(images.read([0])[0], int(images.numbers[0]), score)


def write_scores(test: PreparedDataset, results: Results, path: Path) -> None:
    """Write a row for each test image: what it is, its score and its verdict."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "sha256", "defect_type", "label", "score", "pred_label"])
        found = zip(results.labels, results.scores, results.verdicts, strict=True)
        for row, values in zip(test.rows, found, strict=True):
            writer.writerow([row["path"], row["sha256"], row["defect_type"], *values])


if __name__ == "__main__":
    run(main, note_cost=True)
