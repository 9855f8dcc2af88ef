"""Near-duplicates between the splits are found; and the auxiliary images, of anything else."""

import numpy as np
import pytest
import torch
from builders.images import encoded, prepare, random_pixels, write_category, write_image

from anomaly_detection.data import AuxiliaryDataset, audit_prepared, create_dataloader
from anomaly_detection.data.arrays import read_index
from anomaly_detection.data.audit import residuals, small_images
from anomaly_detection.data.auxiliary import write_photographs
from anomaly_detection.data.decode import decode_image
from anomaly_detection.errors import DataError


def prepared(category, **options):
    return prepare(category.parent, category.name, **options)


def pixels_of(path):
    return decode_image(path.read_bytes(), path)


def brighter(image):
    return (0.9 * image + 20).clip(0, 255).astype(np.uint8)


def compressed(image):
    return decode_image(encoded(image, "JPEG", quality=98), "a")


def test_altered_copies_of_training_images_are_found_in_the_test(category):
    clean = audit_prepared(prepared(category))
    assert clean["near_duplicates"] == []  # independent images are none
    assert clean["num_images"] == {"calibration": 4, "fit": 16, "test": 12, "validation": 4}
    for name, change in (("000", brighter), ("001", compressed)):
        image = pixels_of(category / "train" / "good" / f"{name}.png")
        write_image(category / "test" / "good" / f"{name}.png", change(image))
    output = prepared(category)
    split_of = {row["path"]: row["split"] for row in read_index(output)}
    result = audit_prepared(output)
    for pair in result["near_duplicates"]:
        copy, original = pair["paths"]
        assert copy.replace("test", "train") == original
        assert pair["splits"] == ["test", split_of[original]]
        assert pair["correlation"] > 0.9
    none = {"pairs": 0, "images": 0}
    counts = {"test": {"pairs": 2, "images": 2}, "calibration": none, "validation": none}
    assert result["num_near_duplicates"] == counts
    changed = {split for split, old in clean["content"].items() if result["content"][split] != old}
    assert changed == {"test"}
    assert audit_prepared(prepared(category)) == result


def test_all_pairs_of_splits_are_searched_and_images_counted(tmp_path):
    """Each image has a copy under other light: wherever they fall, they are found."""
    category = write_category(tmp_path / "data" / "part", num_train=60, num_test=4)
    for path in sorted((category / "train/good").iterdir()):
        darker = (pixels_of(path) * 0.8).astype(np.uint8)
        write_image(path.with_name(f"{path.stem}_dark.png"), darker)
    output = prepared(category)
    result, rows = audit_prepared(output), read_index(output)
    split_of = {row["path"]: row["split"] for row in rows if row["split"] != "test"}
    order = ("calibration", "validation", "fit")
    expected = {
        (a, b)
        for a in split_of
        for b in split_of
        if order.index(split_of[a]) < order.index(split_of[b]) and a[:14] == b[:14]
    }
    found = [tuple(pair["paths"]) for pair in result["near_duplicates"]]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert {tuple(pair["splits"]) for pair in result["near_duplicates"]} == {
        ("calibration", "fit"),
        ("calibration", "validation"),
        ("validation", "fit"),
    }
    for split in ("test", *order[:-1]):
        own = [a for a, _ in expected if split_of[a] == split]
        counts = {"pairs": len(own), "images": len(set(own))}
        assert result["num_near_duplicates"][split] == counts
    assert result["parts_in_train_and_test"] == []
    grouped = audit_prepared(prepared(category, group=r"/(\d+)"))
    assert grouped["near_duplicates"] == []
    assert grouped["parts_in_train_and_test"] == [f"part {i:03}" for i in range(4)]


def test_the_most_alike_come_first_and_few_images_are_enough(tmp_path):
    category = write_category(tmp_path / "few", num_train=8, num_test=1)
    for name, strength in (("a", 5), ("b", 0), ("c", 2)):
        image = pixels_of(category / "train" / "good" / f"00{strength}.png")
        noise = np.random.default_rng(0).normal(0, strength + 0.5, image.shape)
        values = (image + noise).clip(0, 255).astype(np.uint8)
        write_image(category / "test" / "good" / f"{name}.png", values)
    pairs = audit_prepared(prepared(category))["near_duplicates"]
    assert [pair["paths"] for pair in pairs] == [
        ["test/good/b.png", "train/good/000.png"],
        ["test/good/c.png", "train/good/002.png"],
        ["test/good/a.png", "train/good/005.png"],
    ]


@pytest.mark.parametrize("patterned", [False, True])
def test_images_without_anything_particular_are_no_pairs(tmp_path, patterned):
    category = write_category(tmp_path / "even", num_train=24, num_test=4)
    common = np.random.default_rng(0).integers(50, 200, (64, 64)) if patterned else 100
    common = np.broadcast_to(common, (64, 64))
    for i, path in enumerate(sorted(category.rglob("good/*.png"))):
        write_image(path, (common + i).astype(np.uint8))
    assert audit_prepared(prepared(category))["near_duplicates"] == []


@pytest.mark.parametrize("is_unique", [True, False])
def test_near_duplicates_are_the_same_at_16_bits(tmp_path, is_unique):
    values = random_pixels(30, 3, 128, 128)
    if not is_unique:
        values[:] = values[0]
        values[29, 0, 5, 5] ^= 1  # too little
    found = []
    for factor in (np.uint8(1), np.uint16(257)):
        np.save(tmp_path / "images.npy", values * factor)
        found.append(residuals(small_images([tmp_path / "images.npy"]), torch.arange(30) < 20))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert bool(found[0][29].any()) == is_unique


def test_auxiliary_images_below_a_folder_are_squares_of_bytes_in_batches(tmp_path):
    write_image(tmp_path / "b.png", np.tile(np.uint8([200, 100, 50]), (40, 30, 1)))
    write_image(tmp_path / "a" / "c.JPG", np.full((20, 50), 90, np.uint8))
    write_image(tmp_path / "a" / "d.png", np.full((20, 20), 65535, np.uint16))
    (tmp_path / "a" / "note.txt").write_text("no image")
    dataset = AuxiliaryDataset(tmp_path, 16)
    items = [dataset[i] for i in range(len(dataset))]
    assert [item["path"] for item in items] == ["a/c.JPG", "a/d.png", "b.png"]
    assert {(item["image"].shape, item["image"].dtype) for item in items} == {
        ((3, 16, 16), torch.uint8)
    }
    assert items[1]["image"].unique().tolist() == [255]
    assert items[2]["image"][:, 0, 0].tolist() == [200, 100, 50]
    batches = create_dataloader(dataset, 2, shuffle=True)
    assert [batch["image"].shape for batch in batches] == [(2, 3, 16, 16), (1, 3, 16, 16)]
    four = AuxiliaryDataset(tmp_path, 16, channels=4)  # the fourth is the luminance
    assert four[2]["image"][:, 0, 0].tolist() == [200, 100, 50, 124]  # 59.8 + 58.7 + 5.7
    assert four[0]["image"][:, 0, 0].tolist() == [90] * 4
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"b.png: must be a whole image"):
        AuxiliaryDataset(tmp_path, 16)[2]


def test_the_built_in_auxiliary_images_are_photographs(tmp_path):
    write_photographs(tmp_path / "photographs")
    images = [item["image"] for item in map(AuxiliaryDataset(tmp_path, 64).__getitem__, range(11))]
    assert len(images) == len(AuxiliaryDataset(tmp_path, 64))
    assert all(image.float().std() > 10 for image in images)
