import hashlib
import re
from pathlib import Path

import elpv_dataset
import pytest

from anomaly_detection.data import MVTecDataset
from anomaly_detection.data.elpv import write_elpv

SOURCE = Path(elpv_dataset.__file__).parent / "data"


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "elpv"
    write_elpv(folder)
    return folder


@pytest.fixture(scope="module")
def probabilities() -> dict[tuple[str, str], float]:
    """Defect probability by cell type and file name."""
    fields = (SOURCE / "labels.csv").read_text().split()
    return {
        (kind, Path(name).name): float(probability)
        for name, probability, kind in zip(fields[::3], fields[1::3], fields[2::3], strict=True)
    }


@pytest.mark.parametrize(
    ("category", "good", "defective"), [("mono", 588, 313), ("poly", 920, 402)]
)
def test_four_fifths_of_the_good_cells_are_for_training(written, category, good, defective):
    assert len(list((written / category / "test/good").iterdir())) == good // 5
    assert len(list((written / category / "train/good").iterdir())) == good - good // 5
    assert len(list((written / category / "test/defective").iterdir())) == defective


def test_folders_follow_the_labels_of_the_package(written, probabilities):
    certain = {key for key, probability in probabilities.items() if probability in (0.0, 1.0)}
    there = set()
    for path in written.rglob("*.png"):
        category, _, kind = path.relative_to(written).parts[:3]
        assert probabilities[category, path.name] == (0.0 if kind == "good" else 1.0)
        there.add((category, path.name))
    assert there == certain


def test_images_are_those_of_the_package(written):
    for path in sorted(written.rglob("*.png"))[::200]:
        assert path.read_bytes() == (SOURCE / "images" / path.name).read_bytes()


@pytest.mark.parametrize("category", ["mono", "poly"])
def test_no_image_is_in_both_train_and_test(written, category):
    train = set(contents(written / category / "train").values())
    test = set(contents(written / category / "test").values())
    assert not train & test


def test_test_images_are_drawn_and_not_the_first_ones(written):
    train = {path.name for path in (written / "mono/train/good").iterdir()}
    test = {path.name for path in (written / "mono/test/good").iterdir()}
    assert min(train) < max(test)
    assert min(test) < max(train)


def test_writing_again_gives_the_same_files_and_removes_others(tmp_path, written):
    folder = tmp_path / "elpv"
    (folder / "mono").mkdir(parents=True)
    (folder / "mono" / "stale.png").write_text("")
    (tmp_path / ".elpv.partial").mkdir()
    (tmp_path / ".elpv.partial" / "stale.png").write_text("")
    write_elpv(folder)
    assert contents(folder) == contents(written)
    assert [path.name for path in tmp_path.iterdir()] == ["elpv"]


def test_categories_can_be_read_as_data_sets(written):
    dataset = MVTecDataset(written, "mono", "test")
    item = dataset[0]
    assert (item["image"].shape, item["defect_type"], item["label"]) == (
        (3, 300, 300),
        "defective",
        1,
    )
    assert item["mask"].unique().tolist() == [255]


def test_the_pictures_that_the_docs_name_exist(written):
    root = Path(__file__).parent.parent
    text = "".join(x.read_text() for x in [root / "README.md", *(root / "docs").glob("*.md")])
    named = set(re.findall(r"data/elpv/(\S+?\.png)", text))
    assert named
    assert [name for name in named if not (written / name).is_file()] == []
