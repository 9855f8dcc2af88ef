"""Metrics of scores and maps, and the size from which on synthetic defects are detected."""

import json
from contextlib import nullcontext

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
from anomaly_detection.evaluator import image_metrics, measure, predict, predict_scores
from anomaly_detection.metrics import PixelHistogram

SCORES = [0.125, 0.5, 0.25, 0.75, 0.5, 1.0]
LABELS = [0, 0, 0, 1, 1, 1]
TYPES = ["good", "good", "good", "hole", "crack", "crack"]
MASKS = np.zeros((6, 1, 4, 4), np.uint8)  # the left half of anomalous images
MASKS[3:, :, :, :2] = 1


class MeanScore(nn.Module):
    """The score is the pixel mean; in training mode the outputs are no scores at all."""

    def __init__(self, maps=True, bad_value=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.maps, self.bad_value = maps, bad_value

    def forward(self, images):
        if self.training:
            return images
        if self.bad_value is not None and (images == self.bad_value).any():
            raise RuntimeError("a bad image")
        self.grad_enabled = torch.is_grad_enabled()
        outputs = {"pred_score": self.scale * images.mean(dim=(1, 2, 3))}
        if self.maps:
            outputs["anomaly_map"] = self.scale * images.mean(dim=1, keepdim=True)
        return outputs


class ScoreGiver(nn.Module):
    """The same scores for every batch: no arithmetic that could round them."""

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, images):
        return {"pred_score": self.scores[: len(images)]}


def batches(scores=SCORES, labels=LABELS, types=None, masks=None, size=2):
    """What a dataloader gives for flat images with these scores."""
    images = torch.tensor(scores).view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
    for start in range(0, len(scores), size):
        rows = slice(start, start + size)
        batch = {"image": images[rows], "label": torch.tensor(labels)[rows]}
        if types is not None:
            batch["defect_type"] = types[rows]
        if masks is not None:
            batch["mask"] = torch.as_tensor(masks)[rows]
        yield batch


def measured(model, data, **options):
    """Metrics, scores, labels and verdicts of a model on the CPU."""
    return measure(predict(model, data, "cpu"), **options)


def without_intervals(metrics):
    if not isinstance(metrics, dict):
        return metrics
    return {key: without_intervals(x) for key, x in metrics.items() if key != "intervals"}


def test_metrics_at_a_threshold_by_hand():
    # 0.5 is not above 0.5: no false reject, and of the anomalous images the second is missed.
    metrics, scores, labels, predictions = measured(
        MeanScore(maps=False), batches(types=TYPES), threshold=0.5
    )
    assert scores.tolist() == SCORES
    assert labels.tolist() == LABELS
    assert predictions.tolist() == [0, 0, 0, 1, 0, 1]
    assert without_intervals(metrics) == {  # nothing is `undefined`
        "image_auroc": pytest.approx(8.5 / 9),  # the pair of 0.5 and 0.5 is half in order
        "image_average_precision": pytest.approx((1 + 1 + 3 / 4) / 3),
        "image_f1": pytest.approx(2 * 2 / (2 * 2 + 1)),
        "image_f1_max": pytest.approx(2 * 3 / (2 * 3 + 1)),
        "threshold": 0.5,
        "false_reject_rate": 0.0,
        "miss_rate": pytest.approx(1 / 3),
        "num_normal": 3,
        "num_anomalous": 3,
        "num_false_rejects": 0,
        "num_misses": 1,
        "per_defect_type": {
            "crack": {
                "num_images": 2,
                "image_auroc": pytest.approx(5.5 / 6),
                "detection_rate": 0.5,
            },
            "hole": {"num_images": 1, "image_auroc": 1.0, "detection_rate": 1.0},
        },
    }


def test_rates_and_exact_intervals_are_of_normal_or_of_anomalous_images_by_hand():
    metrics = image_metrics(
        np.array([1, 2, 3, 4, 1, 5]), np.array([0, 0, 0, 0, 1, 1]), 2.5, ["good"] * 4 + ["a", "b"]
    )
    assert (metrics["false_reject_rate"], metrics["num_false_rejects"]) == (0.5, 2)
    assert (metrics["miss_rate"], metrics["num_misses"]) == (0.5, 1)
    # One of two: Beta quantiles, 1 - sqrt(0.975) and sqrt(0.975); one of one.
    assert metrics["intervals"]["miss_rate"] == pytest.approx([1 - 0.975**0.5, 0.975**0.5])
    of_type = metrics["per_defect_type"]["b"]["intervals"]["detection_rate"]
    assert of_type == pytest.approx([0.025, 1.0])


def test_without_a_threshold_the_verdicts_are_those_of_the_best_f1():
    metrics, _, _, predictions = measured(MeanScore(), batches())
    assert predictions.tolist() == [0, 1, 0, 1, 1, 1]
    assert 0.25 < metrics["threshold"] < 0.5
    assert metrics["image_f1"] == metrics["image_f1_max"] == pytest.approx(6 / 7)
    low = np.float32(1 + 2**-23)
    neighbours = [float(low), float(np.nextafter(low, np.float32(2)))]
    metrics, _, _, predictions = measured(ScoreGiver(neighbours), batches(neighbours, [0, 1]))
    assert metrics["image_f1"] == metrics["image_f1_max"] == 1
    assert predictions.tolist() == [0, 1]


