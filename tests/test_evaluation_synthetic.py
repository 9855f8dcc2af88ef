"""Synthetic defects: where and how large they are, what they look like, and in what batches."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from anomaly_detection.evaluation.synthetic import (
    FAMILIES,
    KINDS,
    SIZES,
    Case,
    add_defect,
    every_defect,
    one_defect_each,
    synthetic_batches,
)

EVERY_KIND = pytest.mark.parametrize("kind", FAMILIES)


def pictures(count=1, height=64, width=64, seed=0, grey=False):
    """Textures with a dark and a bright half, uint8 (N, 3, H, W)."""
    values = np.random.default_rng(seed).normal(110, 12, (count, 3, height, width))
    values[..., width // 2 :] += 60
    if grey:
        values = values[:, :1].repeat(3, axis=1)
    return values.clip(0, 255).astype(np.uint8)


def draw(image, kind, size, seed=0):
    return add_defect(image, kind, size, np.random.default_rng(seed))


def diameter(mask):
    """The largest distance between two pixels' centres, plus the pixel itself."""
    points = np.argwhere(mask)
    return np.sqrt(((points[:, None] - points) ** 2).sum(axis=-1).max()) + 1


@EVERY_KIND
@pytest.mark.parametrize("shape", [(32, 32), (48, 96), (96, 40)])
def test_a_defect_changes_its_own_place_alone(kind, shape):
    for seed, size in enumerate(SIZES * 3):
        image = pictures(1, *shape, seed)[0]
        before = image.copy()
        changed, mask = draw(image, kind, size, seed)
        np.testing.assert_array_equal(image, before)
        assert (changed.dtype, changed.shape) == (np.uint8, image.shape)
        assert (mask.dtype, mask.shape) == (np.uint8, shape)
        assert set(np.unique(mask)) == {0, 1}
        soft_edge = 2 + int(0.1 * size * min(shape))
        near = binary_dilation(mask, np.ones((3, 3)), iterations=soft_edge)
        np.testing.assert_array_equal(changed[:, ~near], image[:, ~near])


@pytest.mark.parametrize("kind", ["blob", "scratch", "texture"])
def test_a_defect_is_seen_where_its_mask_is(kind):
    image = pictures()[0]
    for size, seed in product((SIZES[0], 0.05, 0.3), range(10)):
        changed, mask = draw(image, kind, size, seed)
        assert (changed != image).any(axis=0)[mask == 1].mean() > 0.9


@EVERY_KIND
@pytest.mark.parametrize("size", [x for x in SIZES if x >= 0.08])
def test_the_mask_is_as_long_as_the_size_says(kind, size):
    for seed, width in enumerate((128, 200) * 2):
        mask = draw(pictures(1, 128, width)[0], kind, size, seed)[1]
        assert diameter(mask) == pytest.approx(size * 128, rel=0.1, abs=3)


@pytest.mark.parametrize("kind", ["blob", "texture", "missing"])
def test_spots_are_ellipses_and_scratches_thin(kind):
    image, extent = pictures(1, 128, 128)[0], 0.3 * 128
    circle = np.pi * extent**2 / 4
    for seed in range(10):
        assert 0.55 * circle < draw(image, kind, 0.3, seed)[1].sum() < 1.05 * circle
        assert draw(image, "scratch", 0.3, seed)[1].sum() < 0.2 * circle


def test_the_smallest_defect_of_a_small_image_is_a_pixel_or_two():
    for kind, seed in product(FAMILIES, range(20)):
        mask = draw(pictures(1, 32, 32)[0], kind, SIZES[0], seed)[1]
        assert 1 <= mask.sum() <= 4, kind


def test_a_blob_is_a_quarter_to_a_half_of_the_range_darker_or_brighter():
    for (value, sign), seed in product(((40, 1), (200, -1)), range(10)):
        image = np.full((3, 64, 64), value, np.uint8)
        changed, _ = draw(image, "blob", 0.2, seed)
        difference = sign * (changed.astype(int) - image)
        assert difference.min() == 0
        assert 64 <= difference.max() <= 128


def test_a_missing_part_takes_the_details_away():
    image = pictures(1, 64, 64)[0]
    image[..., 32:] = image[..., :32]  # the same texture all over
    changed, mask = draw(image, "missing", 0.3)
    inside = np.stack([mask == 1] * 3)
    assert changed[inside].std() < 0.5 * image[inside].std()
    assert changed[inside].mean() == pytest.approx(image[inside].mean(), abs=3)


def test_a_missing_part_is_looked_for_where_there_is_one():
    image = np.full((3, 64, 64), 100, np.uint8)
    image[:, 28:36, 28:36] = 220
    found = [(draw(image, "missing", 0.1, seed)[0] != image).any() for seed in range(40)]
    assert np.mean(found) > 0.6  # at one place alone it is a sixth


