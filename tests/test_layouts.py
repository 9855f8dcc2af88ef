"""The layouts that data sets have: what is found in each, and what is wrong with it."""

from collections import Counter

import numpy as np
import pytest
from builders.images import write_category, write_image
from builders.projects import Project, read_json

from anomaly_detection.data import available_categories, prepare_category, scan_category
from anomaly_detection.data.arrays import read_index
from anomaly_detection.errors import DataError

GREY = np.full((8, 8), 90, np.uint8)


def write_btad(root):
    folder = root / "01"
    for i in range(3):
        write_image(folder / "train" / "ok" / f"{i}.bmp", GREY)
    write_image(folder / "test" / "ok" / "0.bmp", GREY)
    write_image(folder / "test" / "ko" / "0.bmp", GREY)
    write_image(folder / "ground_truth" / "ko" / "0.png", GREY)
    return folder


def write_visa(root):
    images = "candle/Data/Images"
    rows = [
        ("candle", "train", "normal", f"{images}/Normal/1.JPG", ""),
        ("candle", "train", "normal", f"{images}/Normal/0.JPG", ""),
        ("candle", "test", "normal", f"{images}/Normal/2.JPG", ""),
        ("candle", "test", "anomaly", f"{images}/Anomaly/0.JPG", "candle/Data/Masks/Anomaly/0.png"),
        ("capsules", "train", "normal", "capsules/Data/Images/Normal/0.JPG", ""),
    ]
    for row in rows[:4]:
        for name in filter(None, row[3:]):
            write_image(root / name, GREY)
    write_split(root, rows)
    return root / "candle"


def write_split(root, rows):
    lines = [",".join(row) for row in [("object", "split", "label", "image", "mask"), *rows]]
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines))


def write_table(root, *lines, heads="path,label,split,mask,defect_type", encoding="utf-8"):
    folder = root / "part"
    for name in ("good one.png", "gut/größe.png", "test/a.png", "b.png", "b mask.png", "c.tif"):
        write_image(folder / name, GREY)
    lines = lines or (
        "good one.png,normal,,,",
        "gut/größe.png,0,train,,good",
        "test/a.png,0,test,,",
        "b.png,anomalous,,b mask.png,scratch",
        "c.tif,1,test,,",
    )
    (folder / "samples.csv").write_text("\n".join([heads, *lines]), encoding=encoding)
    return folder


def write_folder(root, count=3):
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        write_image(root / "part" / f"{i}.png", values)
    return root / "part"


def found(folder, layout="auto"):
    """The layout, and a line for each sample; there are no findings."""
    name, samples, findings = scan_category(folder.parent, folder.name, layout)
    assert not findings
    lines = []
    for sample in samples:
        mask = sample.mask_path and sample.mask_path.relative_to(folder).as_posix()
        where = sample.path.relative_to(folder).as_posix()
        lines.append((sample.split, sample.defect_type, where, mask))
    return name, lines


def findings_of(folder, layout="auto"):
    return scan_category(folder.parent, folder.name, layout)[2]


def test_btad_has_other_names(tmp_path):
    assert found(write_btad(tmp_path)) == (
        "btad",
        [
            ("train", "good", "train/ok/0.bmp", None),
            ("train", "good", "train/ok/1.bmp", None),
            ("train", "good", "train/ok/2.bmp", None),
            ("test", "ko", "test/ko/0.bmp", "ground_truth/ko/0.png"),
            ("test", "good", "test/ok/0.bmp", None),
        ],
    )


def test_visa_is_divided_by_its_own_file(tmp_path):
    assert found(write_visa(tmp_path)) == (
        "visa",
        [
            ("train", "good", "Data/Images/Normal/0.JPG", None),
            ("train", "good", "Data/Images/Normal/1.JPG", None),
            ("test", "defective", "Data/Images/Anomaly/0.JPG", "Data/Masks/Anomaly/0.png"),
            ("test", "good", "Data/Images/Normal/2.JPG", None),
        ],
    )