@pytest.mark.parametrize("size", [1, 4, 6])
def test_metrics_do_not_depend_on_the_batch_size(size):
    expected, result = (
        measured(MeanScore(), batches(types=TYPES, masks=MASKS, size=n), threshold=0.4)
        for n in (2, size)
    )
    assert result[0] == expected[0]
    np.testing.assert_array_equal(result[1:], expected[1:])


def test_pixel_metrics_are_of_all_images_and_of_normal_ones_with_each_type():
    metrics, *_ = measured(
        MeanScore(), batches(types=TYPES, masks=MASKS), threshold=0.5, aupro_limit=0.2
    )
    of_types = metrics["per_defect_type"]
    assert of_types["crack"]["pixel_auroc"] != of_types["hole"]["pixel_auroc"]
    maps, types = np.array(SCORES)[:, None, None] * np.ones((4, 4)), np.array(TYPES)
    for found, chosen in [
        (metrics, types != ""),
        *((of_type, np.isin(types, ["good", name])) for name, of_type in of_types.items()),
    ]:
        histogram = PixelHistogram()
        histogram.update(maps[chosen], MASKS[chosen, 0])
        expected = histogram.compute(0.2)
        assert {key: found[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("maps", "masks"), [(False, MASKS), (True, None), (True, 0 * MASKS)])
def test_pixel_metrics_are_absent_without_maps_masks_or_anomalous_pixels(maps, masks):
    metrics, *_ = measured(MeanScore(maps), batches(masks=masks), threshold=0.5)
    assert not [name for name in metrics if name.startswith(("pixel", "aupro"))]
    assert metrics["image_auroc"] is not None


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 2.0])
def test_intervals_contain_the_metrics(threshold):
    metrics, *_ = measured(MeanScore(), batches(types=TYPES), threshold=threshold)
    for part in (metrics, *metrics["per_defect_type"].values()):
        assert part["intervals"]
        for name, (low, high) in part["intervals"].items():
            assert 0 <= low <= part[name] <= high <= 1, name


def test_without_defect_types_all_anomalous_images_are_one_type():
    metrics, *_ = measured(MeanScore(), batches(), threshold=0.5)
    assert without_intervals(metrics["per_defect_type"]) == {
        "anomalous": {
            "num_images": 3,
            "image_auroc": metrics["image_auroc"],
            "detection_rate": pytest.approx(2 / 3),
        }
    }


def test_of_normal_images_only_the_false_rejects_are_defined():
    metrics, _, _, predictions = measured(
        MeanScore(), batches(SCORES[:3], [0, 0, 0], ["good"] * 3), threshold=0.2
    )
    assert predictions.tolist() == [0, 1, 1]
    assert metrics["false_reject_rate"] == pytest.approx(2 / 3)
    assert metrics["per_defect_type"] == {}
    assert metrics["undefined"]["miss_rate"] == "there are no defective images."
    for name in ("image_auroc", "image_average_precision", "image_f1", "image_f1_max"):
        assert metrics[name] is None
        assert metrics["undefined"][name] == "there are no defective images."


def test_of_anomalous_images_only_the_misses_are_defined():
    metrics = image_metrics(np.array([1.0, 3.0]), np.array([1, 1]), 2.0, ["hole", "crack"])
    assert metrics["miss_rate"] == 0.5
    assert metrics["false_reject_rate"] is None
    assert metrics["undefined"]["false_reject_rate"] == "there are no good images."
    assert without_intervals(metrics["per_defect_type"]) == {
        "crack": {"num_images": 1, "image_auroc": None, "detection_rate": 1.0},
        "hole": {"num_images": 1, "image_auroc": None, "detection_rate": 0.0},
    }


@pytest.mark.parametrize("labels", [[0] * 6, [1] * 6, LABELS])
def test_metrics_are_strict_json(labels):
    masks = MASKS[3:4] * np.array(labels, np.uint8)[:, None, None, None]
    data = batches(labels=labels, types=TYPES, masks=masks)
    metrics, *_ = measured(MeanScore(), data, threshold=0.5)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_without_a_threshold_images_of_one_class_are_all_normal():
    _, _, _, verdicts = measured(MeanScore(), batches(labels=[0] * 6))
    assert not verdicts.any()


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="finite"):
        measured(MeanScore(maps=False), batches([*SCORES[:5], np.nan]), threshold=0.5)


