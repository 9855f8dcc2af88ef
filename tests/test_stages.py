"""The stages, one after the other in this process: folds that calibrate, tiles with masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_image
from builders.projects import Workspace

from anomaly_detection import Detector
from anomaly_detection.cli import main as command_line
from anomaly_detection.data import PreparedDataset
from anomaly_detection.errors import UserError
from anomaly_detection.evaluation.thresholds import false_reject_threshold
from anomaly_detection.models import restore

RATE = 0.05  # takes 19 images: the calibration split has 4 of 24, all but validation's are 20
NUM_FOLDS = 4


@pytest.fixture(scope="module")
def crossed(tmp_path_factory) -> Workspace:
    """Evaluated with cross calibration."""
    made = Workspace(tmp_path_factory.mktemp("crossed") / "project", "bolt")
    made.use_small_model("gaussian")
    made.change("evaluation", false_reject_rate=RATE, folds=NUM_FOLDS, calibration="cross")
    made.stages("prepare", "pretrain", "train", "evaluate")
    return made


@pytest.fixture(scope="module")
def folds(crossed) -> list[dict]:
    files = sorted((crossed.folder / "checkpoints/bolt/folds").iterdir())
    assert [file.name for file in files] == [f"{i}.pth" for i in range(NUM_FOLDS)]
    return [torch.load(file, weights_only=True) for file in files]


def test_each_image_but_those_of_validation_is_held_out_once(crossed, folds):
    prepared = PreparedDataset(crossed.folder / "data/prepared/bolt", ("fit", "calibration"))
    held_out = [name for fold in folds for name in fold["held_out"]]
    assert sorted(held_out) == sorted(row["sha256"] for row in prepared.rows)
    assert [len(fold["held_out"]) for fold in folds] == [5] * NUM_FOLDS


def test_the_threshold_comes_from_models_that_have_not_seen_the_image(crossed, folds):
    detector = Detector.load(crossed.folder / "detectors/bolt.pt")
    prepared = crossed.folder / "data/prepared/bolt"
    scores = []
    for fold in folds:
        unseen = set(fold["held_out"])
        images = PreparedDataset(prepared, ("fit", "calibration"), contents=unseen)
        pictures = torch.stack([item["image"] for item in images])
        with torch.inference_mode():
            model = restore(fold, torch.device("cpu"))
            scores.append(model(pictures)["pred_score"].numpy())
    np.testing.assert_allclose(detector.calibration_scores, np.concatenate(scores), rtol=1e-5)
    assert detector.threshold == false_reject_threshold(detector.calibration_scores, RATE)
    assert detector.provenance["calibration"] == "cross"


def test_the_detector_s_model_is_fitted_to_the_images_of_all_folds(crossed, folds):
    """Its mean is that of the features of all; a fold's is another one."""
    whole = torch.load(crossed.folder / "checkpoints/bolt/best_model.pth", weights_only=True)
    key, splits = "gaussians.0.mean", ("fit", "calibration", "validation")
    images = PreparedDataset(crossed.folder / "data/prepared/bolt", splits)
    with torch.inference_mode():
        features = restore(whole).extract(torch.stack([item["image"] for item in images]))[0]
    expected = features.mean(dim=0).flatten(1).T
    torch.testing.assert_close(whole["model_state_dict"][key], expected, rtol=1e-3, atol=1e-4)
    for fold in folds:
        assert not torch.allclose(fold["model_state_dict"][key], expected, rtol=1e-3, atol=1e-4)


def test_folds_decide_what_is_fitted_only_with_cross_calibration(crossed, tmp_path):
    """By what `train` depends on."""
    made = crossed.copy(tmp_path / "project")

    def decides(**changes) -> dict:
        made.change("evaluation", **changes)
        made.stage("check")
        return made.json("checked/bolt.json")

    first = decides()
    assert decides(threshold_method="adaptive") == first
    assert decides(folds=2) != first
    assert decides(calibration="split") == decides(folds=3)


def test_more_folds_than_images_are_refused(crossed, tmp_path):
    made = crossed.copy(tmp_path / "project")
    made.change("evaluation", folds=21)
    with pytest.raises(UserError, match=r"evaluation.folds must be at most the number of"):
        made.stages("train")


TILES = {"tile_size": 32, "tile_overlap": 4, "image_size": 32, "mask": "judged"}


@pytest.fixture(scope="module")
def tiled(tmp_path_factory) -> Workspace:
    """Exported, of images in tiles that each have a mask of what is judged."""
    made = Workspace(tmp_path_factory.mktemp("tiled") / "project", "bolt")
    category = made.folder / "parts/bolt"
    for path in [*category.glob("train/*/*.png"), *category.glob("test/*/*.png")]:
        judged = np.ones((64, 64), np.uint8)
        judged[:, :4] = 0
        write_image(category / "judged" / path.relative_to(category), judged)
    made.change("data", pixel_size=0.5, **TILES)
    made.use_small_model("patchcore")
    made.change("patchcore", max_patches=1000, bank_size=100)
    made.change("export", formats=["onnx"])
    made.stages("prepare", "pretrain", "train", "evaluate", "export")
    return made


def test_results_are_those_of_whole_images(tiled):
    metrics = tiled.json("metrics/bolt/evaluate.json")
    assert (metrics["num_normal"], metrics["num_anomalous"]) == (4, 8)
    assert metrics["image_auroc"] > 0.9
    assert metrics["pixel_auroc"] > 0.8
    assert metrics["size_unit"] == {"name": "mm", "per_side": 16}
    rows = tiled.rows("predictions/bolt/scores.csv")
    maps = np.load(tiled.folder / "predictions/bolt/anomaly_maps.npy")
    assert maps.shape == (len(rows), 512, 512) == (12, 512, 512)
    assert not maps[:, :, :28].any()


def test_exports_of_tiles_give_the_same_verdicts(tiled):
    for found in tiled.json("metrics/bolt/parity.json")["formats"].values():
        assert found["num_verdicts_changed"] == 0
        assert found["largest_map_difference"] < 1e-2


def exit_status(*arguments: object) -> int:
    """That of the command line."""
    with pytest.raises(SystemExit) as ended:
        command_line([str(x) for x in arguments])
    return ended.value.code


def test_new_images_are_judged_with_their_masks(tiled, tmp_path, capsys):
    parts = tiled.folder / "parts/bolt"
    command = ["predict", "--detector", tiled.folder / "exports/bolt", parts / "test/good"]
    masks, output = ["--masks", parts / "judged"], ["--output", tmp_path / "rows.csv"]
    drawn = ["--maps", tmp_path / "maps", "--overlays", tmp_path / "overlays"]
    assert exit_status(*command, *masks, *drawn, *output) == 0
    known = {
        Path(row["path"]).name: float(row["score"])
        for row in tiled.rows("predictions/bolt/scores.csv")
        if row["defect_type"] == "good"
    }
    judged = tiled.rows(tmp_path / "rows.csv")
    assert len(judged) == 4
    for row in judged:
        assert float(row["score"]) == pytest.approx(known[Path(row["path"]).name], rel=1e-4)
    (first, *_) = sorted((tmp_path / "maps").rglob("*.npy"))
    assert np.load(first).shape == (64, 64)
    assert len(list((tmp_path / "overlays").rglob("*.png"))) == 4
    capsys.readouterr()
    assert exit_status(*command) != 0
    needed = "must have a mask, since the detector was fitted with masks."
    assert capsys.readouterr().out.count(needed) == 4
