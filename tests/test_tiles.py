"""Large pictures: cut into tiles, judged tile by tile, and put together again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from anomaly_detection import Detector, models
from anomaly_detection.data import PreparedDataset, create_dataloader, prepare_category
from anomaly_detection.data.decode import resize_image
from anomaly_detection.data.frame import Frame
from anomaly_detection.data.overview import SIDE, overview, overview_of_map
from anomaly_detection.data.sample import picture_named
from anomaly_detection.data.tiles import Blend, Grid, chunks
from anomaly_detection.errors import DataError
from anomaly_detection.evaluation.prepared import calibrate, evaluate_prepared
from anomaly_detection.evaluation.synthetic import one_defect_each
from anomaly_detection.evaluation.tiled import one_tile_each, predict_images, scores_by_tile
from anomaly_detection.export import export_detector
from anomaly_detection.inference import VerdictModel, save_detector
from anomaly_detection.inference.pytorch import run_pytorch
from anomaly_detection.models import restore, snapshot
from anomaly_detection.models.contract import AnomalyModel, FitContext


@pytest.mark.parametrize(
    ("length", "side", "overlap", "starts"),
    [
        (10, 10, 0, (0,)),
        (20, 10, 0, (0, 10)),
        (21, 10, 0, (0, 6, 11)),  # 5.5 rounded up
        (20, 10, 1, (0, 5, 10)),
        (18, 10, 2, (0, 8)),
        (19, 10, 2, (0, 5, 9)),
    ],
)
def test_tiles_are_evenly_spaced_and_end_at_the_border(length, side, overlap, starts):
    assert Grid.covering(length, side, side, overlap).tops == starts
    assert Grid.covering(side, length, side, overlap).lefts == starts


def test_tiles_are_numbered_along_the_rows():
    grid = Grid.covering(20, 30, 10)
    assert (len(grid), grid.boxes()[4]) == (6, (slice(10, 20), slice(10, 20)))


@pytest.mark.parametrize(("height", "overlap"), [(9, 0), (20, 10), (20, -1)])
def test_a_grid_that_cannot_be_is_refused(height, overlap):
    with pytest.raises(ValueError, match="must be"):
        Grid.covering(height, 20, 10, overlap)


@st.composite
def grids(draw):
    side = draw(st.integers(1, 40))
    height, width = (draw(st.integers(side, 200)) for _ in range(2))
    return Grid.covering(height, width, side, draw(st.integers(0, side // 2))), draw


@given(grids(), st.integers(1, 60))
@settings(deadline=None)
def test_every_pixel_is_in_a_tile_at_every_scale(made, scale):
    grid, _ = made
    for each in (grid, grid.scaled(scale)):
        covered = np.zeros((each.height, each.width), int)
        for box in each.boxes():
            part = covered[box]
            assert part.shape == (each.side, each.side)
            part += 1
        assert covered.min() >= 1
        assert covered[0, 0] == covered[-1, -1] == 1 or len(each) == 1 or min(each.side, 2) == 1


@given(grids())
@settings(deadline=None)
def test_neighbours_share_what_they_must_and_one_tile_fewer_would_not_do(made):
    grid, draw = made
    overlap = draw(st.integers(0, grid.side // 2))
    grid = Grid.covering(grid.height, grid.width, grid.side, overlap)
    for starts, length in ((grid.tops, grid.height), (grid.lefts, grid.width)):
        steps = np.diff(starts)
        assert (grid.side - steps >= overlap).all()
        assert np.ptp(steps) <= 1 if len(steps) else True
        fewer = len(starts) - 1
        assert fewer * grid.side - (fewer - 1) * overlap < length


@given(grids(), st.floats(-1e3, 1e3, width=32))
@settings(deadline=None)
def test_a_constant_map_stays_constant(made, value):
    grid, _ = made
    blend = Blend(grid)
    for number in range(len(grid)):
        blend.add(number, np.full((grid.side, grid.side), value, np.float32))
    np.testing.assert_allclose(blend.whole, np.float32(value), rtol=1e-6, atol=1e-30)


@given(grids(), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_what_is_cut_is_what_is_put_together(made, seed):
    grid, _ = made
    whole = np.random.default_rng(seed).normal(size=(grid.height, grid.width))
    tiles, numbers = [whole[box] for box in grid.boxes()], range(len(grid))
    assert np.array_equal(grid.joined(tiles, numbers), whole)
    blend = Blend(grid)
    for number in np.random.default_rng(seed).permutation(len(grid)):
        blend.add(number, tiles[number])
    np.testing.assert_allclose(blend.whole, whole, rtol=1e-5, atol=1e-6)


def test_there_is_no_seam_where_tiles_disagree():
    """The map passes from one tile's value to the other's in equal steps, by hand."""
    blend = Blend(Grid.covering(4, 6, 4, 2))
    blend.add(0, np.zeros((4, 4)))
    blend.add(1, np.ones((4, 4)))
    assert blend.whole[0].tolist() == pytest.approx([0, 0, 0.25, 0.75, 1, 1])


def test_one_tile_is_the_whole_map_to_the_last_bit():
    values = np.random.default_rng(0).normal(size=(50, 50)).astype(np.float32)
    blend = Blend(Grid.covering(50, 50, 50))
    blend.add(0, values)
    assert np.array_equal(blend.whole, values)


@pytest.mark.parametrize("stack", [1, 3, 7, 8])
def test_chunks_have_all_tiles_in_order(stack):
    parts = list(chunks(iter(range(7)), stack))
    assert max(map(len, parts)) <= stack
    assert [item for part in parts for item in part] == list(range(7))


@pytest.mark.parametrize("smooth", [1, 5])
def test_an_equivariant_model_gives_the_same_map_with_and_without_tiles(smooth):
    """Away from the tiles' borders, where it sees less than the whole."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 110), np.uint8)
    grid, reach = Grid.covering(70, 110, 40, 20), smooth // 2

    def mean(image):
        return nn.functional.avg_pool2d(
            torch.tensor(image, dtype=torch.float32)[None, None], smooth, 1, reach
        )[0, 0].numpy()

    blend, is_away = Blend(grid), np.ones((70, 110), bool)
    for number, box in enumerate(grid.boxes()):
        blend.add(number, mean(pixels[box]))
        inside = np.zeros((40, 40), bool)
        inside[reach : 40 - reach, reach : 40 - reach] = True
        is_away[box] &= inside
    assert is_away.mean() > 0.5
    np.testing.assert_allclose(blend.whole[is_away], mean(pixels)[is_away], rtol=1e-5)
    if smooth == 1:
        assert is_away.all()


