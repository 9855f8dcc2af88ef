"""The part of a picture that a detector sees."""

import numpy as np
import pytest
from conftest import write_category, write_image

from anomaly_detection import Detector
from anomaly_detection.data import prepare_category
from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.data.frame import Frame
from anomaly_detection.errors import DataError

PIXELS = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6)


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


def prepared(tmp_path, frame):
    rng = np.random.default_rng(0)
    for i in range(20):
        values = rng.integers(0, 256, (30, 50, 3), np.uint8)
        write_image(tmp_path / "part" / f"{i}.png", values)
    options = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "seed": 0}
    size = {"image_size": 16, "bit_depth": 16}
    prepare_category(tmp_path, "part", tmp_path / "out", **size, **options, frame=frame)
    return PreparedArrays(tmp_path / "out", "test")


@pytest.mark.parametrize("resize", ["square", "crop"])
def test_a_detector_sees_of_a_file_what_it_was_fitted_to(tmp_path, resize):
    frame = Frame([3, 2, 45, 28], resize)
    arrays = prepared(tmp_path, frame)
    content = {
        "threshold": 1.0,
        "calibration_scores": [0.0],
        "preprocessing": {
            "image_size": 16,
            "bit_depth": 16,
            "crop": frame.crop,
            "resize": frame.resize,
        },
        "parameters": {},
        "provenance": {},
    }
    seen = []
    detector = Detector(content, lambda images: seen.append(images))
    for row, picture in zip(arrays.rows, arrays.pictures(), strict=True):
        with pytest.raises(AttributeError):  # there are no outputs
            detector.predict(tmp_path / "part" / row["path"])
        assert np.array_equal(seen[-1][0], picture)


def test_pictures_that_are_too_small_are_all_listed(tmp_path):
    with pytest.raises(DataError) as error:
        prepared(tmp_path, Frame([0, 0, 51, 30]))
    assert str(error.value).count("must be at least 51 x 30 pixels for data.crop") == 20


def test_a_defect_that_is_cut_away_is_named(tmp_path):
    folder = write_category(tmp_path / "part", size=32, num_test=1, masks=False)
    mask = np.zeros((32, 32), np.uint8)
    mask[:4, :4] = 255
    write_image(folder / "ground_truth" / "dark" / "000_mask.png", mask)
    options = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "seed": 0}
    size = {"image_size": 16, "bit_depth": 16}
    frame = Frame([4, 0, 32, 32])
    with pytest.raises(DataError, match=r"test/dark/000.png: its defect must be in the part"):
        prepare_category(tmp_path, "part", tmp_path / "out", **size, **options, frame=frame)
