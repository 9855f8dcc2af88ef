import errno
import os
import resource
import signal

import pytest
import torch
from torch.utils.data import Dataset

from anomaly_detection.data import create_dataloader
from anomaly_detection.features.cache import FeatureCache
from anomaly_detection.models.stfpm import STFPMModel, STFPMTrainer
from anomaly_detection.trainer import TrainingError

NAMES = ["a.png", "b.png", "c.png"]


def features(dtype=torch.float32, num=3):
    generator = torch.Generator().manual_seed(0)
    shapes = {"fine": (num, 4, 6, 5), "coarse": (num, 8, 3, 2)}
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()
    }


def size(maps):
    return sum(values.nbytes for values in maps.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_as_they_were_in_the_order_asked_for(tmp_path, dtype):
    cache, maps = FeatureCache(tmp_path, 3, 1e6), features(dtype)
    cache.add(NAMES[:2], {name: values[:2] for name, values in maps.items()})
    cache.add(NAMES[2:], {name: values[2:] for name, values in maps.items()})
    found = cache.get(["c.png", "a.png"])
    assert list(found) == ["fine", "coarse"]
    for name, values in maps.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], values[[2, 0]])


def test_features_of_a_batch_are_there_only_if_those_of_all_images_are(tmp_path):
    cache = FeatureCache(tmp_path, 3, 1e6)
    assert cache.get(NAMES) is None
    cache.add(NAMES[:2], features(num=2))
    assert cache.get(NAMES) is None
    assert cache.get(NAMES[:2]) is not None


def test_nothing_is_kept_where_the_whole_would_be_too_large(tmp_path):
    maps = features()
    for num_images, is_kept in ((3, True), (4, False)):
        cache = FeatureCache(tmp_path, num_images, size(maps))
        cache.add(NAMES, maps)
        assert (cache.get(NAMES) is not None) == is_kept


def test_file_has_no_name(tmp_path):
    cache = FeatureCache(tmp_path / "new", 3, 1e6)
    cache.add(NAMES, features())
    assert list((tmp_path / "new").iterdir()) == []


def test_full_disk_is_an_error_that_says_what_to_change(tmp_path):
    """A limit on the size of files stands for the disk's."""
    cache, limits = FeatureCache(tmp_path, 3, 2e9), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(TrainingError) as error:
            cache.add(NAMES, features())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(error.value) == (
        "the teacher's features must have room on the disk, up to 2 GB "
        f"({os.strerror(errno.EFBIG)}); free some, or set hardware.feature_cache to 0."
    )


class Noise(Dataset):
    """Images that have names."""

    def __init__(self, prefix, num):
        self.prefix = prefix
        generator = torch.Generator().manual_seed(num)
        self.images = torch.randint(0, 256, (num, 3, 64, 64), generator=generator).byte()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "path": f"{self.prefix}/{i}"}


class Killed(BaseException):
    """Stands for a signal: nothing in the library catches it."""


def train(folder, num_epochs, killed_in=None, **options):
    """A training of 10 images with 3 to validate, from its last checkpoint where there is one.

    Returns the trainer and how many images the teacher saw.
    """

    def kill(epoch):
        if epoch == killed_in:
            raise Killed

    torch.manual_seed(0)
    model, seen = STFPMModel("test_resnet", weights="random"), []
    model.teacher_model.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    trainer = STFPMTrainer(
        model, device="cpu", checkpoint_dir=folder, learning_rate=1e-3, **options
    )
    trainer.on_train_epoch_start = kill
    trainer.load_latest_checkpoint()
    trainer.fit(
        create_dataloader(Noise("fit", 10), batch_size=4, shuffle=True),
        create_dataloader(Noise("validation", 3), batch_size=4),
        num_epochs,
    )
    return trainer, sum(seen)


@pytest.mark.parametrize(("gigabytes", "seen"), [(0, 10 + 39), (1, 13), (1e-6, 10 + 39)])
def test_teacher_sees_each_image_once_where_the_cache_has_room(tmp_path, gigabytes, seen):
    """Where it has none: once more than in the 3 epochs, to standardise the channels."""
    assert train(tmp_path, 3, feature_cache=gigabytes)[1] == seen


def test_lists_of_batches_can_be_cached_too(tmp_path):
    model, seen = STFPMModel("test_resnet", weights="random"), []
    model.teacher_model.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    dataset = Noise("fit", 4)
    batches = [{"image": dataset.images, "path": ["a", "b", "c", "d"]}]
    trainer = STFPMTrainer(model, device="cpu", checkpoint_dir=tmp_path, feature_cache=1)
    trainer.fit(batches, num_epochs=3)
    assert seen == [4]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cache_changes_no_result(tmp_path, precision):
    histories = [
        train(tmp_path / str(size), 3, feature_cache=size, precision=precision)[0].history
        for size in (0, 1)
    ]
    for without, with_cache in zip(*histories, strict=True):
        assert with_cache == pytest.approx(without, rel=1e-4)


def test_resumed_training_writes_the_bytes_of_one_that_was_not_interrupted(tmp_path):
    train(tmp_path / "whole", 3, feature_cache=1)
    with pytest.raises(Killed):
        train(tmp_path / "resumed", 3, killed_in=2, feature_cache=1)
    _, seen = train(tmp_path / "resumed", 3, feature_cache=1)
    assert seen == 13
    for name in ("epoch_3.pth", "best_model.pth"):
        one, other = (tmp_path / folder / name for folder in ("whole", "resumed"))
        assert one.read_bytes() == other.read_bytes()


def test_step_outside_of_fit_needs_no_names(tmp_path):
    """A step that is called by itself computes the teacher's features."""
    trainer, _ = train(tmp_path, 1, feature_cache=1)
    images = torch.zeros(2, 3, 64, 64)
    assert trainer.training_step({"image": images}, 0)["loss"].item() > 0