# --- from files to arrays


def write_pictures(folder, count=20, size=(90, 130), colour=True, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(count):
        shape = (*size, 3) if colour else size
        write_image(folder / f"{i:02}.png", rng.integers(100, 140, shape, np.uint8))
    return folder


def prepared(root, category="part", **options):
    fractions = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "test_fraction": 0.2}
    size = {"image_size": 32, "tile_size": 48, "tile_overlap": 8, "bit_depth": 16, "seed": 0}
    prepare_category(root, category, root / "out", **fractions, **size | options)
    return root / "out"


@pytest.mark.parametrize("colour", [True, False])
def test_tiles_are_cut_at_full_size_and_then_resized(tmp_path, colour):
    write_pictures(tmp_path / "part", colour=colour)
    folder = prepared(tmp_path)
    arrays = PreparedDataset(folder, "fit")
    grid = Grid.covering(90, 130, 48, 8)
    assert (len(grid), len(arrays.rows), len(arrays)) == (12, 8, 8 * 12)
    for image in (0, 3):
        pixels = np.asarray(Image.open(tmp_path / "part" / arrays.rows[image]["path"]))
        expected = np.stack([resize_image(pixels[box], 32) for box in grid.boxes()])
        assert np.array_equal(arrays.tiles()[arrays.tiles_of(image)], expected)
        assert np.array_equal(arrays.pictures()[image], overview(pixels))
    item = arrays[13]
    assert item["path"] == f"{arrays.rows[1]['path']}#1"
    assert torch.equal(item["image"], torch.tensor(arrays.tiles()[13]))


