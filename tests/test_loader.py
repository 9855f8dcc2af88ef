from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders.images import write_category, write_image
from torch.utils.data import Dataset

from anomaly_detection.data import (
    MVTecDataset,
    PreparedDataset,
    create_dataloader,
    get_test_transforms,
    prepare_category,
)
from anomaly_detection.errors import DataError


class Numbers(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


@pytest.fixture(scope="module")
def widget(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    write_category(folder / "widget", num_train=10, num_test=2)
    write_image(folder / "widget/train/good/grey.png", np.full((64, 64), 99, np.uint8))
    prepare_category(
        folder,
        "widget",
        folder / "prepared",
        image_size=32,
        bit_depth=16,
        validation_fraction=0.2,
        calibration_fraction=0.2,
        seed=0,
    )
    return SimpleNamespace(
        files=MVTecDataset(folder, "widget", "train", get_test_transforms(32)),
        prepared=PreparedDataset(folder / "prepared", "fit"),
    )


def order(loader, epoch: int = 0) -> list[int]:
    loader.sampler.set_epoch(epoch)
    return torch.cat(list(loader)).tolist()


def test_images_come_in_their_order_without_shuffling():
    loader = create_dataloader(Numbers(), batch_size=4)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_shuffled_epoch_has_every_image_once():
    shuffled = order(create_dataloader(Numbers(), batch_size=4, shuffle=True))
    assert shuffled != list(range(10))
    assert sorted(shuffled) == list(range(10))


def test_shuffled_order_depends_on_seed_and_epoch_only():
    def shuffled(seed: int, epoch: int) -> list[int]:
        return order(create_dataloader(Numbers(), batch_size=4, shuffle=True, seed=seed), epoch)

    torch.manual_seed(0)
    first = shuffled(0, 0)
    torch.manual_seed(1)  # the global state must not matter
    assert shuffled(0, 0) == first
    assert shuffled(0, 1) != first
    assert shuffled(1, 0) != first


def test_loader_that_starts_late_goes_on_with_the_same_order():
    through = create_dataloader(Numbers(), batch_size=4, shuffle=True)
    epochs = [order(through, epoch) for epoch in range(4)]
    assert order(create_dataloader(Numbers(), batch_size=4, shuffle=True), 3) == epochs[3]


@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_each_batch_of_one_process(monkeypatch, shuffle):
    options = {"batch_size": 4, "shuffle": shuffle}
    whole = [sorted(batch.tolist()) for batch in create_dataloader(Numbers(), **options)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append([batch.tolist() for batch in create_dataloader(Numbers(), **options)])
    assert [len(batch) for batch in shares[0]] == [2, 2, 1]
    assert [sorted(one + other) for one, other in zip(*shares, strict=True)] == whole


def test_in_order_every_image_comes_once_among_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    numbers = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        numbers += torch.cat(list(create_dataloader(Numbers(), batch_size=4))).tolist()
    assert sorted(numbers) == list(range(10))


def test_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DataError, match="must be a multiple of the 3 processes, got 4"):
        create_dataloader(Numbers(), batch_size=4)


@pytest.mark.parametrize("kind", ["files", "prepared"])
def test_batches_do_not_depend_on_workers(widget, kind):
    dataset = getattr(widget, kind)
    alone = create_dataloader(dataset, 4, shuffle=True, seed=1)
    helped = create_dataloader(dataset, 4, shuffle=True, seed=1, num_workers=2)
    for epoch in (0, 1):
        alone.sampler.set_epoch(epoch)
        helped.sampler.set_epoch(epoch)
        for one, other in zip(alone, helped, strict=True):
            assert one.keys() == other.keys()
            assert one["path"] == other["path"]
            assert torch.equal(one["image"], other["image"])
            assert torch.equal(one["mask"], other["mask"])


@pytest.mark.parametrize("kind", ["files", "prepared"])
def test_batches_hold_their_items_stacked(widget, kind):
    dataset = getattr(widget, kind)
    batch = next(iter(create_dataloader(dataset, 4)))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (4, 1, 32, 32)
    assert batch["label"].tolist() == [0, 0, 0, 0]
    for i in range(4):
        assert torch.equal(batch["image"][i], dataset[i]["image"])
        assert batch["path"][i] == dataset[i]["path"]
