"""The layouts that data sets have: what is found in each, and what is wrong with it."""

import hashlib
import re
import shutil
from collections import Counter
from pathlib import Path

import elpv_dataset
import numpy as np
import pytest
import torch
from builders.images import prepare, random_pixels, write_category, write_image
from builders.layouts import (
    GREY,
    write_btad,
    write_folder,
    write_mvtec,
    write_split,
    write_table,
    write_visa,
)
from builders.projects import Project, read_json

from anomaly_detection.data import (
    MVTecDataset,
    available_categories,
    get_test_transforms,
    get_train_transforms,
    scan_category,
)
from anomaly_detection.data.arrays import read_index
from anomaly_detection.data.elpv import write_elpv
from anomaly_detection.errors import DataError


def found(folder, layout="auto"):
    """The layout, and a line for each sample, with its mask; there are no findings."""
    name, samples, findings = scan_category(folder.parent, folder.name, layout)
    assert not findings
    lines = []
    for sample in samples:
        paths = [
            path.relative_to(folder).as_posix() for path in (sample.path, sample.mask_path) if path
        ]
        lines.append(f"{sample.split} {sample.defect_type}: {', '.join(paths)}")
    return name, lines


def findings_of(folder):
    return scan_category(folder.parent, folder.name)[2]


LAYOUTS = {
    "mvtec": (
        write_mvtec,
        """train good: train/good/000.png
        test bright: test/bright/000.png, ground_truth/bright/000_mask.png
        test dark: test/dark/000.png, ground_truth/dark/000_mask.png
        test good: test/good/000.png""",
    ),
    "btad": (
        write_btad,
        """train good: train/ok/0.bmp
        train good: train/ok/1.bmp
        train good: train/ok/2.bmp
        test ko: test/ko/0.bmp, ground_truth/ko/0.png
        test good: test/ok/0.bmp""",
    ),
    "visa": (
        write_visa,
        """train good: Data/Images/Normal/0.JPG
        train good: Data/Images/Normal/1.JPG
        test defective: Data/Images/Anomaly/0.JPG, Data/Masks/Anomaly/0.png
        test good: Data/Images/Normal/2.JPG""",
    ),
    "csv": (
        write_table,
        """train good: good one.png
        train good: gut/größe.png
        test scratch: b.png, b mask.png
        test defective: c.tif
        test good: test/a.png""",
    ),
    "folder": (
        write_folder,
        """train good: 0.png
        train good: 1.png
        train good: 2.png""",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_recognised_and_has_its_own_rules(tmp_path, layout):
    write, samples = LAYOUTS[layout]
    folder = write(tmp_path)
    lines = [line.strip() for line in samples.splitlines()]
    assert found(folder) == found(folder, layout) == (layout, lines)
    assert available_categories(tmp_path) == [folder.name]
    other = "visa" if layout != "visa" else "mvtec"
    assert available_categories(tmp_path, other) == []
    with pytest.raises(DataError, match=rf"must have images to train with: .* \({other}\); got "):
        scan_category(tmp_path, folder.name, other)


def test_categories_are_the_folders_with_normal_training_images(tmp_path):
    for name in ("b/train/good", "a/train/good", "c/test/good", "d/train/bad"):
        (tmp_path / name).mkdir(parents=True)
    assert available_categories(tmp_path) == ["a", "b"]


def test_a_folder_with_folders_could_hold_defects_and_is_not_taken_for_normal(tmp_path):
    folder = write_folder(tmp_path)
    write_image(folder / "bad" / "0.png", GREY)
    assert findings_of(folder) == [
        f"{folder / 'bad'}: there must be no folder here; move or remove it."
    ]
    for path in folder.glob("*.png"):
        path.unlink()
    assert available_categories(tmp_path) == []


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_may_come_from_a_spreadsheet(tmp_path, separator):
    rows = [("path", "label"), ("good one.png", "normal"), ("b.png", "1")]
    heads, *lines = map(separator.join, rows)
    folder = write_table(tmp_path, *lines, heads=heads, encoding="utf-8-sig")
    assert found(folder)[1] == ["train good: good one.png", "test defective: b.png"]


def test_a_table_goes_before_folders(tmp_path):
    folder = write_mvtec(tmp_path)
    (folder / "samples.csv").write_text("path,label\ntrain/good/000.png,normal")
    assert found(folder) == ("csv", ["train good: train/good/000.png"])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("b.png,bad,,,", "label must be one of 0, 1, normal, anomalous, got 'bad'."),
        ("b.png,1,train,,", "training is on normal images only; let split be test."),
        ("b.png,1,val,,", "split must be train, test or empty, got 'val'."),
        ("b.png,0,,b mask.png,", "a normal image has no mask; leave the cell empty."),
        ("b.png,0,,,scratch", "got 'scratch' with label '0'."),
        ("b.png,1,,,good", "got 'good' with label '1'."),
        ("nowhere.png,0,,,", "'nowhere.png' must be a file, but is not there."),
        ("../other.png,0,,,", "paths must lead to files in "),
        ("/etc/passwd,0,,,", "paths must lead to files in "),
        ("samples.csv,0,,,", "images and masks must be one of .png, "),
        ("b.png,1,,nowhere.png,", "'nowhere.png' must be a file, but is not there."),
        ("good one.png,0,,,", "names good one.png for a second time; remove one row."),
    ],
)
def test_a_table_s_faults_are_listed_by_line(tmp_path, line, text):
    folder = write_table(tmp_path, "good one.png,0,,,", line, "c.tif,?,,,")
    first, second = findings_of(folder)
    assert first.startswith(f"{folder / 'samples.csv'}, line 3: ")
    assert text in first
    assert second.startswith(f"{folder / 'samples.csv'}, line 4: label must be")


