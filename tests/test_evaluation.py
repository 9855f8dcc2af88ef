import json

import numpy as np
import pytest
import torch
from torch import nn

from anomaly_detection.evaluation.run import evaluate, image_metrics, predict, predict_scores
from anomaly_detection.metrics import PixelHistogram

SCORES = [0.125, 0.5, 0.25, 0.75, 0.5, 1.0]
LABELS = [0, 0, 0, 1, 1, 1]
TYPES = ["good", "good", "good", "hole", "crack", "crack"]


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


def half_masks(labels=LABELS):
    """The left half of anomalous images."""
    masks = np.zeros((len(labels), 1, 4, 4), np.uint8)
    masks[np.array(labels) == 1, :, :, :2] = 1
    return masks


def test_metrics_at_a_threshold_by_hand():
    # 0.5 is not above 0.5: no false reject, and of the anomalous images the second is missed.
    metrics, scores, labels, predictions = evaluate(
        MeanScore(maps=False), batches(types=TYPES), threshold=0.5
    )
    assert scores.tolist() == SCORES
    assert labels.tolist() == LABELS
    assert predictions.tolist() == [0, 0, 0, 1, 0, 1]
    assert without_intervals(metrics) == {
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


def test_false_rejects_are_shares_of_normal_and_misses_of_anomalous_images():
    metrics = image_metrics(
        np.array([0, 0, 0, 0, 1, 1]), np.array([1, 2, 3, 4, 1, 5]), 2.5, ["good"] * 4 + ["a", "b"]
    )
    assert (metrics["false_reject_rate"], metrics["num_false_rejects"]) == (0.5, 2)
    assert (metrics["miss_rate"], metrics["num_misses"]) == (0.5, 1)


def test_without_a_threshold_the_verdicts_are_those_of_the_best_f1():
    metrics, _, _, predictions = evaluate(MeanScore(), batches())
    assert predictions.tolist() == [0, 1, 0, 1, 1, 1]
    assert 0.25 < metrics["threshold"] < 0.5
    assert metrics["image_f1"] == metrics["image_f1_max"] == pytest.approx(6 / 7)


def test_without_a_threshold_the_best_f1_is_reached_also_by_neighbouring_scores():
    low = np.float32(1 + 2**-23)
    scores = [float(low), float(np.nextafter(low, np.float32(2)))]
    labels = np.array([0, 1])
    model = ScoreGiver(scores)
    metrics, _, _, predictions = evaluate(model, batches(scores, labels.tolist()))
    assert metrics["image_f1"] == metrics["image_f1_max"] == 1
    assert predictions.tolist() == [0, 1]


class ScoreGiver(nn.Module):
    """The same scores for every batch: no arithmetic that could round them."""

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, images):
        return {"pred_score": self.scores[: len(images)]}


