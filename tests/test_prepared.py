import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_category, write_image
from PIL import Image

from anomaly_detection.data import (
    MVTecDataset,
    PreparedDataset,
    get_test_transforms,
    prepare_category,
)
from anomaly_detection.data.arrays import read_index
from anomaly_detection.errors import DataError

OUTPUTS = ["frame.json", "images.npy", "index.csv", "tiles.npy"]
FOLDERS = ("train", "test")
SPLITS = ("fit", "validation", "calibration", "test")


def prepare(folder: Path, output: Path | None = None, **changes) -> Path:
    """Prepares the category in `folder`, by default to `<its root>/../prepared/<its name>`."""
    output = output or folder.parents[1] / "prepared" / folder.name
    options = {
        "image_size": 32,
        "bit_depth": 16,
        "validation_fraction": 0.2,
        "calibration_fraction": 0.3,
        "seed": 0,
    }
    prepare_category(folder.parent, folder.name, output, **options | changes)
    return output


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def noise(seed: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def test_outputs_are_a_few_arrays_and_an_index(category):
    output = prepare(category)
    assert sorted(files_in(output / "train")) == OUTPUTS
    assert sorted(files_in(output / "test")) == [*OUTPUTS[:3], "masks.npy", "tiles.npy"]
    for folder, number in (("train", 24), ("test", 12)):
        images = np.load(output / folder / "images.npy")
        assert (images.shape, images.dtype) == ((number, 3, 32, 32), np.uint8)
    masks = np.load(output / "test" / "masks.npy")
    assert (masks.shape, masks.dtype) == ((8, 32, 32), np.uint8)
    assert np.unique(masks).tolist() == [0, 1]


def test_index_has_a_row_for_each_image(category):
    rows = read_index(prepare(category))
    facts = ["path", "split", "label", "defect_type", "sha256", "part", "height", "width", "mask"]
    assert list(rows[0]) == facts
    assert {(row["height"], row["width"]) for row in rows} == {("64", "64")}
    paths = [row["path"] for row in rows]
    assert set(paths) == {
        path.relative_to(category).as_posix()
        for split in ("train", "test")
        for path in (category / split).rglob("*.png")
    }
    for row in rows:
        kind = row["path"].split("/")[1]
        assert row["defect_type"] == kind
        assert row["label"] == ("0" if kind == "good" else "1")
        assert (row["split"] == "test") == row["path"].startswith("test/")
        content = (category / row["path"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
    with_mask = [row for row in rows if row["label"] == "1"]
    assert [row["mask"] for row in with_mask] == [str(i) for i in range(8)]
    assert {row["mask"] for row in rows if row["label"] == "0"} == {""}


def test_prepared_items_equal_those_read_from_the_files(category):
    write_image(category / "train/good/grey.png", noise(1)[..., 0])
    write_image(category / "train/good/deep.png", noise(2)[..., 0].astype(np.uint16) * 257)
    write_image(category / "test/scratch/wide.jpg", noise(3)[:20])
    output = prepare(category)
    transform = get_test_transforms(32)
    prepared = {item["path"]: item for split in SPLITS for item in PreparedDataset(output, split)}
    assert len(prepared) == 24 + 2 + 12 + 1
    for split in ("train", "test"):
        files = MVTecDataset(category.parent, "widget", split, transform)
        for item in (files[i] for i in range(len(files))):
            other = prepared.pop(Path(item["path"]).relative_to(category).as_posix())
            assert item.keys() | {"position"} == other.keys()
            assert torch.equal(item["image"], other["image"])
            assert torch.equal(item["mask"], other["mask"])
            assert item["image"].dtype == other["image"].dtype
            assert item["mask"].dtype == other["mask"].dtype
            for key in ("label", "defect_type", "sha256"):
                assert item[key] == other[key]
    assert not prepared


def test_batch_is_its_items_stacked(category):
    dataset = PreparedDataset(prepare(category), "test")
    indices = [7, 0, 11, 3]
    batch = dataset.__getitems__(indices)
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["mask"].shape == (4, 1, 32, 32)
    for position, index in enumerate(indices):
        item = dataset[index]
        assert torch.equal(batch["image"][position], item["image"])
        assert torch.equal(batch["mask"][position], item["mask"])
        for key in ("label", "defect_type", "path", "sha256"):
            assert batch[key][position] == item[key]


def test_batches_are_made_on_the_device(category):
    batch = PreparedDataset(prepare(category), "test", "meta").__getitems__([0, 1, 2])
    shapes = {"image": (3, 3, 32, 32), "label": (3,), "mask": (3, 1, 32, 32)}
    assert {key: tuple(batch[key].shape) for key in shapes} == shapes
    assert {batch[key].device.type for key in shapes} == {"meta"}
    on_disk = PreparedDataset(prepare(category), "test").__getitems__([0, 1, 2])
    assert {key: batch[key].dtype for key in shapes} == {key: on_disk[key].dtype for key in shapes}
    assert batch["path"] == on_disk["path"]


def test_batches_can_be_written_to_without_changing_the_arrays(category):
    output = prepare(category)
    before = files_in(output)
    dataset = PreparedDataset(output, "test")
    dataset[0]["image"].zero_()
    dataset[0]["mask"].fill_(9)
    assert not torch.equal(dataset[0]["image"], torch.zeros(3, 32, 32))
    assert files_in(output) == before


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_are_the_images_of_the_split_in_order(category, split):
    dataset = PreparedDataset(prepare(category), split)
    assert dataset.image_size == 32
    expected = np.stack([item["image"].numpy() for item in dataset])
    assert np.array_equal(dataset.pictures(), expected)
    assert np.array_equal(dataset.tiles(), expected)


def test_category_without_masks_has_no_array_of_masks(tmp_path):
    output = prepare(write_category(tmp_path / "data/widget", masks=False))
    assert [sorted(files_in(output / folder)) for folder in FOLDERS] == [OUTPUTS] * 2
    for item in PreparedDataset(output, "test"):
        assert item["mask"].unique().tolist() == [255 if item["label"] else 0]


def test_splits_part_the_training_images(category):
    shutil.copy(category / "train/good/003.png", category / "train/good/copy.png")
    output = prepare(category)
    names = {split: [item["path"] for item in PreparedDataset(output, split)] for split in SPLITS}
    assert [len(names[split]) for split in ("validation", "test")] in ([5, 12], [6, 12])
    in_train = [name for split in SPLITS[:3] for name in names[split]]
    assert sorted(in_train) == [f"train/good/{i:03}.png" for i in range(24)] + [
        "train/good/copy.png"
    ]
    contents = [{item["sha256"] for item in PreparedDataset(output, split)} for split in SPLITS]
    assert len(set.union(*contents)) == sum(map(len, contents)) == 36


def test_seed_alone_draws_the_splits(category):
    first = read_index(prepare(category, seed=0))
    assert read_index(prepare(category, seed=0, image_size=40)) == first
    other = read_index(prepare(category, seed=1))
    assert [row["split"] for row in other] != [row["split"] for row in first]
    assert [row["path"] for row in other] == [row["path"] for row in first]


@pytest.mark.parametrize("name", ["good/aaa.png", "zigzag/zzz.png"])
def test_a_test_image_changes_nothing_that_is_fitted_or_calibrated_with(category, name):
    """Nor does one of 16 bits; among the images to train with, it would make all of them deep."""
    output = prepare(category)
    before = files_in(output / "train")
    write_image(category / "test" / name, noise(1)[..., 0].astype(np.uint16) * 257)
    prepare(category)
    assert files_in(output / "train") == before
    assert len(PreparedDataset(output, "test")) == 13


def test_a_defect_does_not_change_which_normal_images_are_drawn_for_the_test(category):
    shutil.rmtree(category / "test")
    shutil.rmtree(category / "ground_truth")
    output = prepare(category)
    before = files_in(output / "train")
    drawn = [row["path"] for row in PreparedDataset(output, "test").rows]
    write_image(category / "test/scratch/000.png", noise(1))
    prepare(category)
    assert files_in(output / "train") == before
    after = [row["path"] for row in PreparedDataset(output, "test").rows]
    assert after == [*drawn, "test/scratch/000.png"]


def test_second_run_writes_the_same_bytes(category):
    output = prepare(category)
    before = files_in(output)
    (output / "stale").write_text("left by somebody")
    (output.parent / f".{output.name}.partial").mkdir()  # left by a killed run
    prepare(category)
    assert files_in(output) == before
    assert [path.name for path in output.parent.iterdir()] == ["widget"]


def test_moved_category_gives_the_same_bytes(category, tmp_path):
    moved = tmp_path / "elsewhere" / "data" / "widget"
    shutil.copytree(category, moved)
    assert files_in(prepare(moved)) == files_in(prepare(category))


def renamed_text(folder: Path) -> None:
    (folder / "train/good/000.png").write_text("not an image")


def empty_file(folder: Path) -> None:
    (folder / "train/good/000.png").write_bytes(b"")


def cut_png(folder: Path) -> None:
    path = folder / "test/bright/001.png"
    path.write_bytes(path.read_bytes()[:-2000])


def cut_jpg(folder: Path) -> None:
    path = write_image(folder / "train/good/cut.jpg", noise(1))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_mask(folder: Path) -> None:
    path = folder / "ground_truth/dark/001_mask.png"
    path.write_bytes(path.read_bytes()[:60])


def mask_without_image(folder: Path) -> None:
    (folder / "test/dark/001.png").unlink()


def masks_without_folder(folder: Path) -> None:
    (folder / "ground_truth/dark").rename(folder / "ground_truth/darc")


def mask_of_another_size(folder: Path) -> None:
    write_image(folder / "ground_truth/dark/001_mask.png", noise(1, 32)[..., 0])


def mask_missing(folder: Path) -> None:
    (folder / "ground_truth/dark/001_mask.png").unlink()


def no_train(folder: Path) -> None:
    shutil.rmtree(folder / "train")


def empty_train(folder: Path) -> None:
    shutil.rmtree(folder / "train/good")
    (folder / "train/good").mkdir()


def few_train(folder: Path) -> None:
    for path in sorted((folder / "train/good").iterdir())[2:]:
        path.unlink()


def gone(folder: Path) -> None:
    folder.rename(folder.with_name("gadget"))


def in_both(folder: Path) -> None:
    shutil.copy(folder / "train/good/002.png", folder / "test/good/again.png")


def defective_in_train(folder: Path) -> None:
    shutil.copytree(folder / "test/dark", folder / "train/dark")


def text_file(folder: Path) -> None:
    (folder / "test/good/notes.txt").write_text("x")


def subfolder(folder: Path) -> None:
    write_image(folder / "train/good/line1/000.png", noise(1))


def too_deep(folder: Path) -> None:
    write_image(folder / "train/good/deep.png", np.full((64, 64), 1024, np.uint16))


def several(folder: Path) -> None:
    for fault in (renamed_text, cut_png, mask_of_another_size, in_both, text_file, too_deep):
        fault(folder)


FAULTS: list[tuple[Callable, list[str]]] = [
    (renamed_text, ["train/good/000.png: must be a whole image, but cannot be decoded"]),
    (empty_file, ["train/good/000.png: must be a whole image, but cannot be decoded"]),
    (cut_png, ["test/bright/001.png: must be a whole image, but cannot be decoded"]),
    (cut_jpg, ["train/good/cut.jpg: must be a whole image, but cannot be decoded"]),
    (cut_mask, ["ground_truth/dark/001_mask.png: must be a whole image, but"]),
    (
        mask_without_image,
        ["ground_truth/dark/001_mask.png: mask without its image", "add the image or remove"],
    ),
    (masks_without_folder, ["ground_truth/darc/000_mask.png: mask without its image"]),
    (
        mask_of_another_size,
        ["dark/001_mask.png: a mask must be as large", "got 32 x 32", "001.png of 64 x 64"],
    ),
    (mask_missing, ["test/dark/001.png: has no mask, but others of 'dark' do", "add 001_mask.png"]),
    (no_train, ["must have images to train with: samples.csv (csv), or train/good (mvtec)"]),
    (no_train, ["or images directly inside (folder); got ground_truth, test."]),
    (empty_train, ["train/good: there must be images (.png, .jpg", "found none"]),
    (
        few_train,
        ["each of fit, validation and calibration must get an image", "of 2 distinct images"],
    ),
    (gone, ["must be a folder with samples.csv (csv), or train/good", ": gadget, other."]),
    (in_both, ["test/good/again.png: must not be in both train and test", "train/good/002.png"]),
    (defective_in_train, ["train/dark: training is on normal images only; move it to test"]),
    (text_file, ["test/good/notes.txt: must be one of .png", "convert or remove it"]),
    (subfolder, ["train/good/line1: there must be no folder here"]),
    (too_deep, ["train/good/deep.png: values must be at most 1023", "got 1024"]),
    (
        several,
        [
            "train/good/000.png: must be a whole image",
            "test/bright/001.png: must be a whole image",
            "ground_truth/dark/001_mask.png: a mask must be as large",
            "train/good/deep.png: values must be at most 1023",
            "test/good/notes.txt: must be one of",
            "test/good/again.png: must not be in both",
        ],
    ),
]


@pytest.mark.parametrize(
    ("fault", "texts"), FAULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_faulty_category_is_refused_and_nothing_is_written(category, fault, texts):
    write_category(category.with_name("other"), num_train=1, num_test=1)
    output = prepare(category)
    before = files_in(output.parent)
    fault(category)
    for target in (output, output.with_name("fresh")):
        with pytest.raises(DataError) as error:
            prepare(category, target, bit_depth=10)
        assert files_in(output.parent) == before
        for text in texts:
            assert text in str(error.value)


def test_file_that_cannot_be_opened_is_refused(category):
    path = category / "train/good/000.png"
    path.unlink()
    path.symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"000\.png: must be "):
        prepare(category)


def test_interrupted_run_leaves_the_earlier_output(category, monkeypatch):
    output = prepare(category)
    before = files_in(output.parent)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("anomaly_detection.data.prepare._Folder.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(category, seed=1)
    assert files_in(output.parent) == before


def test_unknown_split_is_refused(category):
    with pytest.raises(ValueError, match=r"must be one of those in index.csv, got 'train'"):
        PreparedDataset(prepare(category), "train")


def test_splits_of_both_folders_at_once_are_refused(category):
    with pytest.raises(ValueError, match=r"must be of one folder, got .* of \['test', 'train'\]"):
        PreparedDataset(prepare(category), ("fit", "test"))


GROWTH = """
import resource, sys
from pathlib import Path
from anomaly_detection.data import prepare_category

def peak(category):
    prepare_category(
        Path(sys.argv[1]), category, Path(sys.argv[1], "prepared", category), image_size=512,
        bit_depth=16, validation_fraction=0.2, calibration_fraction=0.2, seed=0,
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(peak("few"), peak("many"))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    for category, number in (("few", 20), ("many", 100)):
        for i in range(number):
            folder = "test/good" if i < 5 else "train/good"
            path = tmp_path / category / folder / f"{i:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (1024, 1024), (i, 90, 90)).save(path)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, tmp_path],
        env={**os.environ, "LOKY_MAX_CPU_COUNT": "2"},  # images in memory: one for each core
        capture_output=True,
        text=True,
        check=True,
    )
    kib = 1024 if sys.platform == "darwin" else 1  # ru_maxrss is in bytes there
    few, many = (int(peak) / kib for peak in done.stdout.split())
    # 80 more images are 250 MB as they are and 63 MB resized.
    assert many - few < 45 * 1024