COLUMNS = "columns must be path, label, and may be split, defect_type, mask, group, got"


@pytest.mark.parametrize(
    ("heads", "line", "encoding", "text"),
    [
        ("file,label", "b.png,0", "utf-8", f"{COLUMNS} file, label."),
        ("path, label,colour", "b.png,0", "utf-8", f"{COLUMNS} path, label, colour."),
        ("path", "b.png,0", "utf-8", f"{COLUMNS} path."),
        ("path,label,label", "b.png,0", "utf-8", "columns must differ, got path, label, label."),
        ("path,label", "b.png,0,deep", "utf-8", "line 2: must have 2 cells at most, got 3."),
        ("path,label", "", "utf-8", "must name images, but has no rows for them."),
        (
            "path,label",
            "größe.png,0",
            "latin-1",
            "must be encoded in UTF-8; save it again as that.",
        ),
    ],
)
def test_what_is_no_such_table_is_refused_in_a_line(tmp_path, heads, line, encoding, text):
    folder = write_table(tmp_path, line, heads=heads, encoding=encoding)
    assert findings_of(folder) == [f"{folder / 'samples.csv'}: {text}"]


def test_lines_are_counted_as_in_an_editor(tmp_path):
    folder = write_table(tmp_path, "", 'b.png,1,test,,"a\n\u2028b"', "", "c.tif,?,,,")
    _, samples, (line,) = scan_category(tmp_path, "part")
    assert [sample.defect_type for sample in samples] == ["a\n\u2028b"]
    assert line.startswith(f"{folder / 'samples.csv'}, line 6: label")


