"""Cross calibration: the real stages let all images but validation's both fit and calibrate."""

import numpy as np
import pytest
import torch
from builders.projects import ALL, EVERY_CATEGORY, Project, stages

from anomaly_detection import Detector
from anomaly_detection.data import PreparedDataset
from anomaly_detection.evaluation.thresholds import false_reject_threshold
from anomaly_detection.models import restore

pytestmark = pytest.mark.slow

RATE = 0.05  # takes 19 images: the calibration split has 4 of 24, all but validation's are 20
NUM_FOLDS = 4


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    project.change("data", categories=["bolt"])
    project.change("model", name="gaussian")
    project.change("training", num_epochs="auto")
    project.change("evaluation", false_reject_rate=RATE, folds=NUM_FOLDS)
    project.change("evaluation", calibration="cross")
    assert project.repro() == stages(ALL, EVERY_CATEGORY, ["bolt"])
    return project


@pytest.fixture(scope="module")
def folds(project) -> list[dict]:
    files = sorted((project.folder / "checkpoints/bolt/folds").iterdir())
    assert [file.name for file in files] == [f"{i}.pth" for i in range(NUM_FOLDS)]
    return [torch.load(file, weights_only=True) for file in files]


def test_each_image_but_those_of_validation_is_held_out_once(project, folds):
    prepared = PreparedDataset(project.folder / "data/prepared/bolt", ("fit", "calibration"))
    held_out = [name for fold in folds for name in fold["held_out"]]
    assert sorted(held_out) == sorted(row["sha256"] for row in prepared.rows)
    assert [len(fold["held_out"]) for fold in folds] == [5] * NUM_FOLDS


def test_the_threshold_comes_from_models_that_have_not_seen_the_image(project, folds):
    detector = Detector.load(project.folder / "detectors/bolt.pt")
    scores = []
    for fold in folds:
        model = restore(fold["model"], torch.device("cpu"))
        images = PreparedDataset(
            project.folder / "data/prepared/bolt",
            ("fit", "calibration"),
            contents=set(fold["held_out"]),
        )
        pictures = torch.stack([item["image"] for item in images])
        with torch.inference_mode():
            scores.append(model(pictures)["pred_score"].numpy())
    np.testing.assert_allclose(detector.calibration_scores, np.concatenate(scores), rtol=1e-5)
    assert detector.threshold == false_reject_threshold(detector.calibration_scores, RATE)
    assert detector.provenance["calibration"] == "cross"


def test_the_detector_s_model_is_fitted_to_the_images_of_all_folds(project, folds):
    """Each image is in three of four fits of equal size, so the mean of their means is its mean."""
    whole = torch.load(project.folder / "checkpoints/bolt/best_model.pth", weights_only=True)
    key = "gaussians.0.mean"
    means = torch.stack([fold["model"]["state_dict"][key] for fold in folds])
    torch.testing.assert_close(whole["model"]["state_dict"][key], means.mean(dim=0))
    assert not torch.allclose(means[0], means[1])


def test_another_number_of_folds_fits_again(project):
    project.change("evaluation", folds=2)
    expected = stages(["check", "report"], ("train", "evaluate", "export", "plot"), ["bolt"])
    assert project.repro() == expected
    assert len(list((project.folder / "checkpoints/bolt/folds").iterdir())) == 2
    project.change("evaluation", threshold_method="adaptive")
    assert "train@bolt" not in project.repro()


def test_more_folds_than_images_are_refused(project):
    project.change("evaluation", folds=21)
    assert "evaluation.folds must be at most the number of" in project.dvc("repro", ok=False)