def test_tiles_of_other_splits_are_not_among_them(tmp_path):
    write_pictures(tmp_path / "part")
    folder = prepared(tmp_path)
    splits = [PreparedDataset(folder, split) for split in ("fit", "validation", "calibration")]
    positions = np.concatenate([split.positions for split in splits])
    test = PreparedDataset(folder, "test").positions
    assert sorted(positions) == list(range(len(positions)))
    assert sorted(test) == list(range(len(test)))
    assert len(positions) + len(test) == 20 * 12


def test_pictures_may_have_different_sizes(tmp_path):
    write_pictures(tmp_path / "part")
    write_pictures(tmp_path / "part" / "wide", 3, (50, 200))
    for path in (tmp_path / "part" / "wide").iterdir():
        path.rename(tmp_path / "part" / f"wide {path.name}")
    (tmp_path / "part" / "wide").rmdir()
    folder = prepared(tmp_path)
    found = set()
    for split in ("fit", "validation", "calibration", "test"):
        arrays = PreparedDataset(folder, split)
        for image in range(len(arrays.rows)):
            tiles = arrays.tiles_of(image)
            found.add((tiles.stop - tiles.start, len(arrays.grid(image))))
    assert found == {(12, 12), (10, 10)}


def test_pictures_that_are_smaller_than_a_tile_are_all_named(tmp_path):
    write_pictures(tmp_path / "part", size=(40, 130))
    with pytest.raises(DataError) as error:
        prepared(tmp_path)
    assert str(error.value).count("must be at least 48 x 48 pixels for data.tile_size, got") == 20


def write_defects(folder, masks=True):
    """Test images with a bright spot that four tiles share, and its masks."""
    rng = np.random.default_rng(1)
    write_pictures(folder / "train" / "good")
    write_pictures(folder / "test" / "good", 3, seed=2)
    for i in range(3):
        image = rng.integers(100, 140, (90, 130, 3), np.uint8)
        mask = np.zeros((90, 130), np.uint8)
        image[42:50, 40:46] = 255
        mask[42:50, 40:46] = 255
        write_image(folder / "test" / "spot" / f"{i}.png", image)
        if masks:
            write_image(folder / "ground_truth" / "spot" / f"{i}_mask.png", mask)
    return folder


@pytest.mark.parametrize("size", [48, 24])
def test_masks_are_those_of_whole_images_at_the_scale_of_the_tiles(tmp_path, size):
    write_defects(tmp_path / "part")
    arrays = PreparedDataset(prepared(tmp_path, image_size=size), "test")
    for image, row in enumerate(arrays.rows):
        mask = arrays.mask(image)
        if row["label"] == "0":
            assert mask is None
            assert not arrays.whole(image)["mask"].any()
            continue
        assert mask.shape == (90 * size // 48, 130 * size // 48)
        rows, columns = np.nonzero(mask)
        scale = 48 / size
        assert [rows.min() * scale, (rows.max() + 1) * scale] == pytest.approx([42, 50], abs=scale)
        assert [columns.min() * scale, (columns.max() + 1) * scale] == pytest.approx(
            [40, 46], abs=scale
        )
        assert np.array_equal(arrays.whole(image)["mask"][0, 0], mask)


def test_tiles_where_nothing_is_judged_are_left_out(tmp_path):
    write_pictures(tmp_path / "part")
    mask = np.zeros((90, 130), np.uint8)
    mask[:10, :20] = 1  # in the first tile alone
    write_image(tmp_path / "part" / "mask.png", mask)
    arrays = PreparedDataset(prepared(tmp_path, mask="mask.png"), "test")
    assert len(arrays) == len(arrays.rows) == 4
    assert set(arrays.numbers) == {0}
    assert arrays.images.shape[1] == 4
    region = arrays.region(0)
    assert region.shape == (60, 87)
    assert region[:6, :13].all()
    assert not region[8:].any()
    assert (arrays.whole(0)["mask"][0, 0].numpy() == 255).mean() > 0.9


# --- from arrays and from files to verdicts


class Brightest(AnomalyModel):
    """The map is an image's brightness over its neighbourhood, the score its highest value."""

    hyperparameters: dict = {}  # noqa: RUF012

    def forward(self, images):
        grey = images[:, :3].float().mean(dim=1, keepdim=True)
        anomaly_map = nn.functional.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)
        if images.shape[1] > 3:
            anomaly_map = torch.where(images[:, 3:] > 0, anomaly_map, 0.0)
        return {"pred_score": anomaly_map.amax(dim=(1, 2, 3)), "anomaly_map": anomaly_map}