def test_visa_s_faults_are_listed(tmp_path):
    folder = write_visa(tmp_path)
    (folder / "Data/Masks/Anomaly/0.png").unlink()
    write_image(folder / "Data/Images/Normal/9.JPG", GREY)
    (folder / "Data/Images/Normal/._0.JPG").write_bytes(b"")  # left by an archive
    split, images = tmp_path / "split_csv/1cls.csv", folder / "Data/Images"
    assert findings_of(folder) == [
        f"{split}, line 5: 'candle/Data/Masks/Anomaly/0.png' must be a file, but is not there.",
        f"{images / 'Normal/9.JPG'}: must be in {split}; add a row or remove the image.",
    ]
    split.write_text("object,split,label,image")
    (line,) = findings_of(folder)
    assert line.startswith(f"{split}: columns must be object, split, label, image, mask, got")
    split.unlink()
    (line,) = findings_of(folder)
    assert line.startswith(f"{split}: must be there")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("candle,train,anomaly,0.JPG,", "training is on normal images only"),
        ("candle,test,Normal,0.JPG,", "label must be normal or anomaly, got"),
        ("candle,Train,normal,0.JPG,", "split must be train or test, got 'Train'"),
        ("candle,test,normal,other/0.JPG,", "paths must lead to files in "),
        ("candle,test,normal", "paths must lead to files in "),
        ("other,test,normal,other/0.JPG,", "must name images, but has no rows for"),
    ],
)
def test_a_row_of_visa_that_breaks_a_rule_is_named(tmp_path, row, text):
    folder = write_visa(tmp_path)
    write_split(tmp_path, [row.split(",")])
    first = findings_of(folder)[0]
    assert first.startswith(str(tmp_path / "split_csv/1cls.csv"))
    assert text in first


def test_images_beside_the_folders_of_mvtec_s_layout_are_named(tmp_path):
    folder = write_mvtec(tmp_path)
    for name in ("loose.png", "train/loose.png", "test/loose.png"):
        write_image(folder / name, GREY)
    (folder / "test" / "good").rename(folder / "test" / "OK")
    *loose, name = findings_of(folder)
    assert [line.split(": ")[0] for line in loose] == [
        str(folder / name) for name in ("loose.png", "train/loose.png", "test/loose.png")
    ]
    assert name.startswith(f"{folder / 'test/OK'}: must be good for normal images")


def test_masks_are_found_with_and_without_their_suffix(category):
    masks = category / "ground_truth" / "dark"
    for path in sorted(masks.iterdir()):
        path.rename(path.with_name(path.name.replace("_mask", "")))
    lines = found(category)[1]
    for i in range(4):
        names = f"test/dark/{i:03}.png, ground_truth/dark/{i:03}.png"
        assert f"test dark: {names}" in lines
        assert f"test bright: {names.replace('dark', 'bright')[:-4]}_mask.png" in lines
    shutil.copy(masks / "000.png", masks / "000_mask.png")
    assert findings_of(category) == [
        f"{masks / '000_mask.png'}: a second mask beside 000.png; remove one."
    ]


