"""Moments of features, and the cache of a teacher's features."""

import copy
import errno
import os
from itertools import permutations

import numpy as np
import pytest
import torch
from builders.faults import full_disk
from torch.utils.data import Dataset

from anomaly_detection.data import create_dataloader
from anomaly_detection.features.cache import FeatureCache
from anomaly_detection.features.moments import Moments
from anomaly_detection.models.stfpm.stfpm import STFPMModel
from anomaly_detection.models.stfpm.trainer import STFPMTrainer
from anomaly_detection.trainer import TrainingError


def moments_of(*parts):
    moments = Moments()
    for maps in parts:
        moments.add(maps)
    return moments


def random_maps(count):
    """Maps (count, 3, 2, 4) whose channels are correlated, far from 0 and of different scales."""
    maps = torch.randn(count, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    return maps.cumsum(dim=1) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1) + 5


def assert_equal(one, other):
    assert (one.count, one.size) == (other.count, other.size)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.scatter, other.scatter, rtol=1e-12, atol=1e-12)


def test_mean_and_covariance_are_numpys_at_each_position_row_by_row():
    maps = random_maps(9)
    moments = moments_of(*maps.split(4))
    assert (moments.count, moments.size, len(moments.mean)) == (9, (2, 4), 8)
    for position, vectors in enumerate(maps.double().flatten(2).permute(2, 0, 1).numpy()):
        scatter = np.cov(vectors.T) * 8
        np.testing.assert_allclose(moments.mean[position], vectors.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.scatter[position], scatter, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 4], [6, 1], [1, 5, 1]], ids=str)
def test_neither_the_split_into_batches_nor_one_image_more_changes_the_moments(sizes):
    """What a customer's new good image adds needs none of the old ones."""
    maps = random_maps(7)
    assert_equal(moments_of(*maps.split(sizes)), moments_of(maps))


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_the_order_of_merging_changes_nothing(order):
    maps = random_maps(10)
    parts = [maps[:1], maps[1:6], maps[6:]]
    first, second, third = (moments_of(parts[i]) for i in order)
    left, right = copy.copy(first), copy.copy(second)
    left.merge(second)
    left.merge(third)
    right.merge(third)
    first.merge(right)
    assert_equal(left, moments_of(maps))
    assert_equal(first, moments_of(maps))


def test_merging_an_empty_part_changes_nothing_and_no_part_is_changed_by_it():
    maps = random_maps(6).double()
    part, whole = moments_of(maps[:3]), Moments()
    whole.merge(part)  # the first part
    assert_equal(whole, moments_of(maps[:3]))
    whole.merge(Moments())
    assert_equal(whole, moments_of(maps[:3]))
    whole.add(maps[3:])
    whole.merge(part)  # and a further one
    maps *= 2  # the tensor that has been added is not needed any more
    assert_equal(part, moments_of(random_maps(6)[:3]))
    assert whole.count == 9


def test_a_large_mean_costs_no_digits():
    """Sums of squares would keep 4 of 16 digits here."""
    values = torch.arange(8.0).view(8, 1, 1, 1)
    moments = moments_of(*(values + 2.0**20).split(1))
    assert moments.mean.item() == pytest.approx(2**20 + 3.5, rel=1e-15)
    assert moments.scatter.item() == pytest.approx(42, rel=1e-12)


def test_memory_of_moments_does_not_grow_with_the_number_of_images():
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
    parts = torch.zeros(len(values), 2, 2, 2)
    parts[:, 1, 0, 1] = torch.tensor(values)
    assert moments_of(*parts.split(1) if values else ()).is_finite == is_finite


NAMES = ["a.png", "b.png", "c.png"]


