"""What a model sees of an image: the part that is cut out and judged, whole or in tiles."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.detectors import seen_by_the_model
from builders.images import prepare, random_pixels, write_category, write_image
from builders.tiles import prepare_tiles, write_defects, write_textures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomaly_detection.data import PreparedDataset
from anomaly_detection.data.decode import resize_image
from anomaly_detection.data.frame import Frame
from anomaly_detection.data.overview import SIDE, overview, overview_of_map
from anomaly_detection.data.sample import picture_named
from anomaly_detection.data.tiles import Blend, Grid, chunks
from anomaly_detection.errors import DataError

# Where the tiles lie.


STARTS = {(10, 0): (0,), (20, 0): (0, 10), (20, 1): (0, 5, 10), (18, 2): (0, 8), (19, 2): (0, 5, 9)}
STARTS[21, 0] = (0, 6, 11)  # 5.5 rounded up


def test_tiles_are_evenly_spaced_end_at_the_border_and_are_numbered_along_the_rows():
    for (length, overlap), starts in STARTS.items():
        assert Grid.covering(length, 10, 10, overlap).tops == starts
        assert Grid.covering(10, length, 10, overlap).lefts == starts
    grid = Grid.covering(20, 30, 10)
    assert (len(grid), grid.boxes()[4]) == (6, (slice(10, 20), slice(10, 20)))
    for height, overlap in ((9, 0), (20, 10), (20, -1)):
        with pytest.raises(ValueError, match="must be"):
            Grid.covering(height, 20, 10, overlap)


@st.composite
def grids(draw):
    """A grid, and the overlap that was asked for."""
    side = draw(st.integers(1, 40))
    height, width = (draw(st.integers(side, 6 * side + 20)) for _ in range(2))
    overlap = draw(st.integers(0, side // 2))
    return Grid.covering(height, width, side, overlap), overlap


@given(grids(), st.integers(1, 60))
@settings(deadline=None)
def test_as_few_tiles_as_share_what_they_must_cover_every_pixel_at_every_scale(made, scale):
    grid, overlap = made
    for each in (grid, grid.scaled(scale)):
        covered = np.zeros((each.height, each.width), int)
        for box in each.boxes():
            part = covered[box]
            assert part.shape == (each.side, each.side)
            part += 1
        assert covered.min() >= 1
        if each.side >= grid.side:  # in a smaller one, tiles may fall together
            assert covered[0, 0] == covered[-1, -1] == 1
    for starts, length in ((grid.tops, grid.height), (grid.lefts, grid.width)):
        steps, fewer = np.diff(starts), len(starts) - 1
        assert (grid.side - steps >= overlap).all()
        assert not len(steps) or np.ptp(steps) <= 1
        assert fewer * grid.side - (fewer - 1) * overlap < length


# What was found on them, put together.


def blended(grid: Grid, tiles, numbers) -> np.ndarray:
    blend = Blend(grid)
    for number in numbers:
        blend.add(number, tiles[number])
    return blend.whole


@given(grids(), st.integers(0, 2**32 - 1), st.floats(-1e3, 1e3, width=32))
@settings(deadline=None)
def test_what_is_cut_is_what_is_put_together(made, seed, constant):
    grid, rng = made[0], np.random.default_rng(seed)
    whole, numbers = rng.normal(size=(grid.height, grid.width)), range(len(grid))
    tiles = [whole[box] for box in grid.boxes()]
    assert np.array_equal(grid.joined(tiles, numbers), whole)
    result = blended(grid, tiles, rng.permutation(len(grid)))
    np.testing.assert_allclose(result, whole, rtol=1e-5, atol=1e-6)
    flat = np.full((len(grid), grid.side, grid.side), constant, np.float32)
    result = blended(grid, flat, numbers)
    np.testing.assert_allclose(result, np.float32(constant), rtol=1e-6, atol=1e-30)


def test_there_is_no_seam_where_tiles_disagree_and_one_tile_stays_to_the_last_bit():
    """The map passes from one tile's value to the other's in equal steps, by hand."""
    whole = blended(Grid.covering(4, 6, 4, 2), [np.zeros((4, 4)), np.ones((4, 4))], range(2))
    assert whole[0].tolist() == pytest.approx([0, 0, 0.25, 0.75, 1, 1])
    values = np.random.default_rng(0).normal(size=(50, 50)).astype(np.float32)
    assert np.array_equal(blended(Grid.covering(50, 50, 50), [values], [0]), values)


def test_chunks_have_all_tiles_in_order():
    for stack in (1, 3, 7, 8):
        parts = list(chunks(iter(range(7)), stack))
        assert max(map(len, parts)) <= stack
        assert [item for part in parts for item in part] == list(range(7))


# The part that is seen.

PIXELS = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6)


def only_tile(frame, size, name="image"):
    ((number, tile),) = frame.tiles(PIXELS, size, name)
    assert number == 0
    return tile


def test_images_are_cut_to_the_rectangle_and_then_to_the_square_at_its_centre():
    for crop, resize, expected in (
        (None, "square", PIXELS),
        ([1, 0, 6, 3], "square", PIXELS[:3, 1:]),
        (None, "crop", PIXELS[:, 1:5]),
        ([0, 1, 6, 4], "crop", PIXELS[1:4, 1:4]),
        ([5, 0, 6, 4], "crop", PIXELS[1:2, 5:]),
    ):
        for pixels in (PIXELS, np.stack([PIXELS] * 3, axis=2)):
            seen = Frame(crop, resize).cut(pixels)
            assert np.array_equal(seen if seen.ndim == 2 else seen[..., 1], expected)


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


def copy_of(frame: Frame) -> Frame:
    return Frame.from_options(json.loads(json.dumps(frame.options)))


def test_a_frame_survives_a_file():
    mask = np.arange(24).reshape(4, 6) % 3 == 0
    for resize in ("square", "fit", "crop"):
        frame = Frame([0, 1, 6, 4], resize, mask)
        assert np.array_equal(only_tile(copy_of(frame), 8), only_tile(frame, 8))
        assert copy_of(frame).num_channels == 4
    frame = Frame(tile_size=48, tile_overlap=8, mask="each")
    copy = copy_of(frame)
    assert copy.options == frame.options
    assert (copy.tile_size, copy.tile_overlap, copy.mask) == (48, 8, "each")


def test_images_of_another_size_than_the_crop_or_the_mask_needs_are_named():
    with pytest.raises(DataError, match=r"part.png: must be at least 7 x 4 pixels for data.crop"):
        Frame([0, 0, 7, 4]).cut(PIXELS, "part.png")
    frame = Frame(mask=np.ones((4, 5), bool))
    with pytest.raises(DataError, match=r"a.png: must be as large as data.mask, 5 x 4 pixels, got"):
        only_tile(frame, 8, "a.png")


def prepare_wide(folder: Path, **frame) -> PreparedDataset:
    """Twenty images of 50 x 30 pixels, prepared at 16."""
    for i in range(20):
        write_image(folder / "part" / f"{i}.png", random_pixels(30, 50, 3, seed=i))
    fractions = {"validation_fraction": 0.2, "calibration_fraction": 0.2}
    return PreparedDataset(prepare(folder, "part", image_size=16, **fractions, **frame), "test")


@pytest.mark.parametrize("mask", [None, "judged.png"])
@pytest.mark.parametrize("resize", ["square", "fit", "crop"])
def test_a_detector_sees_of_a_file_what_it_was_fitted_to(tmp_path, resize, mask):
    if mask:
        values = np.zeros((30, 50), np.uint8)
        values[5:20, 10:30] = 1
        write_image(tmp_path / "part" / mask, values)
    arrays = prepare_wide(tmp_path, crop=[3, 2, 45, 28], resize=resize, mask=mask)
    assert arrays.images.shape[:2] == (3, 4 if mask or resize == "fit" else 3)
    for row, pixels in zip(arrays.rows, arrays.pictures(), strict=True):
        seen = seen_by_the_model(arrays.preprocessing(16), tmp_path / "part" / row["path"])
        assert np.array_equal(seen, pixels)


def test_images_that_are_too_small_are_all_listed(tmp_path):
    with pytest.raises(DataError) as error:
        prepare_wide(tmp_path, crop=[0, 0, 51, 30])
    assert str(error.value).count("must be at least 51 x 30 pixels for data.crop") == 20
    with pytest.raises(DataError) as error:
        prepare_wide(tmp_path, tile_size=48)
    assert str(error.value).count("must be at least 48 x 48 pixels for data.tile_size, got") == 20


def test_a_mask_that_leaves_nothing_is_refused(tmp_path):
    write_image(tmp_path / "part" / "none.png", np.zeros((30, 50), np.uint8))
    with pytest.raises(DataError, match=r"none.png: must be other than 0 somewhere"):
        prepare_wide(tmp_path, mask="none.png")


def test_a_defect_that_is_cut_away_is_named(tmp_path):
    folder = write_category(tmp_path / "part", size=32, num_test=1, masks=False)
    mask = np.zeros((32, 32), np.uint8)
    mask[:4, :4] = 255
    write_image(folder / "ground_truth" / "dark" / "000_mask.png", mask)
    with pytest.raises(DataError, match=r"test/dark/000.png: its defect must be in the part"):
        prepare(tmp_path, "part", image_size=16, crop=[4, 0, 32, 32])


# A mask for each image.


def test_a_mask_is_found_by_its_name(tmp_path):
    masks = tmp_path / "masks"
    for name in ("line/good/1.png", "good/1.tif", "1.PNG", "../1.png"):
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        (masks / name).touch()
    for path, found in {
        "line/good/1.jpg": "line/good/1.png",
        "other/good/1.jpg": "good/1.tif",
        "1.jpg": "1.PNG",
        "../line/../1.jpg": "1.PNG",
        "/line/good/1.jpg": "line/good/1.png",
    }.items():
        assert picture_named(Path(path), masks) == masks / found
    with pytest.raises(DataError, match=r"2.jpg: must have a mask, such as .*masks/2.png"):
        picture_named(Path("../2.jpg"), masks)


def test_an_image_without_its_mask_is_named(tmp_path):
    for i in range(19):
        write_image(tmp_path / "part/judged" / f"{i}.png", np.ones((30, 50), np.uint8))
    with pytest.raises(DataError, match=r"19.png: must have a mask, such as .*judged/19.png"):
        prepare_wide(tmp_path, mask="judged")


def test_two_images_do_not_share_a_mask(tmp_path):
    folder = write_defects(tmp_path / "part")
    for path in folder.glob("t*/*/*.png"):
        write_image(folder / "judged" / path.parent.name / path.name, np.ones((90, 130), np.uint8))
    with pytest.raises(DataError) as error:
        prepare_tiles(tmp_path, mask="judged")
    assert str(error.value).count("must have a mask of its own, but ") == 3


# Prepared in tiles.


@pytest.mark.parametrize("colour", [True, False])
def test_tiles_are_cut_at_full_size_and_then_resized(tmp_path, colour):
    write_textures(tmp_path / "part", colour=colour)
    arrays = PreparedDataset(prepare_tiles(tmp_path), "fit")
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


def test_images_may_have_different_sizes_and_each_tile_is_in_one_split(tmp_path):
    write_textures(tmp_path / "part")
    for path in write_textures(tmp_path / "wide", 3, (50, 200)).iterdir():
        path.rename(tmp_path / "part" / f"wide {path.name}")
    folder = prepare_tiles(tmp_path)
    found, positions = set(), {"train": [], "test": []}
    for split in ("fit", "validation", "calibration", "test"):
        arrays = PreparedDataset(folder, split)
        positions["test" if split == "test" else "train"] += arrays.positions.tolist()
        for image in range(len(arrays.rows)):
            tiles = arrays.tiles_of(image)
            found.add((tiles.stop - tiles.start, len(arrays.grid(image))))
    assert found == {(12, 12), (10, 10)}
    assert all(sorted(each) == list(range(len(each))) for each in positions.values())
    assert sum(map(len, positions.values())) == 20 * 12 + 3 * 10


@pytest.mark.parametrize("size", [48, 24])
def test_masks_are_those_of_whole_images_at_the_scale_of_the_tiles(tmp_path, size):
    write_defects(tmp_path / "part")
    arrays = PreparedDataset(prepare_tiles(tmp_path, image_size=size), "test")
    scale = 48 / size
    for image, row in enumerate(arrays.rows):
        mask, truth = arrays.mask(image), arrays.whole(image)["mask"]
        if row["label"] == "0":
            assert mask is None
            assert not truth.any()
            continue
        assert mask.shape == (90 / scale, 130 / scale)
        rows, columns = (scale * found for found in np.nonzero(mask))
        assert [rows.min(), rows.max() + scale] == pytest.approx([42, 50], abs=scale)
        assert [columns.min(), columns.max() + scale] == pytest.approx([40, 46], abs=scale)
        assert np.array_equal(truth[0, 0], mask)


def test_tiles_where_nothing_is_judged_are_left_out(tmp_path):
    write_textures(tmp_path / "part")
    mask = np.zeros((90, 130), np.uint8)
    mask[:10, :20] = 1  # in the first tile alone
    write_image(tmp_path / "part" / "mask.png", mask)
    arrays = PreparedDataset(prepare_tiles(tmp_path, mask="mask.png"), "test")
    assert len(arrays) == len(arrays.rows) == 4
    assert set(arrays.numbers) == {0}
    assert arrays.images.shape[1] == 4
    region = arrays.region(0)
    assert region.shape == (60, 87)
    assert region[:6, :13].all()
    assert not region[8:].any()
    assert (arrays.whole(0)["mask"][0, 0].numpy() == 255).mean() > 0.9


# Overviews, for people.


def test_an_overview_keeps_the_proportions():
    seen = overview(np.full((10, 40, 3), 200, np.uint8))
    assert seen.shape == (3, SIDE, SIDE)
    assert (seen[:, 192:320] == 200).all()
    assert not seen[:, :192].any()
    assert not seen[:, 320:].any()


@given(st.integers(1, 1500), st.integers(1, 1500), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_the_highest_value_is_in_the_overview_where_it_was(height, width, seed):
    rng = np.random.default_rng(seed)
    values = np.zeros((height, width), np.float32)
    place = rng.integers([height, width])
    values[tuple(place)] = 1
    seen = overview_of_map(values)
    assert seen.shape == (SIDE, SIDE)
    assert seen.max() == 1
    scale = SIDE / max(height, width)
    borders = (SIDE - scale * np.array([height, width])) / 2
    found = np.argwhere(seen).mean(axis=0)
    np.testing.assert_allclose(found, borders + (place + 0.5) * scale, rtol=0, atol=scale + 2)