def detector_of(arrays, threshold=150.0, scores=(120.0, 130.0), model=None):
    content = {
        "threshold": threshold,
        "calibration_scores": list(scores),
        "preprocessing": arrays.preprocessing(16),
        "parameters": {},
        "provenance": {},
    }
    verdicts = VerdictModel(model or Brightest(), threshold, scores).eval()
    return Detector(content, run_pytorch(verdicts, torch.device("cpu")))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("options", [{}, {"resize": "fit"}, {"crop": [2, 3, 120, 90]}])
def test_a_file_gets_the_score_and_the_map_of_the_evaluation(tmp_path, batch_size, options):
    write_defects(tmp_path / "part")
    arrays = PreparedDataset(prepared(tmp_path, **options), "test")
    detector = detector_of(arrays)
    paths = [tmp_path / "part" / row["path"] for row in arrays.rows]
    found = predict_images(Brightest(), arrays, batch_size)
    judged = detector.predict_many(paths, batch_size=batch_size)
    for row, path, (batch, outputs), prediction in zip(
        arrays.rows, paths, found, judged, strict=True
    ):
        assert batch["path"] == [row["path"]]
        assert prediction.score == outputs["pred_score"].item()
        assert np.array_equal(prediction.anomaly_map, outputs["anomaly_map"][0, 0])
        assert (prediction.verdict == "anomalous") == (row["label"] == "1")
        assert prediction.p_value == ((1 / 3) if row["label"] == "1" else prediction.p_value)
        alone = detector.predict(path)
        assert (alone.score, alone.p_value) == (prediction.score, prediction.p_value)


def test_the_score_is_the_highest_of_the_tiles(tmp_path):
    write_defects(tmp_path / "part")
    arrays = PreparedDataset(prepared(tmp_path), "test")
    by_tile = scores_by_tile(Brightest(), arrays, 5)
    for own, (_, outputs) in zip(by_tile, predict_images(Brightest(), arrays, 7), strict=True):
        assert len(own) == 12
        assert own.max() == outputs["pred_score"].item()
        assert np.array_equal(own, outputs["tile_scores"])


def evaluated(arrays, tmp_path, threshold, model=None, **options):
    options = {"device": "cpu", "batch_size": 8, "aupro_limit": 0.3} | options
    return evaluate_prepared(
        model or Brightest(),
        arrays,
        threshold,
        maps_path=tmp_path / "maps.npy",
        **{"synthetic_images": 2} | options,
    )


def test_metrics_are_those_of_whole_images(tmp_path):
    write_defects(tmp_path / "part")
    arrays = PreparedDataset(prepared(tmp_path, image_size=48), "test")
    results = evaluated(arrays, tmp_path, 150.0)
    metrics = results.metrics
    assert (len(results.scores), metrics["num_normal"], metrics["num_anomalous"]) == (6, 3, 3)
    assert (metrics["num_misses"], metrics["num_false_rejects"]) == (0, 0)
    assert metrics["image_auroc"] == 1
    assert metrics["pixel_auroc"] > 0.99
    # The spot of 8 x 6 pixels, as a circle's diameter and a share of a tile's 48.
    (row,) = metrics["detection_by_size"]
    assert row["size"] == 0.2
    assert 2 * np.sqrt(48 / np.pi) / 48 < 0.2
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


