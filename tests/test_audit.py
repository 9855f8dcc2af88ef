import io
from pathlib import Path

import numpy as np
import pytest
from conftest import write_category, write_image
from PIL import Image

from anomaly_detection.data import audit_prepared, prepare_category


def audit(category: Path, output: Path) -> dict:
    prepare_category(
        category.parent,
        category.name,
        output,
        image_size=64,
        bit_depth=16,
        validation_fraction=0.2,
        calibration_fraction=0.2,
        seed=0,
    )
    return audit_prepared(output)


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
    (pair,) = audit(category, tmp_path / "out")["near_duplicates"]
    assert (pair["test"], pair["train"]) == ("test/good/copy.png", "train/good/003.png")
    assert pair["correlation"] > 0.9


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
    assert [(pair["test"], pair["train"]) for pair in pairs] == [
        ("test/good/b.png", "train/good/000.png"),
        ("test/good/c.png", "train/good/002.png"),
        ("test/good/a.png", "train/good/005.png"),
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