def test_every_batch_is_handed_on_with_its_outputs_in_order():
    seen = []
    _, scores, *_ = measured(
        MeanScore(), batches(), threshold=0.5, on_batch=lambda *arguments: seen.append(arguments)
    )
    assert [len(batch["image"]) for batch, _ in seen] == [2, 2, 2]
    for batch, outputs in seen:
        assert outputs["anomaly_map"].shape == (2, 1, 4, 4)
        torch.testing.assert_close(outputs["pred_score"], batch["image"].mean(dim=(1, 2, 3)))
    np.testing.assert_array_equal(predict_scores(MeanScore(), batches()), scores)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("error", "bad_value", "masks", "on_batch"),
    [
        (None, None, None, None),
        (RuntimeError, SCORES[3], None, None),
        (ValueError, None, MASKS[:, :, :2], None),
        (ZeroDivisionError, None, None, lambda *_: 1 / 0),
    ],
    ids=["no error", "an image", "a mask", "the callback"],
)
def test_the_mode_of_the_model_is_restored_whatever_happens(
    training, error, bad_value, masks, on_batch
):
    model = MeanScore(bad_value=bad_value).train(training)
    with pytest.raises(error) if error else nullcontext():
        measured(model, batches(masks=masks), threshold=0.5, on_batch=on_batch)
    assert [module.training for module in model.modules()] == [training] * 2


def test_no_gradients_are_kept_and_the_model_is_not_changed():
    model = MeanScore()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _, outputs in predict(model, batches()):
        assert not model.grad_enabled
        assert not any(tensor.requires_grad for tensor in outputs.values())
    assert torch.is_grad_enabled()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


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
    sizes = (0.01, 0.02, 0.05, 0.1)
    curve = [{"size": s, "detection_rate": r} for s, r in zip(sizes, rates, strict=True)]
    assert size_detected(curve) == (expected and pytest.approx(expected))


def test_rates_and_their_limits_are_those_of_each_size():
    rows = detection_by_size([0.1, 0.2, 0.1, 0.2], [0, 1, 1, 1])
    # Exact limits of 1 of 2 and 2 of 2 at 95 %.
    one, two = (1 - np.sqrt(0.975), np.sqrt(0.975)), (np.sqrt(0.025), 1)
    assert [list(row.values()) for row in rows] == [
        pytest.approx([0.1, 2, 0.5, *one]),
        pytest.approx([0.2, 2, 1.0, *two]),
    ]
    rows = detection_by_size([0.005, 0.01, 0.011, 0.9], [1, 0, 1, 1], (0.01, 0.02, 1.0))
    assert [(row["size"], row["num_images"]) for row in rows] == [(0.01, 2), (0.02, 1), (1.0, 1)]


def test_the_largest_region_is_eight_connected():
    mask = np.zeros((8, 10), np.uint8)
    assert largest_region(mask) == 0
    mask[0, 0] = 1
    assert largest_region(mask) == pytest.approx(2 * np.sqrt(1 / np.pi))
    mask[3, 3] = mask[4, 4] = mask[5, 5] = 1
    mask[7] = 255  # not judged
    assert largest_region(mask) == pytest.approx(2 * np.sqrt(3 / np.pi))


class ContrastModel(nn.Module):
    """The map is how far a pixel is from grey; the score is its mean over the image."""

    def forward(self, images):
        anomaly_map = (images.float() / 255 - 0.5).abs().mean(dim=1, keepdim=True)
        return {"pred_score": anomaly_map.mean(dim=(1, 2, 3)), "anomaly_map": anomaly_map}


def test_larger_defects_are_detected_and_smaller_ones_are_not():
    images = np.full((2, 3, 64, 64), 128, np.uint8)
    made = synthetic_batches(every_defect(images), seed=0, batch_size=7)
    metrics = evaluate_synthetic(ContrastModel(), made, np.full(2, 0.5 / 255), threshold=0.004)
    assert metrics["num_images"] == 64
    by_kind = metrics["detection_by_size_and_kind"]
    assert set(by_kind) == {"blob", "missing", "scratch", "texture"}
    blob = by_kind["blob"]
    assert (blob[0]["detection_rate"], blob[-1]["detection_rate"]) == (0.0, 1.0)
    # On an even surface nothing can be missing, and a good detector sees nothing.
    assert {row["detection_rate"] for row in by_kind["missing"]} == {0}
    assert metrics["rejected_without_defect"] == 0
    assert metrics["num_without_defect"] == 2
    low, high = metrics["rejected_without_defect_interval"]
    assert (low, high) == (0, pytest.approx(1 - 0.025**0.5))  # (1 - p)^2 = 2.5 %
    assert metrics["size_detected_in_90_percent"] is None
    assert 0.5 < metrics["pixel_auroc"] <= 1
    json.dumps(metrics, allow_nan=False)


def test_synthetic_metrics_do_not_depend_on_the_batch_size():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 48, 48), dtype=np.uint8)
    cases = every_defect(images)
    one, many = (
        evaluate_synthetic(
            ContrastModel(), synthetic_batches(cases, 0, size), np.array([0.2, 0.3]), 0.25
        )
        for size in (1, 64)
    )
    assert one["detection_by_size"] == many["detection_by_size"]
    assert one["pixel_auroc"] == pytest.approx(many["pixel_auroc"])