def test_a_synthetic_defect_is_on_one_tile_and_the_score_is_that_of_the_image(tmp_path):
    write_defects(tmp_path / "part")
    arrays = PreparedDataset(prepared(tmp_path), "test")
    by_tile = scores_by_tile(Brightest(), arrays, 8)
    chosen = [3, 5]
    tiles = one_tile_each(arrays, chosen, by_tile, seed=0)
    for image, pixels, others in zip(chosen, tiles.pixels, tiles.others, strict=True):
        own = arrays.tiles()[arrays.tiles_of(image)]
        (number,) = [i for i, tile in enumerate(own) if np.array_equal(tile, pixels)]
        assert others == np.delete(by_tile[image], number).max()
    # Where an image has an anomaly elsewhere, it is found with every synthetic defect.
    metrics = evaluated(arrays, tmp_path, -1.0).metrics["synthetic"]
    assert all(row["detection_rate"] == 1 for row in metrics["detection_by_size"])
    assert metrics["rejected_without_defect"] == 1


def test_thresholds_are_set_on_whole_images(tmp_path):
    write_pictures(tmp_path / "part")
    arrays = PreparedDataset(prepared(tmp_path), "calibration")
    options = {"device": "cpu", "batch_size": 8, "false_reject_rate": 0.5, "manual": 0.0}
    parts = [(Brightest(), arrays)]
    scores, threshold = calibrate(parts, "quantile", quantile=0.5, **options)
    assert scores.tolist() == [own.max() for own in scores_by_tile(Brightest(), arrays, 8)]
    assert threshold == np.sort(scores)[1]
    _, adaptive = calibrate(parts, "adaptive", quantile=0.5, **options)
    assert adaptive >= scores.min()


def test_a_mask_for_each_picture(tmp_path):
    """The left half of some and the right half of others is judged, from arrays and from files."""
    folder = write_pictures(tmp_path / "part")
    for i in range(20):
        mask = np.zeros((90, 130), np.uint8)
        mask[:, :65] = i % 2
        mask[:, 65:] = 1 - i % 2
        write_image(folder / "judged" / f"{i:02}.png", mask)
    arrays = PreparedDataset(prepared(tmp_path, image_size=48, mask="judged"), "test")
    detector = detector_of(arrays)
    for image, (row, (_, outputs)) in enumerate(
        zip(arrays.rows, predict_images(Brightest(), arrays, 8), strict=True)
    ):
        region = arrays.region(image)
        left = int(row["path"][:2]) % 2
        assert region[:, :65].all() == left
        assert region[:, 65:].all() == 1 - left
        path, mask = folder / row["path"], folder / "judged" / row["path"]
        prediction = detector.predict(path, mask)
        assert prediction.score == outputs["pred_score"].item()
        assert np.array_equal(prediction.anomaly_map, outputs["anomaly_map"][0, 0])
        assert not prediction.anomaly_map[region == 0].any()
        with pytest.raises(DataError, match="must have a mask"):
            detector.predict(path)


def test_a_picture_without_its_mask_is_named(tmp_path):
    folder = write_pictures(tmp_path / "part")
    for i in range(19):
        write_image(folder / "judged" / f"{i:02}.png", np.ones((90, 130), np.uint8))
    with pytest.raises(DataError, match=r"19.png: must have a mask, such as .*judged/19.png"):
        prepared(tmp_path, mask="judged")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("line/good/1.jpg", "line/good/1.png"),
        ("other/good/1.jpg", "good/1.tif"),
        ("1.jpg", "1.PNG"),
        ("../line/../1.jpg", "1.PNG"),
        ("/line/good/1.jpg", "line/good/1.png"),
    ],
)
def test_a_mask_is_found_by_its_name(tmp_path, path, found):
    masks = tmp_path / "masks"
    for name in ("line/good/1.png", "good/1.tif", "1.PNG"):
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        (masks / name).touch()
    (tmp_path / "1.png").touch()
    assert picture_named(Path(path), masks) == masks / found
    with pytest.raises(DataError, match=r"2.jpg: must have a mask, such as .*masks/2.png"):
        picture_named(Path("../2.jpg"), masks)


