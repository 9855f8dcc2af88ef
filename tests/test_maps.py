import pytest
import torch

from anomaly_detection.features.moments import Moments
from anomaly_detection.models.maps import (
    PRIOR_IMAGES,
    MapScale,
    image_scores,
    mean_of_neighbours,
    resize_maps,
)


def scale_of(maps):
    """The scale of maps (n, H, W)."""
    moments = Moments()
    moments.add(maps[:, None])
    scale = MapScale(maps.shape[1:])
    scale.estimate(moments)
    return scale


def random_maps(count, size=(4, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *size, generator=generator) + torch.arange(float(size[1]))


# Sizes, neighbours, scores


def test_maps_are_enlarged_bilinearly():
    # 0 and 2, doubled without aligned corners: 0, 0.5, 1.5, 2.
    maps = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    assert resize_maps(maps, (1, 4)).flatten().tolist() == pytest.approx([0.0, 0.5, 1.5, 2.0])
    assert resize_maps(maps, (1, 2)) is maps


def test_neighbours_beyond_the_border_do_not_count():
    level = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    expected = [[3.0, 3.5, 4.0], [4.5, 5.0, 5.5], [6.0, 6.5, 7.0]]  # corners of 4, edges of 6
    assert mean_of_neighbours(level)[0, 0].tolist() == expected


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 4.0), (0.5, 3.5), (1.0, 2.5)])
def test_score_is_the_mean_of_the_highest_pixels(fraction, expected):
    assert image_scores(torch.tensor([[[[1.0, 4.0], [3.0, 2.0]]]]), fraction).item() == expected


def test_a_fraction_of_less_than_a_pixel_is_the_highest_one():
    assert image_scores(torch.tensor([[[[1.0, 4.0], [3.0, 2.0]]]]), 0.01).item() == 4.0


# Standardising


def test_a_single_position_is_standardised_by_its_own_values():
    # 1 and 3: mean 2, deviation 1.
    scale = scale_of(torch.tensor([1.0, 3.0]).view(2, 1, 1))
    assert (scale.mean.item(), scale.deviation.item()) == (2, 1)
    assert scale(torch.tensor([[[5.0]], [[0.0]]])).flatten().tolist() == [3, -2]


def test_a_single_image_is_standardised_by_its_positions():
    # Of all: mean 2, variance 64 / 4 - 4 = 12. At the right end and beside it: mean 4, variance 16;
    # at the left end: 0 and 0. One image counts for 2 / 3, all positions for 1 / 3.
    assert PRIOR_IMAGES == 0.5
    scale = scale_of(torch.tensor([[[0.0, 0.0, 0.0, 8.0]]]))
    assert scale.mean[0, [0, 3]].tolist() == pytest.approx([2 / 3, (2 * 4 + 2) / 3])
    variances = scale.deviation.square()[0, [0, 3]].tolist()
    assert variances == pytest.approx([12 / 3, (2 * 16 + 12) / 3])


def test_several_images_are_standardised_by_position():
    # Always 0 on the left; 2, 4 and 6 on the right: mean 4, variance 8 / 3. Of all: mean 2,
    # variance 56 / 6 - 4 = 16 / 3. Three images count for 6 / 7.
    maps = torch.zeros(3, 1, 6)
    maps[:, :, 3:] = torch.tensor([2.0, 4.0, 6.0]).view(3, 1, 1)
    scale = scale_of(maps)
    assert scale.mean[0, [0, 5]].tolist() == pytest.approx([2 / 7, (6 * 4 + 2) / 7])
    assert scale.deviation.square()[0, [0, 5]].tolist() == pytest.approx([16 / 21, 64 / 21])
    assert scale(torch.full((1, 1, 6), 7.0))[0, 0, 5].item() == pytest.approx(
        (7 - 26 / 7) / (64 / 21) ** 0.5
    )


def test_few_images_lean_on_all_positions_and_many_on_their_own():
    """The way from all positions' mean to a position's own is n / (n + 1 / 2) for n images."""
    maps = torch.zeros(2, 1, 6)
    maps[:, :, 3:] = torch.tensor([3.0, 5.0]).view(2, 1, 1)
    for repeats in (1, 10, 1000):
        count = 2 * repeats
        scale = scale_of(maps.repeat(repeats, 1, 1))
        assert scale.mean[0, 5].item() == pytest.approx(2 + (4 - 2) * count / (count + 0.5))
        own, of_all = 1, (9 + 25) / 4 - 4
        expected = (count * own + 0.5 * of_all) / (count + 0.5)
        assert scale.deviation[0, 5].item() == pytest.approx(expected**0.5)


def test_a_common_factor_and_offset_change_no_standardised_map():
    normal, new = random_maps(5), random_maps(2, seed=1)
    expected = scale_of(normal)(new)
    for factor, offset in ((1e-6, 0), (1e6, 0), (1, 10), (1000, -5)):
        changed = scale_of(factor * normal + offset)(factor * new + offset)
        torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)


def test_the_order_and_the_batches_of_the_images_change_nothing():
    maps = random_maps(6)
    moments = Moments()
    for part in maps.flip(0).split([1, 3, 2]):
        moments.add(part[:, None])
    scale = MapScale((4, 5))
    scale.estimate(moments)
    torch.testing.assert_close(scale.mean, scale_of(maps).mean)
    torch.testing.assert_close(scale.deviation, scale_of(maps).deviation)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
@pytest.mark.parametrize("count", [1, 5])
def test_the_deviation_is_never_zero(value, size, count):
    """Not even of maps that are the same everywhere, in which another value still stands out."""
    scale = scale_of(torch.full((count, *size), value))
    assert scale.deviation.min() > 0
    assert scale(torch.full((1, *size), value)).abs().max() < 1
    other = scale(torch.full((1, *size), value + 1))
    assert other.isfinite().all()
    assert other.min() > 1


def test_a_position_that_never_varied_has_a_finite_scale():
    maps = random_maps(4)
    maps[:, :2, :2] = 0
    assert scale_of(maps).deviation.min() > 0.01


def test_the_state_dict_is_the_whole_scale():
    scale, copy = scale_of(random_maps(3)), MapScale((4, 5))
    copy.load_state_dict(scale.state_dict())
    new = random_maps(2, seed=1)
    assert torch.equal(copy(new), scale(new))
    assert {value.dtype for value in copy.state_dict().values()} == {torch.float32}


def test_a_new_scale_leaves_maps_as_they_are():
    assert torch.equal(MapScale((4, 5))(random_maps(1)), random_maps(1))


def test_maps_of_another_size_are_refused_with_both_sizes():
    """Also those of a single row or column, which would be broadcast."""
    for size in ((6, 5), (4, 1), (1, 5), (5, 4)):
        with pytest.raises(ValueError, match=r"maps are \(4, 5\), got maps of") as error:
            scale_of(random_maps(2))(torch.zeros(1, *size))
        assert str(size) in str(error.value)
