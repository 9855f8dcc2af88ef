"""What a category's fit and evaluation have found, as the report takes it."""

from typing import Any

import numpy as np

from anomaly_detection.report.category import CategoryResults

NO_PAIRS = {"pairs": 0, "images": 0}
DATA = {
    "content": {"test": "abc"},
    "num_images": {"test": 15},
    "near_duplicates": [],
    "num_near_duplicates": dict.fromkeys(("test", "calibration", "validation"), NO_PAIRS),
    "parts_in_train_and_test": [],
}
PARITY = {
    "num_images": 2,
    "nearest_score": 0.03,
    "formats": {"onnx": {"num_verdicts_changed": 0, "largest_score_difference": 2.5e-7}},
}


def metrics(**changes: Any) -> dict[str, Any]:
    """The content of evaluate.json."""
    return {
        "image_auroc": 0.9,
        "image_f1": 0.8,
        "image_f1_max": 0.85,
        "false_reject_rate": 0.1,
        "miss_rate": 0.2,
        "threshold": 0.5,
        "threshold_method": "quantile",
        "size_unit": {"name": "% of the image's side", "per_side": 100},
        "num_normal": 10,
        "num_anomalous": 5,
        "num_false_rejects": 1,
        "num_misses": 1,
        "intervals": {
            "image_auroc": [0.8, 0.95],
            "image_f1": [0.7, 0.9],
            "false_reject_rate": [0.05, 0.2],
            "miss_rate": [0.1, 0.4],
        },
        "calibration": {
            "num_images": 9,
            "method": "split",
            "requested_rate": 0.2,
            "false_reject_rate": {"expected": 0.1, "upper_95": 0.3},
            "thresholds": [
                {"rate": 0.02, "threshold": None, "images_needed": 49},
                {"rate": 0.1, "threshold": 0.8, "images_needed": 9},
            ],
        },
        "data": DATA,
    } | changes


def training(**changes: Any) -> dict[str, Any]:
    """The content of train.json."""
    losses = [{"train_loss": 3.0, "val_loss": 2.0}, {"train_loss": 2.0, "val_loss": 1.5}]
    return {
        "model": "stfpm",
        "parameters": {"model": {"name": "stfpm"}, "training": {"learning_rate": 0.4}},
        "device": "cpu",
        "precision": "bfloat16",
        "hardware": {"cpu": "Xeon", "instructions": "AVX512, AMX"},
        "versions": {"torch": "2.14"},
        "best_epoch": 2,
        "best_metrics": {"val_loss": 1.5},
        "history": [{"epoch": k, "learning_rate": 0.4} | row for k, row in enumerate(losses, 1)],
    } | changes


WITHOUT_EPOCHS = training(
    model="patchcore",
    parameters={"model": {"name": "patchcore", "layers": ["b.2", "b.4"]}, "training": {}},
    best_epoch=None,
    best_metrics=None,
    history=[],
)


def category(**changes: Any) -> dict[str, Any]:
    """What the page takes: a good image that passes and a defective one that is rejected."""
    return {
        "name": "bolt",
        "metrics": metrics(),
        "training": training(),
        "images": [
            {"path": "test/good/a.png", "defect_type": "good", "label": 0, "score": 0.1},
            {"path": "test/bad/b.png", "defect_type": "bad", "label": 1, "score": 0.9},
        ],
        "parity": PARITY,
        "pairs": [],
        "peaks": None,
        "sides": None,
    } | changes


def results(**changes: Any) -> CategoryResults:
    """Two good and two defective images of 64 x 64 pixels, one of each misjudged; maps of 0 to 3.

    Their scores are 0.1, 0.6, 0.3 and 0.95; the threshold is 0.5.
    """
    scores, labels = (0.1, 0.6, 0.3, 0.95), (0, 0, 1, 1)
    known = {"image_average_precision": 0.8, "per_defect_type": {}}
    values = {
        "name": "bolt",
        "training": training(),
        "metrics": metrics(num_normal=2, num_anomalous=2, **known),
        "rows": [
            {
                "path": f"test/x/{i}.png",
                "defect_type": "x" if label else "good",
                "label": str(label),
                "score": str(score),
                "pred_label": str(int(score > 0.5)),
            }
            for i, (score, label) in enumerate(zip(scores, labels, strict=True))
        ],
        "pictures": np.full((4, 3, 64, 64), 90, np.uint8),
        "maps": np.arange(4, dtype=np.float32)[:, None, None] * np.ones((64, 64), np.float32),
        "masks": [None] * 4,
        "aspects": [1.0] * 4,
    }
    return CategoryResults(**(values | changes))
