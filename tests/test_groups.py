"""Several pictures of one part stay together: `data.group`, or the table's column."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from builders.images import write_category, write_image

from anomaly_detection.data import draw_folds, prepare_category, split_normal_images
from anomaly_detection.data.arrays import read_index
from anomaly_detection.data.groups import LISTED, parts_of
from anomaly_detection.data.sample import Sample
from anomaly_detection.errors import DataError

ROOT = Path("part")
OPTIONS = {
    "image_size": 32,
    "bit_depth": 16,
    "validation_fraction": 0.2,
    "calibration_fraction": 0.2,
    "seed": 0,
}


def samples(*names: str, groups: dict[str, str] | None = None) -> list[Sample]:
    groups = groups or {}
    return [Sample(ROOT / x, "train", "good", group=groups.get(x, "")) for x in names]


def test_without_groups_a_part_is_a_content():
    assert parts_of(samples("a.png", "b.png", "c.png"), ["x", "y", "x"], ROOT) == ["x", "y", "x"]


@pytest.mark.parametrize("pattern", [r"(\w+)-\d", r"/(\w+)-", r"(?<=/)\w+(?=-\d)"])
def test_a_pattern_names_the_part_by_its_first_group_or_by_all_that_it_matches(pattern):
    given = samples("good/a-1.png", "good/b-1.png", "good/a-2.png")
    assert parts_of(given, ["x", "y", "z"], ROOT, pattern) == ["part a", "part b", "part a"]


def test_a_name_that_the_layout_gives_comes_first():
    given = samples("a-1.png", "b-1.png", "odd.png", groups={"odd.png": "a"})
    assert parts_of(given, ["x", "y", "z"], ROOT, r"(\w+)-") == ["part a", "part b", "part a"]
    assert parts_of(given, ["x", "y", "z"], ROOT) == ["x", "y", "part a"]


def test_parts_with_the_same_content_are_one():
    """However they are chained: a and b by x, b and c by y."""
    names = ("a-1", "b-1", "b-2", "c-1", "d-1", "c-2")
    found = parts_of(samples(*names), ["x", "x", "y", "y", "z", "u"], ROOT, r"(\w)-")
    assert len(set(found)) == 2
    assert [x == found[0] for x in found] == [True, True, True, True, False, True]


def test_a_test_image_does_not_join_parts_of_training_images():
    train = samples("a-1", "b-1")
    test = [Sample(ROOT / name, "test", "good") for name in ("a-9", "b-9")]
    found = parts_of([*train, *test], ["x", "y", "z", "z"], ROOT, r"(\w)-")
    assert found[:2] == ["part a", "part b"]
    assert found[2] == found[3]


def test_names_that_do_not_match_are_listed():
    given = samples(*(f"{i:02}.png" for i in range(LISTED + 3)), "a-1.png")
    with pytest.raises(DataError) as error:
        parts_of(given, [x.path.name for x in given], ROOT, r"(\w+)-")
    *lines, last = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"part/{i:02}.png" for i in range(LISTED)]
    assert lines[0].startswith(r"part/00.png: must match data.group '(\w+)-', so that its part")
    assert last == "... and 3 more images."


def test_a_group_that_takes_no_part_in_the_match_names_nothing():
    with pytest.raises(DataError, match=r"b.png: must match data.group"):
        parts_of(samples("a.png", "b.png"), ["x", "y"], ROOT, "(a)?.png")


def write_parts(folder: Path, num_parts: int = 20, per_part: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for part in range(num_parts):
        for light in range(per_part):
            values = rng.integers(0, 256, (32, 32), np.uint8)
            write_image(folder / f"{part:02}_{light}.png", values)
    return folder


def splits_by_part(output: Path) -> dict[str, set[str]]:
    found = defaultdict(set)
    for row in read_index(output):
        found[row["path"].split("_")[0]].add(row["split"])
    return found


def test_no_split_has_pictures_of_another_s_parts_not_even_the_drawn_test(tmp_path):
    write_parts(tmp_path / "part")
    prepare_category(tmp_path, "part", tmp_path / "apart", **OPTIONS)
    assert max(map(len, splits_by_part(tmp_path / "apart").values())) > 1
    prepare_category(tmp_path, "part", tmp_path / "out", **OPTIONS, group=r"(\d+)_")
    found = splits_by_part(tmp_path / "out")
    assert {len(splits) for splits in found.values()} == {1}
    counts = [sum(x == {split} for x in found.values()) for split in ("validation", "test", "fit")]
    assert counts == [4, 3, 9]  # parts
    rows = read_index(tmp_path / "out")
    assert {row["part"] for row in rows} == {f"part {i:02}" for i in range(20)}


def test_the_table_s_column_does_the_same(tmp_path):
    folder = write_parts(tmp_path / "part")
    paths = sorted(path.name for path in folder.iterdir())
    lines = [f"{name},normal,{name[:2]}" for name in paths]
    (folder / "samples.csv").write_text("\n".join(["path,label,group", *lines]))
    prepare_category(tmp_path, "part", tmp_path / "table", **OPTIONS)
    prepare_category(tmp_path, "part", tmp_path / "names", **OPTIONS, group=r"(\d+)_")
    assert read_index(tmp_path / "table") == read_index(tmp_path / "names")


def test_parts_count_where_images_would_be_too_few_to_calibrate_with(tmp_path):
    write_parts(tmp_path / "part")
    prepare_category(tmp_path, "part", tmp_path / "out", **OPTIONS, false_reject_rate=0.1)
    given = {**OPTIONS, "false_reject_rate": 0.1, "group": r"(\d+)_"}
    with pytest.raises(DataError, match=r"at least 9 calibration parts, got 4 of 20 normal parts"):
        prepare_category(tmp_path, "part", tmp_path / "out", **given)


def test_test_images_that_match_nothing_are_listed_too(tmp_path):
    write_category(tmp_path / "part", num_train=8, num_test=1)
    with pytest.raises(DataError, match=r"test/dark/000.png: must match data.group") as error:
        prepare_category(tmp_path, "part", tmp_path / "out", **OPTIONS, group="good/(.*)")
    assert len(str(error.value).splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_folds_keep_parts_together_and_splits_without_groups_are_as_before():
    parts = [f"part {i // 3}" for i in range(30)]
    folds = draw_folds(parts, 4, 0)
    assert all(len({folds[3 * i + k] for k in range(3)}) == 1 for i in range(10))
    drawn = split_normal_images([f"{i:x}" for i in range(10)], 0.2, 0.2, 0)
    assert "".join(split[0] for split in drawn) == "vfvfffcffc"
