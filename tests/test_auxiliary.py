import numpy as np
import pytest
import torch
from builders.images import write_image

from anomaly_detection.data import AuxiliaryDataset, create_dataloader
from anomaly_detection.data.auxiliary import write_photographs
from anomaly_detection.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """A red, a grey and a deep grey image in different folders, and a text."""
    write_image(tmp_path / "b.png", np.tile(np.uint8([250, 10, 20]), (40, 30, 1)))
    write_image(tmp_path / "a" / "c.JPG", np.full((20, 50), 90, np.uint8))
    write_image(tmp_path / "a" / "d.png", np.full((20, 20), 65535, np.uint16))
    (tmp_path / "a" / "note.txt").write_text("no image")
    return tmp_path


def test_all_images_below_the_folder_are_squares_of_bytes(folder):
    dataset = AuxiliaryDataset(folder, 16)
    items = [dataset[i] for i in range(len(dataset))]
    assert [item["path"] for item in items] == ["a/c.JPG", "a/d.png", "b.png"]
    assert all(item["image"].shape == (3, 16, 16) for item in items)
    assert all(item["image"].dtype == torch.uint8 for item in items)
    assert items[1]["image"].unique().tolist() == [255]
    assert items[2]["image"][:, 0, 0].tolist() == [250, 10, 20]


def test_they_come_in_batches(folder):
    batches = list(create_dataloader(AuxiliaryDataset(folder, 16), 2, shuffle=True))
    assert [tuple(batch["image"].shape) for batch in batches] == [(2, 3, 16, 16), (1, 3, 16, 16)]


def test_a_damaged_image_is_named(folder):
    (folder / "b.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"b.png: must be a whole image"):
        AuxiliaryDataset(folder, 16)[2]


def test_the_built_in_ones_are_photographs(tmp_path):
    write_photographs(tmp_path / "photographs")
    dataset = AuxiliaryDataset(tmp_path / "photographs", 64)
    assert len(dataset) == 11
    assert all(dataset[i]["image"].float().std() > 10 for i in range(11))
