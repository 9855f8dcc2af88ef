"""Verdicts on images in tiles: the same from arrays, from files and after export."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders.detectors import detector_around
from builders.images import write_image
from builders.tiles import SHAPE, prepare_tiles, write_defects, write_textures
from PIL import Image
from torch import nn

from anomaly_detection import Detector, models
from anomaly_detection.data import PreparedDataset, create_dataloader
from anomaly_detection.data.overview import SIDE, overview_of_map
from anomaly_detection.errors import DataError
from anomaly_detection.evaluation.prepared import calibrate, evaluate_prepared
from anomaly_detection.evaluation.tiled import one_tile_each, predict_images, scores_by_tile
from anomaly_detection.export import export_detector
from anomaly_detection.inference import VerdictModel, save_detector
from anomaly_detection.inference.pytorch import run_pytorch
from anomaly_detection.models import restore, snapshot
from anomaly_detection.models.contract import AnomalyModel, FitContext

CPU = torch.device("cpu")


class Brightest(AnomalyModel):
    """The map is an image's brightness over its neighbourhood, the score its highest value."""

    hyperparameters: dict = {}  # noqa: RUF012

    def forward(self, images):
        grey = images[:, :3].float().mean(dim=1, keepdim=True)
        anomaly_map = nn.functional.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)
        if images.shape[1] > 3:
            anomaly_map = torch.where(images[:, 3:] > 0, anomaly_map, 0.0)
        return {"pred_score": anomaly_map.amax(dim=(1, 2, 3)), "anomaly_map": anomaly_map}


def detector_of(arrays: PreparedDataset, model: AnomalyModel | None = None) -> Detector:
    threshold, scores = 150.0, (120.0, 130.0)
    verdicts = VerdictModel(model or Brightest(), threshold, scores).eval()
    return detector_around(run_pytorch(verdicts, CPU), arrays.preprocessing(16), threshold, scores)


def paths_of(arrays: PreparedDataset) -> list[Path]:
    """The files of prepared images."""
    return [arrays.folder.parents[1] / "part" / row["path"] for row in arrays.rows]


def assert_same_verdict(prediction, outputs, **tolerances: float) -> None:
    """Exactly the same score and map, but for tolerances."""
    score, values = tolerances.get("score", 0), tolerances.get("map", 0)
    assert prediction.score == pytest.approx(outputs["pred_score"].item(), abs=score, rel=0)
    expected = outputs["anomaly_map"][0, 0]
    np.testing.assert_allclose(prediction.anomaly_map, expected, rtol=0, atol=values)


def evaluated(arrays: PreparedDataset, folder: Path, threshold: float, model=None, **options):
    options |= {"device": "cpu", "batch_size": 8, "aupro_limit": 0.3, "synthetic_images": 2}
    path = folder / "maps.npy"
    return evaluate_prepared(model or Brightest(), arrays, threshold, maps_path=path, **options)


@pytest.fixture(scope="module")
def spots(tmp_path_factory) -> PreparedDataset:
    """Test images with and without a bright spot."""
    root = tmp_path_factory.mktemp("spots")
    write_defects(root / "part")
    return PreparedDataset(prepare_tiles(root), "test")


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [(1, {}), (5, {"resize": "fit"}), (100, {"crop": [2, 3, 120, 90]}), (5, {})],
)
def test_a_file_gets_the_score_and_the_map_of_the_evaluation(tmp_path, batch_size, options):
    write_defects(tmp_path / "part")
    arrays = PreparedDataset(prepare_tiles(tmp_path, **options), "test")
    detector, paths = detector_of(arrays), paths_of(arrays)
    found = predict_images(Brightest(), arrays, batch_size)
    judged = detector.predict_many(paths, batch_size=batch_size)
    for row, path, (batch, outputs), prediction in zip(
        arrays.rows, paths, found, judged, strict=True
    ):
        assert batch["path"] == [row["path"]]
        assert_same_verdict(prediction, outputs)
        assert (prediction.verdict == "anomalous") == (row["label"] == "1")
        if row["label"] == "1":
            assert prediction.p_value == 1 / 3
        alone = detector.predict(path)
        assert (alone.score, alone.p_value) == (prediction.score, prediction.p_value)


