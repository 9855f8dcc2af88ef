"""Which images of a category fit, validate, calibrate and test, and whether they are enough."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from builders.images import prepare, random_pixels, write_category, write_image

from anomaly_detection.data import draw_folds, split_normal_images
from anomaly_detection.data.arrays import read_index
from anomaly_detection.data.calibration import (
    images_needed,
    require_calibration_images,
    round_up,
    too_few,
)
from anomaly_detection.data.groups import LISTED, parts_of
from anomaly_detection.data.sample import Sample
from anomaly_detection.errors import DataError
from anomaly_detection.evaluation.thresholds import ThresholdError, false_reject_threshold

TEN, FORTY = ([f"{i:x}" for i in range(number)] for number in (10, 40))


def test_each_split_gets_its_rounded_share():
    for number, validation, calibration, expected in (
        (20, 0.15, 0.15, {"fit": 14, "validation": 3, "calibration": 3}),
        (10, 0.1, 0.3, {"fit": 6, "validation": 1, "calibration": 3}),
        (7, 0.4, 0.2, {"fit": 3, "validation": 3, "calibration": 1}),  # 2.8 and 1.4
        (3, 0.33, 0.33, {"fit": 1, "validation": 1, "calibration": 1}),
    ):
        assert Counter(split_normal_images(FORTY[:number], validation, calibration, 0)) == expected


def test_images_of_one_part_share_a_split_and_count_once():
    copies = TEN * 3 + TEN[:1] * 50
    splits = split_normal_images(copies, 0.1, 0.3, 0)
    split_of = dict(zip(copies, splits, strict=True))
    assert splits == [split_of[part] for part in copies]
    assert Counter(split_of.values()) == {"fit": 6, "validation": 1, "calibration": 3}


def test_the_seed_alone_draws_the_splits_at_random():
    drawn = [split_normal_images(FORTY, 0.2, 0.2, seed) for seed in (*range(5), 3)]
    assert drawn[5] == drawn[3]
    assert len(set(map(tuple, drawn))) == 5
    assert drawn[0] not in (sorted(drawn[0]), sorted(drawn[0], reverse=True))
    # As in earlier versions, so that what was fitted then need not be fitted again.
    assert "".join(split[0] for split in split_normal_images(TEN, 0.2, 0.2, 0)) == "vfvfffcffc"


@pytest.mark.parametrize(
    ("parts", "fractions", "numbers"),
    [
        (TEN[:2], (0.15, 0.15), "got 2, 0 and 0 of 2 distinct"),
        (TEN[:1] * 100, (0.3, 0.3), "got 1, 0 and 0 of 1 distinct"),
        (TEN, (0.04, 0.3), "got 7, 0 and 3 of 10 distinct"),
        (TEN, (0.3, 0.04), "got 7, 3 and 0 of 10 distinct"),
        (TEN, (0.5, 0.49), "got 0, 5 and 5 of 10 distinct"),
        ([], (0.3, 0.3), "got 0, 0 and 0 of 0 distinct"),
    ],
)
def test_too_few_images_for_each_split_to_get_one_are_refused(parts, fractions, numbers):
    text = f"each of fit, validation and calibration must get an image, {numbers}"
    with pytest.raises(DataError, match=f"{text}.*data.validation_fraction"):
        split_normal_images(parts, *fractions, 0)


def test_folds_differ_by_at_most_one_part_and_keep_its_images_together():
    parts = [f"part {i}" for i in range(11)]
    images = parts + parts[:3] * 4
    folds = draw_folds(images, 4, 0)
    fold_of = dict(zip(images, folds, strict=True))
    assert [fold_of[part] for part in images] == folds
    assert sorted(Counter(fold_of.values()).values()) == [2, 3, 3, 3]
    assert draw_folds(images, 4, 0) == folds != draw_folds(images, 4, 1)
    with pytest.raises(DataError, match=r"folds must be at most the number .*, 3, got 4; add"):
        draw_folds(parts[:3] * 2, 4, 0)


# Which images show the same part.


def found_parts(names: str, contents: str, pattern: str | None = None, **groups) -> list[str]:
    """The parts of images of these names, those for the test ending in 9, and these contents."""
    folder = Path("part")
    samples = [
        Sample(folder / x, "test" if x.endswith("9") else "train", "good", group=groups.get(x, ""))
        for x in names.split()
    ]
    return parts_of(samples, list(contents), folder, pattern)


def test_parts_are_named_by_the_layout_or_else_a_pattern_or_else_the_content():
    assert found_parts("a.png b.png c.png", "xyx") == ["x", "y", "x"]
    for pattern in (r"(\w+)-\d", r"/(\w+)-", r"(?<=/)\w+(?=-\d)"):  # the first group, or all
        found = found_parts("good/a-1.png good/b-1.png good/a-2.png", "xyz", pattern)
        assert found == ["part a", "part b", "part a"]
    assert found_parts("a-1 b-1 odd", "xyz", r"(\w+)-", odd="a") == ["part a", "part b", "part a"]
    assert found_parts("a-1 b-1 odd", "xyz", odd="a") == ["x", "y", "part a"]


def test_parts_with_the_same_content_are_one():
    """However they are chained: a and b by x, b and c by y."""
    found = found_parts("a-1 b-1 b-2 c-1 d-1 c-2", "xxyyzu", r"(\w)-")
    assert len(set(found)) == 2
    assert [x == found[0] for x in found] == [True, True, True, True, False, True]


def test_a_test_image_does_not_join_parts_of_training_images():
    found = found_parts("a-1 b-1 a-9 b-9", "xyzz", r"(\w)-")
    assert found[:2] == ["part a", "part b"]
    assert found[2] == found[3]


def test_names_that_do_not_match_are_listed():
    names = [f"{i:02}.png" for i in range(LISTED + 3)]
    with pytest.raises(DataError) as error:
        found_parts(" ".join([*names, "a-1.png"]), "x" * (LISTED + 4), r"(\w+)-")
    *lines, last = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"part/{name}" for name in names[:LISTED]]
    assert lines[0].startswith(r"part/00.png: must match data.group '(\w+)-', so that its part")
    assert last == "... and 3 more images."
    with pytest.raises(DataError, match=r"b.png: must match data.group"):
        found_parts("a.png b.png", "xy", "(a)?.png")  # this group takes no part in the match


PARTS = {"image_size": 32, "validation_fraction": 0.2, "calibration_fraction": 0.2}
BY_NUMBER = {**PARTS, "group": r"(\d+)_"}


@pytest.fixture
def twenty(tmp_path) -> Path:
    """The folder of a category with three images of each of twenty parts."""
    for i in range(60):
        write_image(tmp_path / "part" / f"{i // 3:02}_{i % 3}.png", random_pixels(32, 32, seed=i))
    return tmp_path


def splits_by_part(rows: list[dict[str, str]]) -> dict[str, set[str]]:
    found = defaultdict(set)
    for row in rows:
        found[row["path"].split("_")[0]].add(row["split"])
    return found


def test_no_split_has_images_of_another_s_parts_not_even_the_drawn_test(twenty):
    apart = splits_by_part(read_index(prepare(twenty, "part", **PARTS)))
    assert max(map(len, apart.values())) > 1
    rows = read_index(prepare(twenty, "part", **BY_NUMBER))
    splits = list(splits_by_part(rows).values())
    assert {len(each) for each in splits} == {1}
    counts = Counter(name for each in splits for name in each)
    assert counts == {"fit": 9, "validation": 4, "calibration": 4, "test": 3}  # parts
    assert {row["part"] for row in rows} == {f"part {i:02}" for i in range(20)}


def test_the_table_s_column_does_the_same(twenty):
    by_name = read_index(prepare(twenty, "part", **BY_NUMBER))
    paths = sorted(path.name for path in (twenty / "part").iterdir())
    lines = ["path,label,group", *(f"{name},normal,{name[:2]}" for name in paths)]
    (twenty / "part" / "samples.csv").write_text("\n".join(lines))
    assert read_index(prepare(twenty, "part", **PARTS)) == by_name


def test_test_images_that_match_nothing_are_listed_too(tmp_path):
    write_category(tmp_path / "part", num_train=8, num_test=1)
    with pytest.raises(DataError, match=r"test/dark/000.png: must match data.group") as error:
        prepare(tmp_path, "part", **PARTS, group="good/(.*)")
    assert len(str(error.value).splitlines()) == 2
    assert not (tmp_path / "prepared" / "part").exists()


# How many a threshold needs, and what an error says would do.

DEFAULTS = {"validation_fraction": 0.15, "calibration_fraction": 0.15, "test_fraction": 0.0}


def refusal(num_normal: int, method: str = "split") -> str:
    with pytest.raises(DataError) as error:
        require_calibration_images(num_normal, **DEFAULTS, rate=0.05, method=method)
    return str(error.value)


def test_the_rule_is_that_of_the_threshold():
    for rate, needed in {0.5: 1, 0.25: 3, 0.05: 19, 0.01: 99, 0.3: 3}.items():
        assert images_needed(rate) == needed
        false_reject_threshold(range(needed), rate)
        if needed > 1:
            with pytest.raises(ThresholdError, match=re.escape(too_few(rate, needed - 1))):
                false_reject_threshold(range(needed - 1), rate)


def test_a_hundred_images_are_told_what_would_do():
    assert refusal(100) == (
        "evaluation.false_reject_rate 0.05 needs at least 19 calibration images, got 15 of 100 "
        "normal images; 127 normal images would do, or set evaluation.false_reject_rate to 0.0625, "
        "or data.calibration_fraction to 0.19, or evaluation.calibration to cross, where 85 images "
        "calibrate."
    )


@pytest.mark.parametrize("test_fraction", [0.0, 0.15])
@pytest.mark.parametrize("method", ["split", "cross"])
@pytest.mark.parametrize("rate", [0.3, 0.05, 0.01, 0.003])
@pytest.mark.parametrize("num_normal", [10, 23, 60, 100, 126])
def test_whatever_the_message_offers_would_do(num_normal, rate, method, test_fraction):
    given = {**DEFAULTS, "rate": rate, "method": method, "test_fraction": test_fraction}
    try:
        require_calibration_images(num_normal, **given)
        return
    except DataError as error:
        text = str(error)
    offers = [{"rate": float(re.search(r"false_reject_rate to ([\d.]+\d)", text)[1])}]
    if found := re.search(r"calibration_fraction to ([\d.]+\d)", text):
        offers.append({"calibration_fraction": float(found[1])})
    if "evaluation.calibration to cross" in text:
        offers.append({"method": "cross"})
    for offer in offers:
        require_calibration_images(num_normal, **given | offer)
    images = int(re.search(r"(\d+) normal images would do", text)[1])
    require_calibration_images(images, **given)
    assert images > num_normal


def test_what_would_not_do_is_not_offered():
    assert not re.search("cross|fraction", refusal(21))  # 3 of them validate
    assert "fraction" not in refusal(21, "cross")


def test_numbers_are_rounded_up():
    two, three = {0.19: 0.19, 0.1901: 0.2, 2.0: 2.0}, {1 / 16: 0.0625, 1 / 12: 0.0834}
    for digits, numbers in {2: two, 3: three}.items():
        assert [round_up(value, digits) for value in numbers] == list(numbers.values())


def test_parts_count_where_images_would_be_too_few_to_calibrate_with(twenty):
    prepare(twenty, "part", **PARTS, false_reject_rate=0.1)
    with pytest.raises(DataError, match=r"at least 9 calibration parts, got 4 of 20 normal parts"):
        prepare(twenty, "part", **BY_NUMBER, false_reject_rate=0.1)


def test_identical_images_count_once_and_nothing_is_decoded(tmp_path):
    category = write_category(tmp_path / "part", num_train=20, num_test=1)
    prepare(tmp_path, "part", false_reject_rate=0.25)
    for path in sorted((category / "train/good").iterdir())[14:]:
        path.write_bytes((category / "train/good/000.png").read_bytes())
    (category / "test/dark/000.png").write_text("no image")
    with pytest.raises(DataError, match=r"part: .* needs at least 3 .*, got 2 of 14 normal images"):
        prepare(tmp_path, "part", false_reject_rate=0.25)