def test_two_pictures_do_not_share_a_mask(tmp_path):
    folder = write_defects(tmp_path / "part")
    for path in folder.glob("t*/*/*.png"):
        write_image(folder / "judged" / path.parent.name / path.name, np.ones((90, 130), np.uint8))
    with pytest.raises(DataError) as error:
        prepared(tmp_path, mask="judged")
    assert str(error.value).count("must have a mask of its own, but ") == 3


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA", "P"])
def test_a_picture_as_a_mask_is_read_as_its_file_is(tmp_path, mode):
    folder = write_pictures(tmp_path / "part")
    for i in range(20):
        write_image(folder / "judged" / f"{i:02}.png", np.ones((90, 130), np.uint8))
    detector = detector_of(PreparedDataset(prepared(tmp_path, mask="judged"), "test"))
    values = np.zeros((90, 130), np.uint8)
    values[:40, :60] = 255
    mask = Image.fromarray(values).convert(mode)
    mask.save(tmp_path / "mask.png")
    scores = [
        detector.predict(folder / "00.png", own).score for own in (mask, tmp_path / "mask.png")
    ]
    assert scores[0] == scores[1]
    assert detector.predict(folder / "00.png", values).score == scores[0]


def test_a_mask_that_nobody_asked_for_is_refused(tmp_path):
    write_pictures(tmp_path / "part")
    detector = detector_of(PreparedDataset(prepared(tmp_path), "test"))
    with pytest.raises(DataError, match="must have no mask"):
        detector.predict(np.zeros((90, 130), np.uint8), np.ones((90, 130), np.uint8))


def test_a_picture_that_a_detector_cannot_tile_is_an_error_of_its_own(tmp_path):
    folder = write_pictures(tmp_path / "part")
    detector = detector_of(PreparedDataset(prepared(tmp_path), "test"))
    write_image(tmp_path / "small.png", np.zeros((40, 130), np.uint8))
    paths = [folder / "00.png", tmp_path / "small.png", folder / "01.png"]
    found = list(detector.predict_many(paths, batch_size=4))
    assert [isinstance(one, DataError) for one in found] == [False, True, False]
    assert "small.png: must be at least 48 x 48 pixels" in str(found[1])


def save_part(path, model, arrays):
    """A detector with the model of a snapshot, for pictures cut like the arrays."""
    save_detector(
        path,
        model=model,
        threshold=3.0,
        calibration_scores=[1.0, 2.0],
        preprocessing=arrays.preprocessing(16),
        precision="float32",
        parameters={},
        provenance={},
    )


@pytest.mark.parametrize("masked", [False, True])
def test_exports_give_the_verdicts_of_the_evaluation(tmp_path, masked):
    folder, options = write_defects(tmp_path / "part", masks=False), {}
    if masked:
        mask = np.ones((90, 130), np.uint8)
        mask[:30] = 0
        write_image(folder / "mask.png", mask)
        options = {"mask": "mask.png"}
    arrays = PreparedDataset(prepared(tmp_path, **options), "test")
    name = "patchcore"
    parameters = models.parameters(name)(
        backbone="resnet18", weights="random", max_patches=256, bank_size=16
    )
    model = models.spec(name).build(parameters).eval()
    fit = torch.tensor(PreparedDataset(folder.parent / "out", "fit").tiles()[:24])
    with torch.no_grad():
        model.bank = model.extract(fit).permute(0, 2, 3, 1).flatten(0, 2)[::9][:16].clone()
        model.standardise([{"image": fit}], torch.device("cpu"))
    content = snapshot(name, model)
    save_part(tmp_path / "part.pt", content, arrays)
    formats = ["onnx", "openvino", "openvino_resize"]
    export_detector(tmp_path / "part.pt", formats, tmp_path / "e", arrays.tiles())
    files = [tmp_path / "part.pt", *(tmp_path / "e" / x for x in ("model.onnx", "model.xml"))]
    expected = list(predict_images(restore(content), arrays, 8))
    for file in files:
        detector = Detector.load(file)
        for row, (_, outputs) in zip(arrays.rows, expected, strict=True):
            prediction = detector.predict(folder / row["path"])
            assert prediction.score == pytest.approx(outputs["pred_score"].item(), abs=1e-3)
            np.testing.assert_allclose(
                prediction.anomaly_map, outputs["anomaly_map"][0, 0], atol=1e-2
            )
    resized = Detector.load(tmp_path / "e" / "model_resize.xml")
    prediction = resized.predict(folder / arrays.rows[0]["path"])
    assert prediction.score == pytest.approx(expected[0][1]["pred_score"].item(), abs=0.2)
    described = json.loads((tmp_path / "e" / "model.json").read_text())
    assert described["preprocessing"]["tile_size"] == 48


