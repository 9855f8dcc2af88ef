import json

import numpy as np
import pytest
import torch
from torch import nn

from anomaly_detection.evaluation.detectability import (
    detection_by_size,
    evaluate_synthetic,
    largest_region,
    size_detected,
)
from anomaly_detection.evaluation.synthetic import every_defect, synthetic_batches


def curve(*rates):
    sizes = (0.01, 0.02, 0.05, 0.1)
    return [{"size": s, "detection_rate": r} for s, r in zip(sizes, rates, strict=False)]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((0.0, 0.8, 1.0, 1.0), 0.02 + 0.5 * 0.03),
        ((0.9, 0.9, 1.0, 1.0), 0.01),
        ((1.0, 1.0, 0.9, 0.95), 0.01),
        ((0.0, 1.0, 0.5, 1.0), 0.05 + 0.8 * 0.05),
        ((1.0, 1.0, 1.0, 0.8), None),
    ],
)
def test_the_size_detected_is_where_the_curve_crosses_for_good(rates, expected):
    assert size_detected(curve(*rates)) == (expected and pytest.approx(expected))


def test_rates_and_their_limits_are_those_of_each_size():
    rows = detection_by_size([0.1, 0.2, 0.1, 0.2], [0, 1, 1, 1])
    assert [(row["size"], row["num_images"], row["detection_rate"]) for row in rows] == [
        (0.1, 2, 0.5),
        (0.2, 2, 1.0),
    ]
    # Exact limits of 1 of 2 and 2 of 2 at 95 %: 1 - sqrt(0.975) and 0.025 ** (1 / 2).
    assert rows[0]["low"] == pytest.approx(1 - np.sqrt(0.975))
    assert rows[1]["low"] == pytest.approx(np.sqrt(0.025))


def test_sizes_are_grouped_by_the_edge_above():
    rows = detection_by_size([0.005, 0.01, 0.011, 0.9], [1, 0, 1, 1], (0.01, 0.02, 1.0))
    assert [(row["size"], row["num_images"]) for row in rows] == [(0.01, 2), (0.02, 1), (1.0, 1)]


def test_the_largest_region_is_eight_connected():
    mask = np.zeros((8, 10), np.uint8)
    assert largest_region(mask) == 0
    mask[0, 0] = 1
    assert largest_region(mask) == pytest.approx(2 * np.sqrt(1 / np.pi))
    mask[3, 3] = mask[4, 4] = mask[5, 5] = 1
    assert largest_region(mask) == pytest.approx(2 * np.sqrt(3 / np.pi))
    mask[7] = 255
    assert largest_region(mask) == pytest.approx(2 * np.sqrt(3 / np.pi))


class ContrastModel(nn.Module):
    """The map is how far a pixel is from grey; the score is its mean over the image."""

    def forward(self, images):
        anomaly_map = (images.float() / 255 - 0.5).abs().mean(dim=1, keepdim=True)
        return {"pred_score": anomaly_map.mean(dim=(1, 2, 3)), "anomaly_map": anomaly_map}


def test_larger_defects_are_detected_and_smaller_ones_are_not():
    images = np.full((2, 3, 64, 64), 128, np.uint8)
    batches = list(synthetic_batches(every_defect(images), seed=0, batch_size=7))
    clean = np.full(2, 0.5 / 255)
    metrics = evaluate_synthetic(ContrastModel(), batches, clean, threshold=0.004)
    assert metrics["num_images"] == 64
    assert set(metrics["detection_by_size_and_kind"]) == {"blob", "missing", "scratch", "texture"}
    blob = metrics["detection_by_size_and_kind"]["blob"]
    assert (blob[0]["detection_rate"], blob[-1]["detection_rate"]) == (0.0, 1.0)
    # On an even surface nothing can be missing, and a good detector sees nothing.
    assert all(
        row["detection_rate"] == 0 for row in metrics["detection_by_size_and_kind"]["missing"]
    )
    assert metrics["rejected_without_defect"] == 0
    assert metrics["num_without_defect"] == 2
    low, high = metrics["rejected_without_defect_interval"]
    assert (low, high) == (0, pytest.approx(1 - 0.025**0.5))  # (1 - p)^2 = 2.5 %
    assert metrics["size_detected_in_90_percent"] is None
    assert 0.5 < metrics["pixel_auroc"] <= 1
    json.dumps(metrics, allow_nan=False)


def test_synthetic_metrics_do_not_depend_on_the_batch_size():
    images = torch.randint(0, 256, (2, 3, 48, 48), generator=torch.Generator().manual_seed(0))
    cases = every_defect(images.byte().numpy())
    one, many = (
        evaluate_synthetic(
            ContrastModel(), synthetic_batches(cases, 0, size), np.array([0.2, 0.3]), 0.25
        )
        for size in (1, 64)
    )
    assert one["detection_by_size"] == many["detection_by_size"]
    assert one["pixel_auroc"] == pytest.approx(many["pixel_auroc"])
