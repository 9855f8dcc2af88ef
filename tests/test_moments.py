import copy
from itertools import permutations

import numpy as np
import pytest
import torch

from anomaly_detection.features.moments import Moments


def moments_of(*parts):
    moments = Moments()
    for maps in parts:
        moments.add(maps)
    return moments


def random_maps(count, seed=0):
    """Maps (count, 3, 2, 4) whose channels are correlated, far from 0 and of different scales."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(count, 3, 2, 4, generator=generator)
    return maps.cumsum(dim=1) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1) + 5


def assert_same(one, other):
    assert (one.count, one.size) == (other.count, other.size)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.scatter, other.scatter, rtol=1e-12, atol=1e-12)


def test_mean_and_scatter_by_hand():
    # Two images of 1 x 2 positions and two channels: (1, 2) and (3, 6) at the left position,
    # (0, 0) and (0, 4) at the right one.
    maps = torch.tensor([[[[1.0, 0.0]], [[2.0, 0.0]]], [[[3.0, 0.0]], [[6.0, 4.0]]]])
    moments = moments_of(maps)
    assert (moments.count, moments.size) == (2, (1, 2))
    assert moments.mean.tolist() == [[2, 4], [0, 2]]
    assert moments.scatter.tolist() == [[[2, 4], [4, 8]], [[0, 0], [0, 8]]]


def test_positions_are_counted_row_by_row():
    moments = moments_of(torch.arange(6.0).view(1, 1, 2, 3))
    assert moments.size == (2, 3)
    assert moments.mean[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_covariance_is_numpys_at_each_position():
    maps = random_maps(9)
    moments = moments_of(*maps.split(4))
    for position, vectors in enumerate(maps.double().flatten(2).permute(2, 0, 1).numpy()):
        covariance = moments.scatter[position] / (moments.count - 1)
        np.testing.assert_allclose(moments.mean[position], vectors.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(vectors.T), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 4], [6, 1], [1, 5, 1]], ids=str)
def test_the_split_into_batches_changes_nothing(sizes):
    maps = random_maps(7)
    assert_same(moments_of(*maps.split(sizes)), moments_of(maps))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_order_of_merging_changes_nothing(order):
    maps = random_maps(10)
    parts = [maps[:1], maps[1:6], maps[6:]]
    first, second, third = (moments_of(parts[i]) for i in order)
    left, right = copy.copy(first), copy.copy(second)
    left.merge(second)
    left.merge(third)
    right.merge(third)
    first.merge(right)
    assert_same(left, moments_of(maps))
    assert_same(first, moments_of(maps))


def test_one_image_more_gives_the_moments_of_a_pass_over_all():
    """What a customer's new good image adds needs none of the old ones."""
    maps = random_maps(8)
    moments = moments_of(maps[:7])
    moments.add(maps[7:])
    assert_same(moments, moments_of(maps))


def test_merging_with_an_empty_one_changes_nothing():
    maps = random_maps(3)
    moments, empty = moments_of(maps), Moments()
    empty.merge(moments)
    assert_same(empty, moments_of(maps))
    moments.merge(Moments())
    assert_same(moments, moments_of(maps))


def test_merging_leaves_the_other_one_as_it_is():
    maps = random_maps(6)
    part = moments_of(maps[:3])
    whole = Moments()
    whole.merge(part)  # the first part
    whole.add(maps[3:])
    whole.merge(part)  # and a further one
    assert_same(part, moments_of(maps[:3]))
    assert whole.count == 9


def test_changing_a_batch_afterwards_changes_nothing():
    maps = random_maps(3).double()
    moments = moments_of(maps)
    maps *= 2
    assert_same(moments, moments_of(random_maps(3)))


def test_a_large_mean_costs_no_digits():
    """Sums of squares would keep 4 of 16 digits here."""
    values = torch.arange(8.0).view(8, 1, 1, 1)
    moments = moments_of(*(values + 2.0**20).split(1))
    assert moments.mean.item() == pytest.approx(2**20 + 3.5, rel=1e-15)
    assert moments.scatter.item() == pytest.approx(42, rel=1e-12)


def test_memory_does_not_grow_with_the_number_of_images():
    def held(count):
        moments = moments_of(*random_maps(count).split(2))
        tensors = [x for x in vars(moments).values() if isinstance(x, torch.Tensor)]
        return sum(x.untyped_storage().nbytes() for x in tensors)

    assert held(3) == held(60) == 8 * (8 * 3 + 8 * 3 * 3)  # float64, 8 positions, 3 channels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_are_float64_whatever_the_features_are(dtype):
    maps = torch.tensor([256.0, 258.0]).view(2, 1, 1, 1)  # bfloat16 has nothing between them
    moments = moments_of(maps.to(dtype))
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    assert (moments.mean.item(), moments.scatter.item()) == (257, 2)


@pytest.mark.parametrize(
    ("values", "is_finite"),
    [
        ([], False),
        ([1.0], True),
        ([1.0, 2.0], True),
        ([1.0, torch.nan], False),
        ([torch.inf], False),
        ([1.0, -torch.inf, 2.0], False),
    ],
)
def test_moments_are_finite_if_there_are_values_and_all_of_them_are(values, is_finite):
    maps = torch.zeros(1, 2, 2, 2)
    parts = []
    for value in values:
        maps[0, 1, 0, 1] = value
        parts.append(maps.clone())
    assert moments_of(*parts).is_finite == is_finite