# --- a bank for each position


def write_aligned(folder, count=20, size=(60, 90)):
    """Parts that are dark on the left and bright on the right."""
    rng = np.random.default_rng(0)
    for i in range(count):
        values = rng.integers(0, 20, size, np.uint8)
        values[:, size[1] // 2 :] += 200
        write_image(folder / f"{i:02}.png", values)
    return folder


def fitted_by_position(folder, tmp_path, **options):
    parameters = models.parameters("patchcore")(
        backbone="resnet18", weights="random", max_patches=600, bank_size=60, **options
    )
    fit, validation = (PreparedDataset(folder, x) for x in ("fit", "validation"))
    context = FitContext(
        fit=create_dataloader(fit, 8, shuffle=True),
        validation=create_dataloader(validation, 8),
        state=tmp_path / "state",
        device=torch.device("cpu"),
        num_positions=fit.num_positions,
    )
    model = models.spec("patchcore").build(parameters)
    models.spec("patchcore").fit(model, parameters, context)
    return model


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """Aligned parts, their prepared folders with and without positions, and a model for each."""
    root = tmp_path_factory.mktemp("aligned")
    write_aligned(root / "part")
    found = {}
    for per_position in (True, False):
        options = {"tile_size": 32, "tile_overlap": 2, "per_position": per_position}
        folder = prepared(root, **options)
        folder = folder.rename(root / f"prepared {per_position}")
        found[per_position] = folder, fitted_by_position(folder, root)
    return root, found


def test_each_position_has_a_bank_and_all_together_are_as_large_as_one(aligned):
    _, found = aligned
    assert found[True][1].bank.shape[:2] == (6, 10)
    assert found[False][1].bank.shape[0] == 60
    assert list(found[True][1].inputs) == ["image", "position"]
    assert list(found[False][1].inputs) == ["image"]


def test_what_is_normal_elsewhere_is_found_only_by_position(aligned):
    """A part whose right side looks like the left one."""
    root, found = aligned
    dark = np.random.default_rng(1).integers(0, 20, (60, 90), np.uint8)
    scores = {}
    for per_position, (folder, model) in found.items():
        arrays = PreparedDataset(folder, "test")
        detector = detector_of(arrays, model=restore(snapshot("patchcore", model)))
        normal = [detector.predict(root / "part" / row["path"]).score for row in arrays.rows]
        scores[per_position] = detector.predict(dark).score / max(normal)
    assert scores[True] > 3
    assert scores[False] < scores[True] / 2


def test_files_get_the_scores_of_the_evaluation_by_position(aligned, tmp_path):
    root, found = aligned
    folder, model = found[True]
    arrays, content = PreparedDataset(folder, "test"), snapshot("patchcore", model)
    save_part(tmp_path / "part.pt", content, arrays)
    formats = ["onnx", "openvino", "openvino_int8", "openvino_resize"]
    export_detector(tmp_path / "part.pt", formats, tmp_path / "e", arrays.tiles())
    expected = list(predict_images(restore(content), arrays, 8))
    for file in ("part.pt", "e/model.onnx", "e/model.xml"):
        detector = Detector.load(tmp_path / file)
        paths = [root / "part" / row["path"] for row in arrays.rows]
        for size in (1, 4):
            judged = detector.predict_many(paths, batch_size=size)
            for (_, outputs), prediction in zip(expected, judged, strict=True):
                assert prediction.score == pytest.approx(outputs["pred_score"].item(), abs=1e-3)
                np.testing.assert_allclose(
                    prediction.anomaly_map, outputs["anomaly_map"][0, 0], atol=1e-2
                )
    for name in ("model_int8.xml", "model_resize.xml"):
        assert np.isfinite(Detector.load(tmp_path / "e" / name).predict(paths[0]).score)
    described = json.loads((tmp_path / "e" / "model.json").read_text())
    assert list(described["further_inputs"]) == ["position"]


def test_synthetic_defects_are_judged_in_their_position(aligned, tmp_path):
    _, found = aligned
    folder, model = found[True]
    arrays = PreparedDataset(folder, "test")
    metrics = evaluated(arrays, tmp_path, 3.0, model=model)
    assert metrics.metrics["synthetic"]["num_images"] == 64
    tiles = one_tile_each(arrays, range(4), scores_by_tile(model, arrays, 8), seed=1)
    for case, position in zip(tiles.cases(one_defect_each), tiles.positions, strict=True):
        assert case.position == position
        side = case.image[:, :, :8].mean()
        assert (side > 100) == (position % 3 == 2)


def test_pictures_of_another_size_have_no_positions(aligned, tmp_path):
    _, found = aligned
    detector = detector_of(PreparedDataset(found[True][0], "test"))
    with pytest.raises(DataError, match="must have 90 x 60 pixels like all images with"):
        detector.predict(np.zeros((60, 91), np.uint8))
    write_aligned(tmp_path / "part")
    write_image(tmp_path / "part" / "odd.png", np.zeros((60, 91), np.uint8))
    with pytest.raises(DataError, match=r"odd.png: must have 90 x 60 pixels like most images"):
        prepared(tmp_path, tile_size=32, per_position=True)


def test_pictures_of_one_tile_have_no_positions(tmp_path):
    write_aligned(tmp_path / "part", size=(32, 32))
    folder = prepared(tmp_path, tile_size=32, per_position=True)
    model = fitted_by_position(folder, tmp_path)
    arrays = PreparedDataset(folder, "test")
    assert arrays.num_positions == 1
    detector = detector_of(arrays, model=restore(snapshot("patchcore", model)))
    (own,), *_ = scores_by_tile(model, arrays, 8)
    path = tmp_path / "part" / arrays.rows[0]["path"]
    assert detector.predict(path).score == pytest.approx(own, abs=1e-3)


def test_positions_where_nothing_is_judged_are_no_obstacle(tmp_path):
    mask = np.ones((60, 90), np.uint8)
    mask[:, :35] = 0
    write_image(write_aligned(tmp_path / "part") / "mask.png", mask)
    folder = prepared(tmp_path, tile_size=32, tile_overlap=2, per_position=True, mask="mask.png")
    model = fitted_by_position(folder, tmp_path)
    assert model.bank.shape[0] == 6
    assert not model.bank[0].any()
    arrays = PreparedDataset(folder, "test")
    assert np.isfinite(np.concatenate(scores_by_tile(model, arrays, 8))).all()


# --- for people


def test_an_overview_keeps_the_proportions():
    wide = np.full((10, 40, 3), 200, np.uint8)
    seen = overview(wide)
    assert seen.shape == (3, SIDE, SIDE)
    assert (seen[:, 192:320] == 200).all()
    assert not seen[:, :192].any()
    assert not seen[:, 320:].any()


@given(st.integers(1, 1500), st.integers(1, 1500), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_the_highest_value_is_in_the_overview_where_it_was(height, width, seed):
    rng = np.random.default_rng(seed)
    values = np.zeros((height, width), np.float32)
    row, column = int(rng.integers(height)), int(rng.integers(width))
    values[row, column] = 1
    seen = overview_of_map(values)
    assert seen.shape == (SIDE, SIDE)
    assert seen.max() == 1
    rows, columns = np.nonzero(seen)
    scale = SIDE / max(height, width)
    top, left = (SIDE - height * scale) / 2, (SIDE - width * scale) / 2
    assert abs(rows.mean() - (top + (row + 0.5) * scale)) <= scale + 2
    assert abs(columns.mean() - (left + (column + 0.5) * scale)) <= scale + 2


def test_options_of_a_frame_survive_a_file():
    frame = Frame(tile_size=48, tile_overlap=8, mask="each")
    copy = Frame.from_options(json.loads(json.dumps(frame.options)))
    assert copy.options == frame.options
    assert (copy.tile_size, copy.tile_overlap, copy.mask) == (48, 8, "each")
