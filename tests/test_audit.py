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


def test_the_same_data_give_the_same_audit(category, tmp_path):
    image = np.asarray(Image.open(category / "train" / "good" / "003.png"))
    write_image(category / "test" / "good" / "copy.png", brighter(image))
    assert audit(category, tmp_path / "a") == audit(category, tmp_path / "b")


def test_images_without_anything_particular_are_no_pairs(tmp_path):
    category = write_category(tmp_path / "data" / "even", num_train=6, num_test=1)
    for i, path in enumerate(sorted(category.rglob("good/*.png"))):
        write_image(path, np.full((64, 64), 100 + i, np.uint8))
    assert audit(category, tmp_path / "out")["near_duplicates"] == []
