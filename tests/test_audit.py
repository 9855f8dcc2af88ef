import io
from pathlib import Path

import numpy as np
import pytest
from builders.images import write_category, write_image
from PIL import Image

from anomaly_detection.data import audit_prepared, prepare_category
from anomaly_detection.data.arrays import read_index


def audit(category: Path, output: Path, **options) -> dict:
    prepare_category(
        category.parent,
        category.name,
        output,
        image_size=64,
        bit_depth=16,
        validation_fraction=0.2,
        calibration_fraction=0.2,
        seed=0,
        **options,
    )
    return audit_prepared(output)


def split_of(output: Path, path: str) -> str:
    (split,) = (row["split"] for row in read_index(output) if row["path"] == path)
    return split


def brighter(image: np.ndarray) -> np.ndarray:
    return (0.9 * image + 20).clip(0, 255).astype(np.uint8)


def compressed(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=98)
    return np.asarray(Image.open(file))


def test_independent_images_are_no_near_duplicates(category, tmp_path):
    result = audit(category, tmp_path / "out")
    assert result["near_duplicates"] == []
    assert result["num_images"] == {"calibration": 5, "fit": 14, "test": 12, "validation": 5}


@pytest.mark.parametrize("change", [brighter, compressed])
def test_an_altered_copy_of_a_training_image_is_found_in_test(category, tmp_path, change):
    image = np.asarray(Image.open(category / "train" / "good" / "003.png"))
    write_image(category / "test" / "good" / "copy.png", change(image))
    result = audit(category, tmp_path / "out")
    (pair,) = result["near_duplicates"]
    assert pair["paths"] == ["test/good/copy.png", "train/good/003.png"]
    assert pair["splits"] == ["test", split_of(tmp_path / "out", "train/good/003.png")]
    none = {"pairs": 0, "images": 0}
    counts = {"test": {"pairs": 1, "images": 1}, "calibration": none, "validation": none}
    assert result["num_near_duplicates"] == counts
    assert pair["correlation"] > 0.9


def test_all_pairs_of_splits_are_searched_and_images_counted(tmp_path):
    """Each picture has a copy under other light: wherever they fall, they are found."""
    category = write_category(tmp_path / "data" / "part", num_train=60, num_test=4)
    for path in sorted((category / "train/good").iterdir()):
        darker = (np.asarray(Image.open(path)) * 0.8).astype(np.uint8)
        write_image(path.with_name(f"{path.stem}_dark.png"), darker)
    result = audit(category, tmp_path / "out")
    part = {row["path"]: row["path"][:14] for row in read_index(tmp_path / "out")}
    order = ("test", "calibration", "validation", "fit")
    rows = [row for row in read_index(tmp_path / "out") if row["split"] != "test"]
    expected = {
        (a["path"], b["path"])
        for a in rows
        for b in rows
        if order.index(a["split"]) < order.index(b["split"]) and part[a["path"]] == part[b["path"]]
    }
    found = [tuple(pair["paths"]) for pair in result["near_duplicates"]]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert {tuple(pair["splits"]) for pair in result["near_duplicates"]} == {
        ("calibration", "fit"),
        ("calibration", "validation"),
        ("validation", "fit"),
    }
    for split in order[:-1]:
        own = [a for a, _ in expected if split_of(tmp_path / "out", a) == split]
        counts = {"pairs": len(own), "images": len(set(own))}
        assert result["num_near_duplicates"][split] == counts
    grouped = audit(category, tmp_path / "grouped", group=r"/(\d+)")
    assert grouped["near_duplicates"] == []
    assert grouped["parts_in_train_and_test"] == [f"part {i:03}" for i in range(4)]
    assert result["parts_in_train_and_test"] == []


def test_the_hash_of_a_splits_contents_changes_with_its_images_alone(category, tmp_path):
    before = audit(category, tmp_path / "before")["content"]
    write_image(category / "test" / "dark" / "000.png", np.zeros((64, 64, 3), np.uint8))
    after = audit(category, tmp_path / "after")["content"]
    assert {split for split in before if before[split] != after[split]} == {"test"}


def test_the_most_alike_come_first_and_few_images_are_enough(tmp_path):
    category = write_category(tmp_path / "data" / "few", num_train=8, num_test=1)
    for name, strength in (("a", 5), ("b", 0), ("c", 2)):
        image = np.asarray(Image.open(category / "train" / "good" / f"00{strength}.png"))
        noise = np.random.default_rng(0).normal(0, strength + 0.5, image.shape)
        values = (image + noise).clip(0, 255).astype(np.uint8)
        write_image(category / "test" / "good" / f"{name}.png", values)
    pairs = audit(category, tmp_path / "out")["near_duplicates"]
    assert [pair["paths"] for pair in pairs] == [
        ["test/good/b.png", "train/good/000.png"],
        ["test/good/c.png", "train/good/002.png"],
        ["test/good/a.png", "train/good/005.png"],
    ]


def test_the_same_data_give_the_same_audit(category, tmp_path):
    image = np.asarray(Image.open(category / "train" / "good" / "003.png"))
    write_image(category / "test" / "good" / "copy.png", brighter(image))
    assert audit(category, tmp_path / "a") == audit(category, tmp_path / "b")


@pytest.mark.parametrize("patterned", [False, True])
def test_images_without_anything_particular_are_no_pairs(tmp_path, patterned):
    category = write_category(tmp_path / "data" / "even", num_train=24, num_test=4)
    common = np.random.default_rng(0).integers(50, 200, (64, 64)) if patterned else 100
    common = np.broadcast_to(common, (64, 64))
    for i, path in enumerate(sorted(category.rglob("good/*.png"))):
        write_image(path, (common + i).astype(np.uint8))
    assert audit(category, tmp_path / "out")["near_duplicates"] == []
