"""Metrics of anomaly maps against masks, from histograms."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from skimage.measure import label as label_regions
from sklearn.metrics import average_precision_score, roc_auc_score

from anomaly_detection.metrics import PixelHistogram

BIN = 1e-4  # what the bins, 1 part in 4096 wide, may change


def histogram_of(maps, masks):
    histogram = PixelHistogram()
    histogram.update(np.asarray(maps), np.asarray(masks))
    return histogram


def metrics(maps, masks, limit=0.3):
    return histogram_of(maps, masks).compute(limit)


def reference(maps, masks, limit=0.3):
    """All metrics from the concatenated pixels, at every threshold that occurs."""
    labels, values = masks[masks < 2], maps[masks < 2].astype(np.float64)
    cuts = np.r_[np.inf, np.unique(values)[::-1]]

    def share_at_least_cut(of):
        return 1 - np.searchsorted(np.sort(of), cuts) / len(of)

    fall_out = share_at_least_cut(values[labels == 0])
    recall = share_at_least_cut(values[labels == 1])
    overlaps = []
    for anomaly_map, mask in zip(maps, masks, strict=True):
        regions = label_regions(mask == 1, connectivity=2)
        for region in range(1, regions.max() + 1):
            overlaps.append(share_at_least_cut(anomaly_map[regions == region]))
    overlap = np.mean(overlaps, axis=0)
    true, false = recall * (labels == 1).sum(), fall_out * (labels == 0).sum()
    inside = fall_out <= limit
    x = np.r_[fall_out[inside], limit]
    y = np.r_[overlap[inside], np.interp(limit, fall_out, overlap)]
    return {
        "pixel_auroc": roc_auc_score(labels, values),
        "pixel_average_precision": average_precision_score(labels, values),
        "pixel_f1_max": np.max(2 * true / (true + false + (labels == 1).sum())),
        "aupro": np.trapezoid(y, x) / limit,
    }


def assert_equals_brute_force(maps, masks):
    assert metrics(maps, masks) == pytest.approx(reference(maps, masks), abs=BIN)


def spots(rng, count, size):
    """Masks with regions of many sizes, some single pixels, some at the border or diagonal."""
    masks = (rng.random((count, size, size)) < 0.01).astype(np.uint8)
    masks[:, :3, 2:9] = masks[:, -5:, -5:] = 1
    for step in range(4):
        masks[:, 12 + step, 10 - step] = 1
    masks[0] = 0
    return masks


def random_maps(rng, masks):
    return (rng.random(masks.shape) ** 2 + 0.3 * (masks == 1) * rng.random()).astype(np.float32)


def tied_maps(rng, masks):
    """In 16ths, which are a bin each: nothing is lost, even with a multiple of one added."""
    return np.round(random_maps(rng, masks) * 16) / 16


@pytest.mark.parametrize(
    ("anomaly_map", "mask", "limit", "expected"),
    [
        # Cuts at 4, 3, 2, 1: FPR 0, 0.5, 0.5, 1 and overlap 0.5, 0.5, 1, 1. Up to 0.3 it is 0.5.
        ([[4, 2], [1, 3]], [[1, 1], [0, 0]], 0.3, 0.5),
        # Up to 1: 0.5 on the first half, 1 on the second.
        ([[4, 2], [1, 3]], [[1, 1], [0, 0]], 1.0, 0.75),
        # All tied: the line from (0, 0) to (1, 1), 0.3 ** 2 / 2 / 0.3.
        ([[1, 1], [1, 1]], [[1, 0], [0, 0]], 0.3, 0.15),
    ],
)
def test_aupro_by_hand(anomaly_map, mask, limit, expected):
    assert metrics([anomaly_map], [mask], limit)["aupro"] == pytest.approx(expected)


def test_a_small_region_weighs_as_much_as_a_large_one_in_aupro_but_not_in_auroc():
    mask = np.array([[1, 1, 1, 1, 0, 1]])
    anomaly_map = np.array([[9, 9, 9, 9, 5, 1]])  # the single pixel is below the normal one
    result = metrics([anomaly_map], [mask], 1.0)
    assert result["pixel_auroc"] == pytest.approx(4 / 5)
    assert result["aupro"] == pytest.approx(1 / 2)


def test_diagonal_neighbours_are_one_region_and_those_of_different_images_are_not_joined():
    mask = np.zeros((1, 4, 4), int)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 2, 2] = mask[0, 0, 3] = 1
    assert histogram_of(np.ones((1, 4, 4)), mask).num_regions == 2
    assert histogram_of(np.ones((3, 2, 2)), np.ones((3, 2, 2))).num_regions == 3


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("shift", [0, -0.5, -1, -3, 2])
def test_metrics_of_tied_maps_equal_brute_force_whatever_is_added_to_them(shift, limit):
    rng = np.random.default_rng(0)
    masks = spots(rng, 4, 32)
    maps = tied_maps(rng, masks)
    result = metrics(maps + shift, masks, limit)
    assert result == pytest.approx(reference(maps, masks, limit), abs=1e-9)
    assert result == pytest.approx(metrics(maps, masks, limit), abs=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shift", [0, -0.4, -1.5], ids=["positive", "mixed", "negative"])
def test_metrics_of_untied_maps_of_any_sign_equal_brute_force(shift, scale):
    rng = np.random.default_rng(0)
    masks = spots(rng, 12, 64)
    maps = (random_maps(rng, masks) + np.float32(shift)) * np.float32(scale)
    assert (maps < 0).any() == (shift < 0)
    assert_equals_brute_force(maps, masks)


def border(mask):
    mask[0], mask[-1], mask[:, 0] = 1, 1, 1


def diagonal(mask):
    np.fill_diagonal(mask, 1)


def single_pixels(mask):
    mask[::5, ::7] = 1


def everything(mask):
    mask[:] = 1


@pytest.mark.parametrize("draw", [border, diagonal, single_pixels, everything])
def test_metrics_equal_brute_force_for_regions_of_any_shape(draw):
    rng = np.random.default_rng(1)
    masks = np.zeros((6, 64, 64), np.uint8)
    masks[1, 20:40, 20:30] = 1
    draw(masks[2])
    maps = np.round(random_maps(rng, masks) * 1024) / 1024
    assert_equals_brute_force(maps.astype(np.float32), masks)


def test_a_constant_may_be_of_any_size_that_keeps_the_bins_apart():
    mask = np.array([[[1, 0, 0]]])
    apart = np.array([[[-1000, -1000.5, -1001]]])  # half a unit is 1 part in 2000
    assert metrics(apart, mask)["pixel_auroc"] == 1
    assert metrics(apart - 1e6, mask)["pixel_auroc"] == 0.5  # 1 part in 2 million is a tie


def test_values_are_ordered_from_the_lowest_float_to_the_highest_and_minus_zero_is_zero():
    limits = np.finfo(np.float32)
    values = [limits.min, -2, -1, -limits.tiny, 0, limits.tiny, 1, 2, limits.max]
    for lower, higher in pairwise(np.array(values, np.float32)):
        assert metrics([[[higher, lower]]], [[[1, 0]]])["pixel_auroc"] == 1
    assert metrics([[[0.0, -0.0], [0.0, -0.0]]], [[[1, 0], [0, 0]]])["pixel_auroc"] == 0.5


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0])
def test_no_metric_is_above_one_or_below_zero(scale):
    rng = np.random.default_rng(0)
    for _ in range(7):
        masks = (rng.random((3, 16, 16)) < rng.uniform(0.02, 0.9)).astype(int)
        values = list(metrics(masks + scale * rng.random(masks.shape), masks, limit=0.01).values())
        assert 0 <= min(values) <= max(values) <= 1


@pytest.mark.parametrize("seed", [46, 54])  # their sums of areas round to 1 + 2e-16
@pytest.mark.parametrize("noise", [0, 0.4])
def test_perfect_maps_score_one_and_not_more_by_rounding(seed, noise):
    masks = spots(np.random.default_rng(seed), 4, 32)
    maps = masks + 0.5 + noise * np.random.default_rng(seed).random(masks.shape)
    for limit in (0.1, 0.3):
        result = metrics(maps, masks, limit)
        assert list(result.values()) == pytest.approx([1.0] * 4, abs=1e-12)
        assert result["aupro"] <= 1


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_metrics_do_not_depend_on_batches_nor_on_parts_that_are_merged(batch_size):
    rng = np.random.default_rng(3)
    masks = spots(rng, 7, 32)
    maps = random_maps(rng, masks)
    histogram, merged = PixelHistogram(), PixelHistogram()
    for start in range(0, 7, batch_size):
        batch = maps[start : start + batch_size], masks[start : start + batch_size]
        histogram.update(*batch)
        merged.merge(histogram_of(*batch))
    expected = metrics(maps, masks)
    assert histogram.compute() == expected
    assert merged.compute() == expected


def test_histograms_that_have_seen_different_ranges_are_merged_exactly():
    rng = np.random.default_rng(7)
    masks = spots(rng, 6, 32)
    scales = np.array([1, 1e-3, -1e3, -1, 1e3, 1], np.float32)
    maps = random_maps(rng, masks) * scales[:, None, None]
    whole, merged = histogram_of(maps, masks), PixelHistogram()
    merged.merge(PixelHistogram())  # an empty one changes nothing
    for i in (3, 0, 5, 1, 2, 4):
        part = histogram_of(maps[i : i + 1], masks[i : i + 1])
        part.merge(PixelHistogram())
        merged.merge(part)
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)
    np.testing.assert_array_equal(merged.normal, whole.normal)
    assert merged.start == whole.start


def test_pixels_with_mask_255_are_left_out():
    rng = np.random.default_rng(4)
    masks = spots(rng, 4, 32)
    masks[:, 8:12, 20:] = 255
    maps = tied_maps(rng, masks)
    result = metrics(maps, masks)
    assert result == pytest.approx(reference(maps, masks), abs=1e-9)
    maps[masks == 255] = 1000.0
    assert metrics(maps, masks) == result


def peak_memory(num_maps):
    rng = np.random.default_rng(0)
    histogram = PixelHistogram()
    tracemalloc.start()
    for _ in range(num_maps // 20):
        maps = rng.random((20, 64, 64), dtype=np.float32)
        histogram.update(maps, maps > 0.98)
    histogram.compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_maps():
    # 1,800 maps more would be 29 MB if they were kept.
    assert peak_memory(2000) < peak_memory(200) + 5e6


def test_histograms_cover_only_the_bins_between_the_values_that_occur():
    assert PixelHistogram().normal.nbytes == 0
    for low, high in ((1, 2), (-2, -1)):
        histogram = histogram_of([[[low, high]]], [[[0, 1]]])
        histogram.merge(PixelHistogram())
        assert len(histogram.normal) == 4097  # 4096 for each factor of 2
    # Between -0.5 and 0.5 are the bins of all smaller floats of either sign, two times 126 factors
    # of 2; three histograms of 8 bytes a bin.
    histogram.update(np.array([[[-0.5, 0.5]]]), np.array([[[0, 1]]]))
    assert 3 * histogram.normal.nbytes < 30e6


@pytest.mark.parametrize("value", [0, 1])
def test_masks_of_one_kind_are_an_error(value):
    with pytest.raises(ValueError, match="masks must have normal and anomalous pixels"):
        metrics(np.ones((2, 4, 4)), np.full((2, 4, 4), value))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_maps_that_are_not_finite_are_an_error(value):
    maps = np.ones((1, 4, 4))
    maps[0, 0, :2] = value
    with pytest.raises(ValueError, match="anomaly_maps must be finite, got 2 that are not"):
        histogram_of(maps, np.zeros((1, 4, 4)))


@pytest.mark.parametrize(
    ("maps", "masks"), [((2, 4, 4), (2, 4, 5)), ((2, 4, 4), (4, 4)), ((1, 1, 4, 4), (1, 1, 4, 4))]
)
def test_maps_and_masks_of_other_shapes_are_an_error(maps, masks):
    with pytest.raises(ValueError, match=r"same shape \(N, H, W\), got \("):
        histogram_of(np.ones(maps), np.zeros(masks))