def test_grey_images_stay_grey_and_a_texture_on_a_coloured_one_is_coloured():
    for kind, seed in product(FAMILIES, range(5)):
        changed, _ = draw(pictures(grey=True)[0], kind, 0.3, seed)
        assert (changed == changed[0]).all(), kind
    changed, mask = draw(pictures()[0], "texture", 0.3)
    assert (changed[:, mask == 1] != changed[:1, mask == 1]).any()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_defect_is_where_the_image_is_judged(kind):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 64, 64), np.uint8)
    image[3] = 0
    image[3, 8:40, 20:60] = 255
    for _ in range(10):
        changed, mask = add_defect(image, kind, 0.1, rng)
        outside = image[3] == 0
        assert np.array_equal(changed[:, outside], image[:, outside])
        assert np.array_equal(changed[3], image[3])
        assert (mask[outside] == 255).all()
        assert 0 < (mask == 1).sum() < 0.02 * 64 * 64
        assert (mask[~outside] <= 1).all()


def test_an_unknown_kind_is_an_error_that_lists_the_kinds():
    with pytest.raises(
        ValueError, match=r"one of blob, missing, scratch, texture, contrast, .*, got 'dent'"
    ):
        draw(pictures()[0], "dent", 0.1)


def test_every_defect_is_each_image_with_each_kind_and_size():
    images = pictures(3)
    cases = every_defect(images)
    assert len(cases) == len(KINDS) * len(SIZES) * 3
    assert set(Counter((case.kind, case.size) for case in cases).values()) == {3}
    np.testing.assert_array_equal(
        [case.image for case in cases], np.tile(images, (len(cases) // 3, 1, 1, 1))
    )


@pytest.mark.parametrize("count", [0, 1, 5, len(SIZES), 40])
def test_one_defect_each_is_each_image_once_with_every_kind_and_size_in_turn(count):
    images = pictures(count, 8, 8)
    cases = one_defect_each(images)
    np.testing.assert_array_equal([case.image for case in cases] or images, images)
    kinds = Counter(case.kind for case in cases)
    assert len(kinds) == min(count, len(KINDS))
    assert not count or max(kinds.values()) - min(kinds.values()) <= 1
    assert len({case.size for case in cases}) == min(count, len(SIZES))
    if count >= len(KINDS) * len(SIZES):
        assert {(case.kind, case.size) for case in cases} == set(product(KINDS, SIZES))


def joined(batches):
    """All batches as one."""
    parts = list(batches)
    whole = {key: torch.cat([part[key] for part in parts]) for key in ("image", "label", "mask")}
    return whole | {
        key: [value for part in parts for value in part[key]] for key in ("defect_type", "size")
    }


def test_batches_are_the_cases_in_order():
    cases = every_defect(pictures(2, 32, 48))
    batches = list(synthetic_batches(cases, 0, batch_size=24))
    assert [len(batch["image"]) for batch in batches] == [24, 24, 16]
    whole = joined(batches)
    assert whole["image"].shape == (64, 3, 32, 48)
    assert whole["mask"].shape == (64, 1, 32, 48)
    assert (whole["image"].dtype, whole["mask"].dtype) == (torch.uint8, torch.uint8)
    assert whole["label"].tolist() == [1] * 64
    assert whole["defect_type"] == [case.kind for case in cases]
    assert whole["size"] == [case.size for case in cases]
    assert whole["mask"].flatten(1).any(dim=1).all()


def test_the_seed_alone_draws_the_defects():
    cases = one_defect_each(pictures(40, 32, 32))
    first = joined(synthetic_batches(cases, 3, batch_size=32))
    for batch_size in (1, 7, 32, 100):
        again = joined(synthetic_batches(cases, 3, batch_size))
        for key in ("image", "mask"):
            assert again[key].numpy().tobytes() == first[key].numpy().tobytes()
    other = joined(synthetic_batches(cases, 4))
    assert (other["mask"] != first["mask"]).any()
    assert (other["image"] != first["image"]).any()


def test_places_and_shapes_vary():
    for kind in FAMILIES:
        cases = [Case(pictures()[0], kind, 0.2)] * 8
        masks = joined(synthetic_batches(cases, 0))["mask"]
        assert len({mask.numpy().tobytes() for mask in masks}) == 8, kind


def test_a_defect_is_seen_in_a_bright_place_of_a_dark_image_and_a_dark_one_of_a_bright():
    dark = np.zeros((3, 64, 64), np.uint8)
    dark[:, 16:48, 16:48] = 255
    for kind, image, seed in product(("blob", "scratch"), (dark, 255 - dark), range(20)):
        changed, mask = draw(image, kind, 0.1, seed)
        assert (changed != image).any(axis=0)[mask == 1].mean() > 0.3, kind


@EVERY_KIND
def test_opacity_scales_the_change_and_leaves_the_mask(kind):
    image = pictures()[0]
    whole, mask = add_defect(image, kind, 0.3, np.random.default_rng(0))
    half, same_mask = add_defect(image, kind, 0.3, np.random.default_rng(0), opacity=0.5)
    np.testing.assert_array_equal(same_mask, mask)
    inside = (whole > 0) & (whole < 255)  # where nothing is clipped
    change = whole.astype(float) - image
    np.testing.assert_allclose((half.astype(float) - image)[inside], 0.5 * change[inside], atol=1)