def test_files_of_the_operating_system_are_ignored(category):
    before = found(category)
    for folder in ("train/good", "test/good", "test/dark", "ground_truth/dark", "test", "train"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._000.png", "THUMBS.DB"):
            (category / folder / name).write_bytes(b"\0")
    shutil.copytree(category / "test/good", category / "test/.ipynb_checkpoints")
    assert found(category) == before


def test_images_are_known_by_their_suffix_in_any_case(tmp_path):
    write_category(tmp_path / "widget", num_train=0, num_test=1)
    suffixes = ["png", "jpg", "jpeg", "bmp", "tif", "tiff"]
    for suffix in [*suffixes, *map(str.upper, suffixes)]:
        write_image(tmp_path / f"widget/train/good/{suffix}.{suffix}", GREY)
    assert len(MVTecDataset(tmp_path, "widget")) == 12


def test_a_data_set_lists_all_faults_of_its_layout(category):
    (category / "test/good/notes.txt").write_text("x")
    (category / "train/bad").mkdir()
    with pytest.raises(DataError) as error:
        MVTecDataset(category.parent, "widget")
    assert str(error.value).splitlines() == [
        f"{category / 'train/bad'}: training is on normal images only; move it to test.",
        f"{category / 'test/good/notes.txt'}: must be one of .png, .jpg, .jpeg, .bmp, .tif, .tiff; "
        "convert or remove it.",
    ]
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'fit'"):
        MVTecDataset(category.parent, "widget", "fit")


def test_training_items_are_normal_and_in_order(category):
    items = list(MVTecDataset(category.parent, "widget"))
    assert {item["label"] for item in items} == {0}
    assert {item["image"].shape for item in items} == {(3, 64, 64)}
    assert [Path(item["path"]).name for item in items] == [f"{i:03}.png" for i in range(24)]


@pytest.mark.parametrize("transforms", [get_test_transforms, get_train_transforms])
def test_items_are_dicts_of_image_label_mask_and_origin_of_one_size(category, transforms):
    for height, width in ((40, 90), (33, 33), (100, 20)):
        stripes = np.zeros((height, width), np.uint8)
        stripes[::3] = 255
        write_image(category / f"test/bright/{height}.png", stripes)
        write_image(category / f"ground_truth/bright/{height}_mask.png", stripes)
    shutil.rmtree(category / "ground_truth/dark")
    dataset = MVTecDataset(category.parent, "widget", "test", transforms(32))
    items = {Path(item["path"]): item for item in dataset}
    assert len(items) == len(dataset) == 15
    for path, item in items.items():
        kind = path.parent.name
        assert set(item) == {"image", "label", "mask", "defect_type", "path", "sha256"}
        kinds = {"image": ((3, 32, 32), torch.float32), "mask": ((1, 32, 32), torch.uint8)}
        for name, expected in kinds.items():
            assert type(item[name]) is torch.Tensor
            assert (item[name].shape, item[name].dtype) == expected
        assert item["defect_type"] == kind
        assert item["label"] == (0 if kind == "good" else 1)
        masked = {"good": [0], "bright": [0, 1], "dark": [255]}  # unknown where there is no mask
        assert item["mask"].unique().tolist() == masked[kind]
        assert item["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        if kind == "bright" and path.stem.startswith("0"):  # the mask lies on the spot
            grey = item["image"].float().mean(0)
            assert grey[item["mask"][0] == 1].min() > grey[item["mask"][0] == 0].mean() + 0.5


def test_a_flipped_item_is_the_item_flipped(category):
    plain = MVTecDataset(category.parent, "widget", "test", get_test_transforms(32))
    flip = get_train_transforms(32, horizontal_flip=1.0)
    flipped = MVTecDataset(category.parent, "widget", "test", flip)
    for ours, theirs in zip(flipped, plain, strict=True):
        assert torch.equal(ours["image"], theirs["image"].flip(2))
        assert torch.equal(ours["mask"], theirs["mask"].flip(2))


def splits_of(folder, **options):
    fractions = {"validation_fraction": 0.2, "calibration_fraction": 0.2}
    output = prepare(folder.parent, folder.name, image_size=8, **fractions, **options)
    return Counter((row["split"], row["defect_type"]) for row in read_index(output))


def test_without_a_normal_test_image_some_are_drawn(tmp_path):
    folder = write_folder(tmp_path, 20)
    assert splits_of(folder, test_fraction=0.1) == {
        ("fit", "good"): 10,
        ("validation", "good"): 4,
        ("calibration", "good"): 4,
        ("test", "good"): 2,
    }
    lines = [f"{i}.png,{int(i > 17)}" for i in range(20)]
    (folder / "samples.csv").write_text("\n".join(["path,label", *lines]))
    counts = splits_of(folder, test_fraction=0.1)  # defects do not keep them from being drawn
    assert counts[("test", "defective")] == 2
    assert counts[("test", "good")] == 2


def test_a_normal_test_image_keeps_all_others_for_training(tmp_path):
    folder = write_category(tmp_path / "part", size=32, num_train=20, num_test=1)
    counts = splits_of(folder, test_fraction=0.5)
    assert counts[("test", "good")] == 1
    assert counts[("fit", "good")] == 12


def test_too_few_images_to_draw_from_are_an_error_that_names_the_fractions(tmp_path):
    with pytest.raises(DataError) as error:
        splits_of(write_folder(tmp_path, 3), test_fraction=0.1)
    assert "each of fit, validation, calibration and test must get an image" in str(error.value)
    assert "data.test_fraction" in str(error.value)


def test_images_may_have_any_name_and_the_mask_beside_them_is_none(tmp_path):
    folder = tmp_path / "Schraube_größe"
    for i in range(12):
        write_image(folder / f"Teil {i} ß.png", random_pixels(8, 8, seed=i))
    write_image(folder / "judged.png", np.ones((8, 8), np.uint8))
    output = prepare(tmp_path, folder.name, mask="judged.png")
    assert {row["path"] for row in read_index(output)} == {f"Teil {i} ß.png" for i in range(12)}


@pytest.mark.exhaustive
def test_a_folder_of_good_images_is_all_that_the_pipeline_needs(tmp_path):
    project = Project(tmp_path / "project")
    folder = project.folder / "parts" / "Schraube_größe"
    rng = np.random.default_rng(0)
    for i in range(30):
        values = rng.normal(128, 8, (64, 64)).clip(0, 255).astype(np.uint8)
        write_image(folder / f"Teil {i} ß.png", values)
    judged = np.zeros((64, 64), np.uint8)
    judged[:60, 10:] = 1
    write_image(folder / "judged.png", judged)
    frame = {"crop": [4, 0, 64, 50], "resize": "fit", "mask": "judged.png"}
    project.change("data", categories=["Schraube_größe"], **frame)
    project.change("model", name="gaussian")
    project.change("training", num_epochs="auto")
    project.change("export", formats=["onnx", "openvino"])
    assert "Schraube_größe: layout folder" in project.dvc("repro")
    metrics = read_json(project.folder / "metrics/Schraube_größe/evaluate.json")
    assert metrics["num_normal"] == 4
    assert metrics["image_auroc"] is None
    assert metrics["undefined"]["image_auroc"] == "there are no defective images."
    assert metrics["calibration"]["num_images"] == 4
    assert metrics["synthetic"]["detection_by_size"][-1]["detection_rate"] > 0.5
    assert "Schraube_größe" in (project.folder / "report/index.html").read_text(encoding="utf-8")
    assert project.repro() == []


SOURCE = Path(elpv_dataset.__file__).parent / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def elpv(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "elpv"
    write_elpv(folder)
    return folder


def test_elpv_s_certain_cells_are_in_the_folders_of_their_labels(elpv):
    fields = (SOURCE / "labels.csv").read_text().split()
    rows = zip(fields[::3], fields[1::3], fields[2::3], strict=True)
    kinds = {(kind, Path(name).name): float(probability) for name, probability, kind in rows}
    there = {}
    for path in elpv.rglob("*.png"):
        category, _, kind = path.relative_to(elpv).parts[:3]
        there[category, path.name] = 0.0 if kind == "good" else 1.0
    assert there == {key: value for key, value in kinds.items() if value in (0.0, 1.0)}
    for path in sorted(elpv.rglob("*.png"))[::200]:
        assert path.read_bytes() == (SOURCE / "images" / path.name).read_bytes()
    item = MVTecDataset(elpv, "mono", "test")[0]
    assert item["image"].shape == (3, 300, 300)
    assert (item["defect_type"], item["label"]) == ("defective", 1)
    assert item["mask"].unique().tolist() == [255]


@pytest.mark.parametrize(
    ("category", "good", "defective"), [("mono", 588, 313), ("poly", 920, 402)]
)
def test_a_fifth_of_elpv_s_good_cells_is_drawn_for_the_test(elpv, category, good, defective):
    train, test, other = (
        contents(elpv / category / name) for name in ("train/good", "test/good", "test/defective")
    )
    assert (len(train), len(test), len(other)) == (good - good // 5, good // 5, defective)
    assert not set(train.values()) & {*test.values(), *other.values()}
    assert min(train) < max(test)
    assert min(test) < max(train)


def test_writing_elpv_again_gives_the_same_files_and_removes_others(tmp_path, elpv):
    folder = tmp_path / "elpv"
    for stale in (folder / "mono", tmp_path / ".elpv.partial"):
        stale.mkdir(parents=True)
        (stale / "stale.png").write_text("")
    write_elpv(folder)
    assert contents(folder) == contents(elpv)
    assert [path.name for path in tmp_path.iterdir()] == ["elpv"]


def test_the_images_of_elpv_that_the_docs_name_exist(elpv):
    root = Path(__file__).parent.parent
    text = "".join(x.read_text() for x in [root / "README.md", *(root / "docs").glob("*.md")])
    named = set(re.findall(r"data/elpv/(\S+?\.png)", text))
    assert named
    assert [name for name in named if not (elpv / name).is_file()] == []
