"""The part of a picture that a detector sees."""

import json

import numpy as np
import pytest
from builders.images import write_category, write_image

from anomaly_detection import Detector
from anomaly_detection.data import prepare_category
from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.data.frame import Frame
from anomaly_detection.errors import DataError
from anomaly_detection.inference.runtimes import Outputs

PIXELS = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6)


def only_tile(frame, size, name="image"):
    ((number, tile),) = frame.tiles(PIXELS, size, name)
    assert number == 0
    return tile


@pytest.mark.parametrize(
    ("crop", "resize", "expected"),
    [
        (None, "square", PIXELS),
        ([1, 0, 6, 3], "square", PIXELS[:3, 1:]),
        (None, "crop", PIXELS[:, 1:5]),
        ([0, 1, 6, 4], "crop", PIXELS[1:4, 1:4]),
        ([5, 0, 6, 4], "crop", PIXELS[1:2, 5:]),
    ],
)
def test_pictures_are_cut_to_the_rectangle_and_then_to_the_square_at_its_centre(
    crop, resize, expected
):
    frame = Frame(crop, resize)
    assert np.array_equal(frame.cut(PIXELS), expected)
    colour = np.stack([PIXELS] * 3, axis=2)
    assert np.array_equal(frame.cut(colour)[..., 1], expected)


def test_a_picture_that_does_not_reach_as_far_is_named():
    with pytest.raises(DataError, match=r"part.png: must be at least 7 x 4 pixels for data.crop"):
        Frame([0, 0, 7, 4]).cut(PIXELS, "part.png")


def prepared(tmp_path, **frame):
    rng = np.random.default_rng(0)
    for i in range(20):
        values = rng.integers(0, 256, (30, 50, 3), np.uint8)
        write_image(tmp_path / "part" / f"{i}.png", values)
    options = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "seed": 0}
    size = {"image_size": 16, "bit_depth": 16}
    prepare_category(tmp_path, "part", tmp_path / "out", **size, **options, **frame)
    return PreparedArrays(tmp_path / "out", "test")


@pytest.mark.parametrize("mask", [None, "judged.png"])
@pytest.mark.parametrize("resize", ["square", "fit", "crop"])
def test_a_detector_sees_of_a_file_what_it_was_fitted_to(tmp_path, resize, mask):
    values = np.zeros((30, 50), np.uint8)
    values[5:20, 10:30] = 1
    if mask:
        write_image(tmp_path / "part" / mask, values)
    arrays = prepared(tmp_path, crop=[3, 2, 45, 28], resize=resize, mask=mask)
    assert arrays.images.shape[:2] == (3, 4 if mask or resize == "fit" else 3)
    content = {
        "threshold": 1.0,
        "calibration_scores": [0.0],
        "preprocessing": arrays.preprocessing(16),
        "parameters": {},
        "provenance": {},
    }
    seen = []

    def runtime(images):
        seen.append(images)
        return Outputs(np.zeros(1, np.float32), np.zeros(1, int), np.zeros(1, bool))

    detector = Detector(content, runtime)
    for row, picture in zip(arrays.rows, arrays.pictures(), strict=True):
        assert detector.predict(tmp_path / "part" / row["path"]).verdict == "normal"
        assert np.array_equal(seen[-1][0], picture)


def test_pictures_that_are_too_small_are_all_listed(tmp_path):
    with pytest.raises(DataError) as error:
        prepared(tmp_path, crop=[0, 0, 51, 30])
    assert str(error.value).count("must be at least 51 x 30 pixels for data.crop") == 20


def test_a_defect_that_is_cut_away_is_named(tmp_path):
    folder = write_category(tmp_path / "part", size=32, num_test=1, masks=False)
    mask = np.zeros((32, 32), np.uint8)
    mask[:4, :4] = 255
    write_image(folder / "ground_truth" / "dark" / "000_mask.png", mask)
    options = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "seed": 0}
    size = {"image_size": 16, "bit_depth": 16}
    with pytest.raises(DataError, match=r"test/dark/000.png: its defect must be in the part"):
        prepare_category(tmp_path, "part", tmp_path / "out", **size, **options, crop=[4, 0, 32, 32])


def test_a_part_that_is_not_square_is_continued_and_the_rest_is_not_judged():
    frame = Frame(resize="fit")
    assert frame.cut(PIXELS)[0].tolist() == PIXELS[0].tolist()
    assert frame.cut(PIXELS)[-1].tolist() == PIXELS[-1].tolist()
    assert frame.cut(PIXELS).shape == (6, 6)
    assert frame.region(PIXELS)[:, 0].tolist() == [0, 255, 255, 255, 255, 0]
    seen = only_tile(frame, 6)
    assert np.array_equal(seen, only_tile(frame, None))
    assert np.array_equal(seen[3], frame.region(PIXELS))


def test_a_mask_goes_through_the_same_cuts():
    mask = np.zeros((4, 6), bool)
    mask[1, 2] = True
    region = only_tile(Frame([1, 0, 5, 4], mask=mask), 4)[3]
    assert np.argwhere(region).tolist() == [[1, 1]]


@pytest.mark.parametrize("resize", ["square", "fit", "crop"])
def test_a_frame_survives_a_file(resize):
    mask = np.arange(24).reshape(4, 6) % 3 == 0
    frame = Frame([0, 1, 6, 4], resize, mask)
    copy = Frame.from_options(json.loads(json.dumps(frame.options)))
    assert np.array_equal(only_tile(copy, 8), only_tile(frame, 8))
    assert copy.num_channels == 4


def test_pictures_of_another_size_than_the_mask_are_named():
    frame = Frame(mask=np.ones((4, 5), bool))
    with pytest.raises(DataError, match=r"a.png: must be as large as data.mask, 5 x 4 pixels, got"):
        only_tile(frame, 8, "a.png")


def test_a_mask_that_leaves_nothing_is_refused(tmp_path):
    write_image(tmp_path / "part" / "none.png", np.zeros((30, 50), np.uint8))
    with pytest.raises(DataError, match=r"none.png: must be other than 0 somewhere"):
        prepared(tmp_path, mask="none.png")