def test_a_table_names_images_anywhere_below_it(tmp_path):
    assert found(write_table(tmp_path)) == (
        "csv",
        [
            ("train", "good", "good one.png", None),
            ("train", "good", "gut/größe.png", None),
            ("test", "scratch", "b.png", "b mask.png"),
            ("test", "defective", "c.tif", None),
            ("test", "good", "test/a.png", None),
        ],
    )


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_may_come_from_a_spreadsheet(tmp_path, separator):
    lines = separator.join(("good one.png", "normal")), separator.join(("b.png", "1"))
    heads = separator.join(("path", "label"))
    folder = write_table(tmp_path, *lines, heads=heads, encoding="utf-8-sig")
    assert [row[:3] for row in found(folder)[1]] == [
        ("train", "good", "good one.png"),
        ("test", "defective", "b.png"),
    ]


def test_a_folder_of_images_is_all_normal(tmp_path):
    folder = write_folder(tmp_path)
    assert found(folder) == ("folder", [("train", "good", f"{i}.png", None) for i in range(3)])


def test_a_folder_with_folders_could_hold_defects_and_is_not_taken_for_normal(tmp_path):
    folder = write_folder(tmp_path)
    write_image(folder / "bad" / "0.png", GREY)
    assert findings_of(folder) == [
        f"{folder / 'bad'}: there must be no folder here; move or remove it."
    ]
    for path in folder.glob("*.png"):
        path.unlink()
    assert available_categories(tmp_path) == []


@pytest.mark.parametrize(
    ("write", "layout"),
    [
        (lambda root: write_category(root / "part", num_train=1), "mvtec"),
        (write_btad, "btad"),
        (write_visa, "visa"),
        (write_table, "csv"),
        (write_folder, "folder"),
    ],
)
def test_auto_takes_the_layout_that_is_there(tmp_path, write, layout):
    folder = write(tmp_path)
    assert found(folder, layout) == found(folder)
    assert found(folder)[0] == layout
    assert available_categories(tmp_path) == [folder.name]
    other = "visa" if layout != "visa" else "mvtec"
    assert available_categories(tmp_path, other) == []
    with pytest.raises(DataError, match=rf"must have images to train with: .* \({other}\); got "):
        scan_category(tmp_path, folder.name, other)


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
    split.unlink()
    (line,) = findings_of(folder)
    assert line.startswith(f"{split}: must be there")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (("candle", "train", "anomaly", "0.JPG", ""), "training is on normal images only"),
        (
            ("candle", "test", "Normal", "0.JPG", ""),
            "label must be normal or anomaly, got",
        ),
        (("candle", "Train", "normal", "0.JPG", ""), "split must be train or test, got 'Train'"),
        (("candle", "test", "normal", "other/0.JPG", ""), "paths must lead to files in "),
        (("candle", "test", "normal"), "paths must lead to files in "),
        (("other", "test", "normal", "other/0.JPG", ""), "must name images, but has no rows for"),
    ],
)
def test_a_row_of_visa_that_breaks_a_rule_is_named(tmp_path, row, text):
    folder = write_visa(tmp_path)
    write_split(tmp_path, [row])
    first = findings_of(folder)[0]
    assert first.startswith(str(tmp_path / "split_csv/1cls.csv"))
    assert text in first


def test_images_beside_the_folders_of_mvtec_s_layout_are_named(tmp_path):
    folder = write_category(tmp_path / "part", size=32, num_train=1, num_test=1)
    for name in ("loose.png", "train/loose.png", "test/loose.png"):
        write_image(folder / name, GREY)
    (folder / "test" / "good").rename(folder / "test" / "OK")
    *loose, name = findings_of(folder)
    assert [line.split(": ")[0] for line in loose] == [
        str(folder / name) for name in ("loose.png", "train/loose.png", "test/loose.png")
    ]
    assert name.startswith(f"{folder / 'test/OK'}: must be good for normal images")


def test_a_table_goes_before_folders(tmp_path):
    folder = write_category(tmp_path / "part", size=32, num_train=1, num_test=1)
    (folder / "samples.csv").write_text("path,label\ntrain/good/000.png,normal")
    assert found(folder) == ("csv", [("train", "good", "train/good/000.png", None)])


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


