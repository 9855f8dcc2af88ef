"""`prepare_category`: what it writes of a category's images, and what it refuses."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import images
from builders.images import random_pixels, write_category, write_image

from anomaly_detection.data import PreparedDataset
from anomaly_detection.data.arrays import read_index
from anomaly_detection.errors import DataError

OUTPUTS = ["frame.json", "images.npy", "index.csv", "tiles.npy"]
SPLITS = ("fit", "validation", "calibration", "test")


def prepare(category: Path, **options) -> Path:
    return images.prepare(category.parent, category.name, **{"image_size": 32} | options)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def paths_of(prepared: Path, split: str) -> list[str]:
    return [row["path"] for row in PreparedDataset(prepared, split).rows]


def test_outputs_are_a_few_arrays_and_an_index(category):
    output = prepare(category)
    assert sorted(files_in(output / "train")) == OUTPUTS
    assert sorted(files_in(output / "test")) == [*OUTPUTS[:3], "masks.npy", "tiles.npy"]
    for folder, number in (("train", 24), ("test", 12)):
        pixels = np.load(output / folder / "images.npy")
        assert (pixels.shape, pixels.dtype) == ((number, 3, 32, 32), np.uint8)
    masks = np.load(output / "test" / "masks.npy")
    assert (masks.shape, masks.dtype) == ((8, 32, 32), np.uint8)
    assert np.unique(masks).tolist() == [0, 1]


def test_without_masks_there_is_no_array_of_them_and_the_truth_is_unknown(tmp_path):
    output = prepare(write_category(tmp_path / "widget", masks=False))
    assert [sorted(files_in(output / folder)) for folder in ("train", "test")] == [OUTPUTS] * 2
    for item in PreparedDataset(output, "test"):
        assert item["mask"].unique().tolist() == [255 if item["label"] else 0]


def test_index_has_a_row_for_each_image(category):
    rows = read_index(prepare(category))
    facts = ["path", "split", "label", "defect_type", "sha256", "part", "height", "width", "mask"]
    assert list(rows[0]) == facts
    assert {(row["height"], row["width"]) for row in rows} == {("64", "64")}
    files = category.glob("t*/**/*.png")
    assert sorted(row["path"] for row in rows) == sorted(
        path.relative_to(category).as_posix() for path in files
    )
    for row in rows:
        kind = row["path"].split("/")[1]
        assert row["defect_type"] == kind
        assert row["label"] == ("0" if kind == "good" else "1")
        assert (row["split"] == "test") == row["path"].startswith("test/")
        content = (category / row["path"]).read_bytes()
        assert row["sha256"] == row["part"] == hashlib.sha256(content).hexdigest()
    with_mask = [row["mask"] for row in rows if row["label"] == "1"]
    assert with_mask == [str(i) for i in range(8)]
    assert {row["mask"] for row in rows if row["label"] == "0"} == {""}


def test_splits_part_the_training_images_and_keep_copies_together(category):
    shutil.copy(category / "train/good/003.png", category / "train/good/copy.png")
    output = prepare(category)
    names = {split: paths_of(output, split) for split in SPLITS}
    assert [len(names[split]) for split in ("validation", "test")] in ([4, 12], [5, 12])
    in_train = [name for split in SPLITS[:3] for name in names[split]]
    numbered = [f"train/good/{i:03}.png" for i in range(24)]
    assert sorted(in_train) == [*numbered, "train/good/copy.png"]
    contents = [{item["sha256"] for item in PreparedDataset(output, split)} for split in SPLITS]
    assert len(set.union(*contents)) == sum(map(len, contents)) == 36


def test_seed_alone_draws_the_splits(category):
    first = read_index(prepare(category))
    assert read_index(prepare(category, image_size=40)) == first
    other = read_index(prepare(category, seed=1))
    assert [row["split"] for row in other] != [row["split"] for row in first]
    assert [row["path"] for row in other] == [row["path"] for row in first]


def test_bytes_depend_neither_on_the_place_nor_on_what_was_there(category, tmp_path):
    output = prepare(category)
    before = files_in(output)
    (output / "stale").write_text("left by somebody")
    (output.parent / f".{output.name}.partial").mkdir()  # left by a killed run
    prepare(category)
    assert files_in(output) == before
    assert [path.name for path in output.parent.iterdir()] == ["widget"]
    moved = shutil.copytree(category, tmp_path / "elsewhere" / "widget")
    assert files_in(prepare(moved)) == before


def test_test_images_change_nothing_that_is_fitted_or_calibrated_with(category):
    """Not even deep ones, which would make all of them deep if they were to train with."""
    output = prepare(category)
    before = files_in(output / "train")
    for name in ("good/aaa.png", "zigzag/zzz.png"):
        write_image(category / "test" / name, random_pixels(64, 64, dtype="uint16"))
        prepare(category)
        assert files_in(output / "train") == before
    assert len(PreparedDataset(output, "test")) == 14


def test_a_defect_does_not_change_which_normal_images_are_drawn_for_the_test(category):
    shutil.rmtree(category / "test")
    shutil.rmtree(category / "ground_truth")
    output = prepare(category)
    before, drawn = files_in(output / "train"), paths_of(output, "test")
    write_image(category / "test/scratch/000.png", random_pixels(64, 64, 3))
    prepare(category)
    assert files_in(output / "train") == before
    assert paths_of(output, "test") == [*drawn, "test/scratch/000.png"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(category: Path) -> None:
    """Give a category one of each fault."""
    train, test, masks = (category / x for x in ("train/good", "test", "ground_truth"))
    (train / "000.png").write_text("text")
    (train / "001.png").write_bytes(b"")
    (train / "002.png").unlink()
    (train / "002.png").symlink_to("nowhere.png")
    shutil.copy(train / "003.png", test / "good/again.png")
    cut(write_image(train / "cut.jpg", random_pixels(64, 64, 3)))
    write_image(train / "deep.png", np.full((64, 64), 1024, np.uint16))
    write_image(train / "line1/000.png", random_pixels(64, 64))
    shutil.copytree(test / "bright", category / "train/bright")
    (test / "good/notes.txt").write_text("x")
    cut(test / "bright/001.png")
    (masks / "bright").rename(masks / "brigth")
    (test / "dark/000.png").unlink()
    cut(masks / "dark/001_mask.png")
    write_image(masks / "dark/002_mask.png", random_pixels(32, 32))
    (masks / "dark/003_mask.png").unlink()


FAULTS = [
    "train/good/000.png: must be a whole image, but cannot be decoded",
    "train/good/001.png: must be a whole image, but cannot be decoded",
    "train/good/002.png: must be ",
    "test/good/again.png: must not be in both train and test, but is identical to .*good/003.png",
    "train/good/cut.jpg: must be a whole image, but cannot be decoded",
    "train/good/deep.png: values must be at most 1023 .* got 1024",
    "train/good/line1: there must be no folder here",
    "train/bright: training is on normal images only; move it to test",
    "test/good/notes.txt: must be one of .png.* convert or remove it",
    "test/bright/001.png: must be a whole image, but cannot be decoded",
    "ground_truth/brigth/000_mask.png: mask without its image",
    "ground_truth/dark/000_mask.png: mask without its image.* add the image or remove",
    "ground_truth/dark/001_mask.png: must be a whole image, but",
    "ground_truth/dark/002_mask.png: a mask must be as large.* got 32 x 32 .*002.png of 64 x 64",
    "test/dark/003.png: has no mask, but others of 'dark' do.* add 003_mask.png",
]


def keep(number: int, folder: Path) -> None:
    for path in sorted(folder.iterdir())[number:]:
        path.unlink()


@pytest.mark.parametrize(
    ("fault", "texts"),
    [
        (spoil, FAULTS),
        (
            lambda x: x.rename(x.with_name("gadget")),
            ["must be a folder with samples.csv .csv., or train/good.*: gadget, other[.]$"],
        ),
        (
            lambda x: shutil.rmtree(x / "train"),
            [
                "must have images to train with: samples.csv .csv., or train/good .mvtec."
                ".* or images directly inside .folder.; got ground_truth, test[.]$"
            ],
        ),
        (
            lambda x: keep(0, x / "train/good"),
            ["train/good: there must be images .[.]png, [.]jpg.* found none"],
        ),
        (
            lambda x: keep(2, x / "train/good"),
            ["each of fit, validation and calibration must get an image.* of 2 distinct images"],
        ),
    ],
    ids=["everything", "no category", "no train", "empty train", "two to train"],
)
def test_all_faults_of_a_category_are_listed_and_nothing_is_written(category, fault, texts):
    write_category(category.with_name("other"), num_train=1, num_test=1)
    fault(category)
    output = category.parent / "prepared" / "widget"
    for before in ({}, {"widget": b"", "widget/index.csv": b"earlier"}):
        if before:
            output.mkdir(parents=True)
            (output / "index.csv").write_text("earlier")
        with pytest.raises(DataError) as error:
            prepare(category, bit_depth=10)
        assert files_in(output.parent) == before
        for text in texts:
            assert re.search(text, str(error.value), re.MULTILINE), text


def test_interrupted_run_leaves_the_earlier_output(category, monkeypatch):
    output = prepare(category)
    before = files_in(output.parent)

    def interrupt(*_):
        raise KeyboardInterrupt

    for where in ("_Folder.write", "_Array.close", "json.dumps"):  # first image, last, frame
        with monkeypatch.context() as patched:
            patched.setattr(f"anomaly_detection.data.prepare.{where}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(category, seed=1)
        assert files_in(output.parent) == before


def test_unknown_splits_and_splits_of_both_folders_are_refused(category):
    output = prepare(category)
    with pytest.raises(ValueError, match=r"must be one of those in index.csv, got 'train'"):
        PreparedDataset(output, "train")
    with pytest.raises(ValueError, match=r"must be of one folder, got .* of \['test', 'train'\]"):
        PreparedDataset(output, ("fit", "test"))


PEAKS = """
import os, re, sys
from pathlib import Path
from anomaly_detection.data import prepare_category

os.cpu_count = lambda: 2  # as many images are in memory, twice
root, options = Path(sys.argv[1]), {"image_size": 512, "bit_depth": 16, "seed": 0}
for category in ("20", "100"):
    prepare_category(root, category, root / "out" / category, **options,
                     validation_fraction=0.2, calibration_fraction=0.2)
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """In a process of its own, whose ru_maxrss would be that of the one that started it."""
    for number in (20, 100):
        for i in range(number):
            write_image(tmp_path / f"{number}/{i}.jpg", np.full((1024, 1024, 3), i, np.uint8))
    printed = subprocess.check_output([sys.executable, "-c", PEAKS, tmp_path], text=True)
    few, many = map(int, printed.split())
    # 80 more images are 250 MB as they are and 63 MB resized.
    assert many - few < 45 * 1024