def test_metrics_are_those_of_whole_images(tmp_path):
    write_defects(tmp_path / "part")
    arrays = PreparedDataset(prepare_tiles(tmp_path, image_size=48), "test")
    results = evaluated(arrays, tmp_path, 150.0)
    metrics = results.metrics
    assert (len(results.scores), metrics["num_normal"], metrics["num_anomalous"]) == (6, 3, 3)
    assert (metrics["num_misses"], metrics["num_false_rejects"]) == (0, 0)
    assert metrics["image_auroc"] == 1
    assert metrics["pixel_auroc"] > 0.99
    # The spot of 8 x 6 pixels, as a circle's diameter, is 0.16 of a tile's side.
    (row,) = metrics["detection_by_size"]
    assert row["size"] == 0.2
    maps = np.load(tmp_path / "maps.npy")
    assert maps.shape == (6, SIDE, SIDE)
    _, outputs = list(predict_images(Brightest(), arrays, 8))[5]
    assert np.array_equal(maps[5], overview_of_map(outputs["anomaly_map"][0, 0].numpy()))
    assert metrics["size_unit"] == {"name": "pixels", "per_side": 48}
    known = evaluated(arrays, tmp_path, -1.0, pixel_size=0.5).metrics
    assert known["size_unit"] == {"name": "mm", "per_side": 24}
    size = known["synthetic"]["size_detected_in_90_percent"]
    assert known["synthetic"]["pixels_detected_in_90_percent"] == 48 * size
    assert known["synthetic"]["mm_detected_in_90_percent"] == 24 * size


def test_a_synthetic_defect_is_on_one_tile_and_the_score_is_that_of_the_image(spots, tmp_path):
    by_tile, chosen = scores_by_tile(Brightest(), spots, 8), [3, 5]
    tiles = one_tile_each(spots, chosen, by_tile, seed=0)
    for image, pixels, others in zip(chosen, tiles.pixels, tiles.others, strict=True):
        own = spots.tiles()[spots.tiles_of(image)]
        (number,) = [i for i, tile in enumerate(own) if np.array_equal(tile, pixels)]
        assert others == np.delete(by_tile[image], number).max()
    # Where an image is anomalous elsewhere, as all are here, every synthetic defect is detected.
    threshold = min(np.sort(own)[-2] for own in by_tile) - 0.001
    metrics = evaluated(spots, tmp_path, threshold).metrics["synthetic"]
    assert all(row["detection_rate"] == 1 for row in metrics["detection_by_size"])
    assert metrics["rejected_without_defect"] == 1


def test_thresholds_are_set_on_whole_images_whose_score_is_the_highest_of_their_tiles(spots):
    by_tile = scores_by_tile(Brightest(), spots, 5)
    for own, (_, outputs) in zip(by_tile, predict_images(Brightest(), spots, 7), strict=True):
        assert len(own) == 12
        assert own.max() == outputs["pred_score"].item()
        assert np.array_equal(own, outputs["tile_scores"])
    arrays = PreparedDataset(spots.folder, "calibration")
    options = {"device": "cpu", "batch_size": 8, "false_reject_rate": 0.5, "manual": 0.0}
    parts = [(Brightest(), arrays)]
    scores, threshold = calibrate(parts, "quantile", quantile=0.5, **options)
    assert scores.tolist() == [own.max() for own in scores_by_tile(Brightest(), arrays, 8)]
    assert threshold == np.sort(scores)[1]
    _, adaptive = calibrate(parts, "adaptive", quantile=0.5, **options)
    assert adaptive >= scores.min()


def test_what_a_detector_cannot_judge_is_an_error_of_its_own(spots, tmp_path):
    detector, (path, other, *_) = detector_of(spots), paths_of(spots)
    small = write_image(tmp_path / "small.png", np.zeros((40, 130), np.uint8))
    found = list(detector.predict_many([path, small, other], batch_size=4))
    assert [isinstance(one, DataError) for one in found] == [False, True, False]
    assert "small.png: must be at least 48 x 48 pixels" in str(found[1])
    with pytest.raises(DataError, match="must have no mask"):
        detector.predict(path, np.ones(SHAPE, np.uint8))


# A mask for each image.