def features(dtype=torch.float32):
    """Two levels of features of the three images."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"fine": (3, 4, 6, 5), "coarse": (3, 8, 3, 2)}
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()
    }


def part_of(maps, images):
    return {name: values[images] for name, values in maps.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_features_come_back_as_they_were_once_all_that_are_asked_for_are_there(tmp_path, dtype):
    cache, maps = FeatureCache(tmp_path, 3, 1e6), features(dtype)
    assert cache.get(NAMES) is None
    cache.add(NAMES[:2], part_of(maps, slice(2)))
    assert cache.get(NAMES) is None
    assert cache.get(NAMES[:2]) is not None
    cache.add(NAMES[2:], part_of(maps, slice(2, 3)))
    found = cache.get(["c.png", "a.png"])
    assert list(found) == ["fine", "coarse"]
    assert {values.dtype for values in found.values()} == {dtype}
    torch.testing.assert_close(found, part_of(maps, [2, 0]), rtol=0, atol=0)


def test_nothing_is_kept_where_the_whole_would_be_too_large(tmp_path):
    maps = features()
    size = sum(values.nbytes for values in maps.values())
    for num_images, is_kept in ((3, True), (4, False)):
        cache = FeatureCache(tmp_path, num_images, size)
        cache.add(NAMES, maps)
        assert (cache.get(NAMES) is not None) == is_kept


def test_the_caches_file_has_no_name(tmp_path):
    cache = FeatureCache(tmp_path / "new", 3, 1e6)
    cache.add(NAMES, features())
    assert list((tmp_path / "new").iterdir()) == []


def test_a_disk_too_full_for_features_is_an_error_that_says_what_to_change(tmp_path):
    cache = FeatureCache(tmp_path, 3, 2e9)
    with full_disk(100), pytest.raises(TrainingError) as error:
        cache.add(NAMES, features())
    assert str(error.value) == (
        "the teacher's features must have room on the disk, up to 2 GB "
        f"({os.strerror(errno.EFBIG)}); free some, or set hardware.feature_cache to 0."
    )


class Noise(Dataset):
    """Images that have names."""

    def __init__(self, prefix, num):
        self.prefix = prefix
        generator = torch.Generator().manual_seed(num)
        self.images = torch.randint(0, 256, (num, 3, 32, 32), generator=generator).byte()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "path": f"{self.prefix}/{i}"}


def make(folder, **options):
    """A trainer, and a list of how many images the teacher gets at a time."""
    torch.manual_seed(0)
    model, seen = STFPMModel("test_resnet", weights="random"), []
    model.teacher_model.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    return STFPMTrainer(model, device="cpu", checkpoint_dir=folder, **options), seen


def train(folder, killed_in=None, **options):
    """Three epochs of 10 images with 3 to validate, from the last checkpoint if there is one.

    Returns the history and how many images the teacher saw.
    """

    def kill(epoch):
        if epoch == killed_in:
            raise KeyboardInterrupt

    trainer, seen = make(folder, learning_rate=1e-3, **options)
    trainer.on_train_epoch_start = kill
    trainer.resume()
    fit = create_dataloader(Noise("fit", 10), batch_size=4, shuffle=True)
    history = trainer.fit(fit, create_dataloader(Noise("validation", 3), batch_size=4), 3)
    return history, sum(seen)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_teacher_sees_each_image_once_where_the_cache_has_room_with_the_same_result(
    tmp_path, precision
):
    """Where it has none: once more than in the three epochs, to standardise the channels."""
    expected, seen = train(tmp_path / "without", feature_cache=0, precision=precision)
    assert seen == 10 + 39
    for gigabytes, num_images in ((1, 13), (1e-6, 10 + 39)):
        folder = tmp_path / str(gigabytes)
        history, seen = train(folder, feature_cache=gigabytes, precision=precision)
        assert seen == num_images
        for row, expected_row in zip(history, expected, strict=True):
            assert row == pytest.approx(expected_row, rel=1e-4)


def test_a_training_resumed_with_the_cache_writes_the_bytes_of_an_uninterrupted_one(tmp_path):
    train(tmp_path / "whole", feature_cache=1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", killed_in=1, feature_cache=1)
    _, seen = train(tmp_path / "resumed", feature_cache=1)
    assert seen == 13
    for name in ("epoch_2.pth", "best_model.pth"):
        one, other = (tmp_path / folder / name for folder in ("whole", "resumed"))
        assert one.read_bytes() == other.read_bytes()


def test_lists_of_batches_are_cached_and_a_step_outside_of_fit_needs_no_names(tmp_path):
    trainer, seen = make(tmp_path, feature_cache=1)
    images = Noise("fit", 4).images
    trainer.fit([{"image": images, "path": ["a", "b", "c", "d"]}], num_epochs=3)
    assert seen == [4]
    assert trainer.training_step({"image": images}, 0)["loss"].item() > 0
    assert seen == [4, 4]