@pytest.mark.parametrize("size", [1, 4, 6])
def test_metrics_do_not_depend_on_the_batch_size(size):
    expected = evaluate(MeanScore(), batches(types=TYPES, masks=half_masks()), threshold=0.4)
    result = evaluate(
        MeanScore(), batches(types=TYPES, masks=half_masks(), size=size), threshold=0.4
    )
    assert result[0] == expected[0]
    for array, other in zip(result[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(array, other)


def test_pixel_metrics_are_those_of_the_pixel_histogram():
    masks = half_masks()
    metrics, *_ = evaluate(MeanScore(), batches(masks=masks), threshold=0.5, aupro_limit=0.1)
    histogram = PixelHistogram()
    histogram.update(np.array(SCORES)[:, None, None] * np.ones((6, 4, 4)), masks[:, 0])
    expected = histogram.compute(0.1)
    assert {name: metrics[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("maps", "masks"), [(False, half_masks()), (True, None), (True, 0 * half_masks())]
)
def test_pixel_metrics_are_absent_without_maps_masks_or_anomalous_pixels(maps, masks):
    metrics, *_ = evaluate(MeanScore(maps), batches(masks=masks), threshold=0.5)
    assert not [name for name in metrics if name.startswith(("pixel", "aupro"))]
    assert metrics["image_auroc"] is not None


def without_intervals(metrics):
    if not isinstance(metrics, dict):
        return metrics
    return {key: without_intervals(x) for key, x in metrics.items() if key != "intervals"}


def test_intervals_hold_their_metrics_and_are_exact_for_shares():
    metrics = image_metrics(
        np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9]), 0.5, ["good", "good", "a", "b"]
    )
    for name, (low, high) in metrics["intervals"].items():
        assert low <= metrics[name] <= high
    # One of two: Beta quantiles, 1 - sqrt(0.975) and sqrt(0.975).
    expected = pytest.approx([1 - 0.975**0.5, 0.975**0.5])
    assert metrics["intervals"]["miss_rate"] == expected
    assert metrics["per_defect_type"]["b"]["intervals"]["detection_rate"] == pytest.approx(
        [0.025, 1.0]
    )


def test_without_defect_types_all_anomalous_images_are_one_type():
    metrics, *_ = evaluate(MeanScore(), batches(), threshold=0.5)
    assert without_intervals(metrics["per_defect_type"]) == {
        "anomalous": {
            "num_images": 3,
            "image_auroc": metrics["image_auroc"],
            "detection_rate": pytest.approx(2 / 3),
        }
    }


def test_of_normal_images_only_the_false_rejects_are_defined():
    metrics, _, _, predictions = evaluate(
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
    metrics = image_metrics(np.array([1, 1]), np.array([1.0, 3.0]), 2.0, ["hole", "crack"])
    assert metrics["miss_rate"] == 0.5
    assert metrics["false_reject_rate"] is None
    assert metrics["undefined"]["false_reject_rate"] == "there are no good images."
    assert without_intervals(metrics["per_defect_type"]) == {
        "crack": {"num_images": 1, "image_auroc": None, "detection_rate": 1.0},
        "hole": {"num_images": 1, "image_auroc": None, "detection_rate": 0.0},
    }


def test_what_is_defined_is_not_listed_as_undefined():
    assert "undefined" not in evaluate(MeanScore(), batches(), threshold=0.5)[0]


@pytest.mark.parametrize("labels", [[0] * 6, [1] * 6, LABELS])
def test_metrics_are_strict_json(labels):
    data = batches(labels=labels, types=TYPES, masks=half_masks(labels))
    metrics, *_ = evaluate(MeanScore(), data, threshold=0.5)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_one_class_has_no_best_threshold():
    with pytest.raises(ValueError, match="must have both classes, 0 and 1"):
        evaluate(MeanScore(), batches(labels=[0] * 6))


def test_scores_that_are_not_finite_are_an_error_and_no_verdict():
    with pytest.raises(ValueError, match="finite"):
        evaluate(MeanScore(maps=False), batches([*SCORES[:5], np.nan]), threshold=0.5)


def test_every_batch_is_handed_on_with_its_outputs_in_order():
    seen = []
    evaluate(
        MeanScore(), batches(), threshold=0.5, on_batch=lambda *arguments: seen.append(arguments)
    )
    assert [len(batch["image"]) for batch, _ in seen] == [2, 2, 2]
    for batch, outputs in seen:
        assert outputs["anomaly_map"].shape == (2, 1, 4, 4)
        torch.testing.assert_close(outputs["pred_score"], batch["image"].mean(dim=(1, 2, 3)))


def test_predict_scores_are_those_of_evaluate():
    scores = predict_scores(MeanScore(), batches())
    np.testing.assert_array_equal(scores, evaluate(MeanScore(), batches(), threshold=0)[1])


def bad_image(model):
    model.bad_value = SCORES[3]
    return {}


def bad_map(model):
    return {"masks": half_masks()[:, :, :2]}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cause", [None, bad_image, bad_map])
def test_the_mode_of_the_model_is_restored_whatever_happens(training, cause):
    model = MeanScore().train(training)
    data = batches(**cause(model)) if cause else batches()
    try:
        evaluate(model, data, threshold=0.5)
    except (RuntimeError, ValueError):
        assert cause is not None
    else:
        assert cause is None
    assert [module.training for module in model.modules()] == [training] * 2


def test_the_mode_of_the_model_is_restored_if_the_callback_raises():
    model = MeanScore().train()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, batches(), threshold=0.5, on_batch=lambda *_: 1 / 0)
    assert model.training


def test_no_gradients_are_kept_and_the_model_is_not_changed():
    model = MeanScore()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _, outputs in predict(model, batches()):
        assert not model.grad_enabled
        assert not any(tensor.requires_grad for tensor in outputs.values())
    assert torch.is_grad_enabled()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_pixel_metrics_of_a_type_are_those_of_normal_images_and_that_type_alone(size):
    masks, types = half_masks(), np.array(TYPES)
    metrics, *_ = evaluate(
        MeanScore(), batches(types=TYPES, masks=masks, size=size), threshold=0.5, aupro_limit=0.2
    )
    for name, of_type in metrics["per_defect_type"].items():
        chosen = (types == "good") | (types == name)
        histogram = PixelHistogram()
        histogram.update(np.array(SCORES)[chosen, None, None] * np.ones((4, 4)), masks[chosen, 0])
        expected = histogram.compute(0.2)
        assert {key: of_type[key] for key in expected} == pytest.approx(expected)
    crack, hole = (metrics["per_defect_type"][name] for name in ("crack", "hole"))
    assert crack["pixel_auroc"] != hole["pixel_auroc"]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 2.0])
def test_intervals_contain_the_metrics(threshold):
    metrics, *_ = evaluate(MeanScore(), batches(types=TYPES), threshold=threshold)
    for part in (metrics, *metrics["per_defect_type"].values()):
        assert part["intervals"]
        for name, (low, high) in part["intervals"].items():
            assert 0 <= low <= part[name] <= high <= 1, name