@pytest.mark.parametrize(
    ("heads", "text"),
    [
        (
            "file,label",
            "columns must be path, label, and may be split, defect_type, mask, group, got",
        ),
        ("path, label,colour", "got path, label, colour."),
        ("path", "got path."),
        ("path,label,label", "columns must differ, got path, label, label."),
    ],
)
def test_a_table_without_its_columns_is_refused(tmp_path, heads, text):
    folder = write_table(tmp_path, "b.png,0", heads=heads)
    (line,) = findings_of(folder)
    assert line.startswith(f"{folder / 'samples.csv'}: {text}" if " must " in text else str(folder))
    assert text in line


def test_a_table_of_another_encoding_is_refused(tmp_path):
    folder = write_table(tmp_path, "größe.png,0", heads="path,label", encoding="latin-1")
    (line,) = findings_of(folder)
    assert line == f"{folder / 'samples.csv'}: must be encoded in UTF-8; save it again as that."


def test_cells_beyond_the_columns_are_refused(tmp_path):
    folder = write_table(
        tmp_path, "b.png,1,test,scratch, deep", heads="path,label,split,defect_type"
    )
    (line,) = findings_of(folder)
    assert line == f"{folder / 'samples.csv'}: line 2: must have 4 cells at most, got 5."


def test_lines_are_counted_as_in_an_editor(tmp_path):
    folder = write_table(tmp_path, "", 'b.png,1,test,,"a\n\u2028b"', "", "c.tif,?,,,")
    samples = scan_category(tmp_path, "part")[1]
    assert [sample.defect_type for sample in samples] == ["a\n\u2028b"]
    (line,) = findings_of(folder)
    assert line.startswith(f"{folder / 'samples.csv'}, line 6: label")


def test_a_table_without_rows_is_refused(tmp_path):
    folder = write_table(tmp_path, "", heads="path,label")
    assert findings_of(folder) == [
        f"{folder / 'samples.csv'}: must name images, but has no rows for them."
    ]


def splits_of(root, name, output, **options):
    fractions = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "seed": 0}
    size = {"image_size": 8, "bit_depth": 16}
    layout = prepare_category(root, name, output, **size, **fractions, **options)
    return layout, Counter((row["split"], row["defect_type"]) for row in read_index(output))


def test_without_a_normal_test_image_some_are_drawn(tmp_path):
    write_folder(tmp_path, 20)
    layout, counts = splits_of(tmp_path, "part", tmp_path / "out", test_fraction=0.1)
    assert layout == "folder"
    assert counts == {
        ("fit", "good"): 10,
        ("validation", "good"): 4,
        ("calibration", "good"): 4,
        ("test", "good"): 2,
    }


def test_defects_in_the_test_do_not_keep_normal_images_from_being_drawn(tmp_path):
    folder = write_folder(tmp_path, 20)
    lines = [f"{i}.png,{int(i > 17)}" for i in range(20)]
    (folder / "samples.csv").write_text("\n".join(["path,label", *lines]))
    layout, counts = splits_of(tmp_path, "part", tmp_path / "out", test_fraction=0.1)
    assert layout == "csv"
    assert counts[("test", "defective")] == 2
    assert counts[("test", "good")] == 2


def test_a_normal_test_image_keeps_all_others_for_training(tmp_path):
    write_category(tmp_path / "part", size=32, num_train=20, num_test=1)
    _, counts = splits_of(tmp_path, "part", tmp_path / "out", test_fraction=0.5)
    assert counts[("test", "good")] == 1
    assert counts[("fit", "good")] == 12


def test_too_few_images_to_draw_from_are_an_error_that_names_the_fractions(tmp_path):
    write_folder(tmp_path, 3)
    with pytest.raises(DataError) as error:
        splits_of(tmp_path, "part", tmp_path / "out", test_fraction=0.1)
    assert "each of fit, validation, calibration and test must get an image" in str(error.value)
    assert "data.test_fraction" in str(error.value)


@pytest.mark.slow
def test_a_folder_of_good_images_is_all_that_the_pipeline_needs(tmp_path):
    project = Project(tmp_path / "project")
    rng = np.random.default_rng(0)
    for i in range(30):
        values = rng.normal(128, 8, (64, 64)).clip(0, 255).astype(np.uint8)
        write_image(project.folder / "parts" / "Schraube_größe" / f"Teil {i} ß.png", values)
    judged = np.zeros((64, 64), np.uint8)
    judged[:60, 10:] = 1
    write_image(project.folder / "parts" / "Schraube_größe" / "judged.png", judged)
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