def half(is_left: int) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, :65], mask[:, 65:] = is_left, 1 - is_left
    return mask


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> PreparedDataset:
    """Images of which every other is judged on its left half, the rest on their right."""
    root = tmp_path_factory.mktemp("halves")
    write_textures(root / "part")
    for i in range(20):
        write_image(root / "part" / "judged" / f"{i:02}.png", half(i % 2))
    return PreparedDataset(prepare_tiles(root, image_size=48, mask="judged"), "test")


def test_each_image_is_judged_where_its_mask_says(halves):
    detector, found = detector_of(halves), predict_images(Brightest(), halves, 8)
    for image, (path, (_, outputs)) in enumerate(zip(paths_of(halves), found, strict=True)):
        region = halves.region(image)
        assert np.array_equal(region > 0, half(int(path.stem) % 2) > 0)
        prediction = detector.predict(path, path.parent / "judged" / path.name)
        assert_same_verdict(prediction, outputs)
        assert not prediction.anomaly_map[region == 0].any()
        with pytest.raises(DataError, match="must have a mask"):
            detector.predict(path)


def test_an_image_as_a_mask_is_read_as_its_file_is(halves, tmp_path):
    detector, (path, *_) = detector_of(halves), paths_of(halves)
    values = np.zeros(SHAPE, np.uint8)
    values[:40, :60] = 255
    expected = detector.predict(path, values).score
    for mode in ("L", "1", "RGB", "RGBA", "LA", "P"):
        mask = Image.fromarray(values).convert(mode)
        mask.save(tmp_path / "mask.png")
        for own in (mask, tmp_path / "mask.png"):
            assert detector.predict(path, own).score == expected, mode


# With PatchCore: exported.


def fitted(root: Path, **options) -> SimpleNamespace:
    """The test split of `<root>/part`, prepared, and PatchCore fitted to it."""
    folder = prepare_tiles(root, **options)
    fit, validation, test = (PreparedDataset(folder, x) for x in ("fit", "validation", "test"))
    spec, sizes = models.spec("patchcore"), {"max_patches": 600, "bank_size": 60}
    parameters = models.parameters("patchcore")(backbone="test_resnet", weights="random", **sizes)
    loaders = create_dataloader(fit, 8, shuffle=True), create_dataloader(validation, 8)
    torch.manual_seed(0)
    model = spec.build(parameters)
    context = FitContext(*loaders, root / "state", CPU)
    spec.fit(model, parameters, context)
    return SimpleNamespace(arrays=test, model=model, content=snapshot("patchcore", model))


def check_exports(made: SimpleNamespace, folder: Path) -> dict:
    """Detector and exports agree with the evaluation; returns the content of model.json."""
    save_detector(
        folder / "part.pt",
        model=made.content,
        threshold=3.0,
        calibration_scores=[1.0, 2.0],
        preprocessing=made.arrays.preprocessing(16),
        precision="float32",
        parameters={},
        provenance={},
    )
    export = folder / "exported"
    formats = ("onnx", "openvino", "openvino_resize")
    export_detector(folder / "part.pt", formats, export, made.arrays.tiles())
    expected = [x for _, x in predict_images(restore(made.content), made.arrays, 8)]
    paths = paths_of(made.arrays)
    for file in (folder / "part.pt", export / "model.onnx", export / "model.xml"):
        detector = Detector.load(file)
        for size in (1, 4):
            judged = detector.predict_many(paths, batch_size=size)
            for outputs, prediction in zip(expected, judged, strict=True):
                assert_same_verdict(prediction, outputs, score=1e-3, map=1e-2)
    resized = Detector.load(export / "model_resize.xml").predict(paths[0])
    assert resized.score == pytest.approx(expected[0]["pred_score"].item(), abs=0.2)
    return json.loads((export / "model.json").read_text())


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_exports_give_the_verdicts_of_the_evaluation(tmp_path, masked):
    category, mask = write_defects(tmp_path / "part", masks=False), np.ones(SHAPE, np.uint8)
    mask[:30] = 0
    if masked:
        write_image(category / "mask.png", mask)
    made = fitted(tmp_path, mask="mask.png" if masked else None)
    assert check_exports(made, tmp_path)["preprocessing"]["tile_size"] == 48
