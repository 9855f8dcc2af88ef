"""What the report says of a run in words: what next, what has changed, where it comes from."""

import re
import shlex
import subprocess

import pytest
from builders.projects import ROOT
from builders.reports import DATA, category, metrics, training
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from anomaly_detection.config import load_config
from anomaly_detection.evaluation.thresholds import (
    false_reject_bounds,
    false_reject_threshold,
    images_needed,
)
from anomaly_detection.report import DifferentTestImages, advice_lines, next_steps, trends
from anomaly_detection.report.advice import (
    RULES,
    another_model,
    bright_border,
    faults,
    few_calibration_images,
    near_duplicates,
    small_defects,
    train_longer,
)
from stages import provenance, report


def of(**changes) -> dict:
    """A category with these metrics."""
    return category(metrics=metrics(**changes))


def fit(losses, best=None, **parameters) -> dict:
    history = [{"epoch": i, "val_loss": loss} for i, loss in enumerate(losses, 1)]
    parameters = parameters or {"training": {"seed": 0, "num_epochs": len(losses)}}
    best = best or len(losses)
    return category(training=training(history=history, best_epoch=best, parameters=parameters))


@pytest.mark.parametrize(
    ("losses", "best", "advised"),
    [
        ([3, 2, 1.5, 1.2, 1.11, 1.07], None, True),  # 1.2 to 1.07: over a tenth over two epochs
        ([3, 2, 1.5, 1.2, 1.11, 1.09], None, False),
        ([3, 2, 1.5, 1.2, 1.0, 1.01], 5, False),  # the last was not the best
        ([2, 1], None, True),
        ([1], None, False),  # nothing to fall from
        ([-2, -3], None, False),  # no share of it is defined
        ([], None, False),
    ],
)
def test_a_loss_that_was_best_and_falling_at_the_end_asks_for_longer_training(
    losses, best, advised
):
    assert (train_longer(fit(losses, best)) is not None) == advised


def test_training_longer_doubles_what_the_model_counts_in():
    for parameters, option in (
        ({"model": {"name": "x"}, "training": {"num_epochs": 2}}, "training.num_epochs=4"),
        ({"training": {"seed": 0}, "x": {"num_steps": 2000}}, "x.num_steps=4000"),
    ):
        advice = train_longer(fit([2, 1], **parameters))
        assert advice.command == f"dvc exp run -S {option}"
        assert "The last epoch, 2, was the best" in advice.reason
        assert "from 2 to 1 over the last epoch." in advice.reason
    assert train_longer(fit([2, 1], training={"seed": 0})) is None


def with_near(split: str, images: int) -> dict:
    near = DATA["num_near_duplicates"] | {split: {"pairs": 9, "images": images}}
    number = {"test": 50, "calibration": 50, "validation": 50}
    return DATA | {"num_images": number, "num_near_duplicates": near}


@pytest.mark.parametrize(
    ("split", "consequence", "command"),
    [
        ("test", "metrics may be optimistic", "make repro"),  # groups move no test image
        ("calibration", "threshold may be too low", "data.group"),
    ],
)
def test_a_tenth_of_near_duplicates_asks_to_keep_parts_together(split, consequence, command):
    assert near_duplicates(of(data=with_near(split, 4))) is None
    advice = near_duplicates(of(data=with_near(split, 5)))
    assert f"5 of 50 {split} images (10 %) have near-duplicates" in advice.reason
    assert consequence in advice.reason
    assert command in advice.command
    assert near_duplicates(of(data=with_near("validation", 50))) is None


def calibrated(number: int, rate: float | None = 0.05, method: str = "split") -> dict:
    threshold = false_reject_threshold(range(number), rate) if rate else 0.5
    return {
        "method": method,
        "num_images": number,
        "requested_rate": rate,
        "false_reject_rate": false_reject_bounds(range(number), threshold),
    }


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
def test_calibration_images_are_few_until_there_are_enough(rate):
    enough = round(3 / rate)
    for number in {images_needed(rate), enough - 1, enough, 2 * enough}:
        advice = few_calibration_images(of(calibration=calibrated(number, rate)))
        assert (advice is not None) == (number < enough)


def test_few_calibration_images_are_named_with_what_they_bound():
    assert few_calibration_images(of(calibration=calibrated(19, rate=None))) is None
    advice = few_calibration_images(of(calibration=calibrated(19)))
    assert "19 calibration images are few for 5 % false rejects" in advice.reason
    assert "up to 14.6 % (95 %)" in advice.reason
    assert advice.command == "dvc exp run -S evaluation.calibration=cross"
    crossed = few_calibration_images(of(calibration=calibrated(19, method="cross")))
    assert crossed.command == "make repro"


@pytest.mark.parametrize(
    ("at_border", "num_images", "low", "advised"),
    [
        (10, 20, 0.27, True),
        (9, 20, 0.27, False),
        (1, 2, 0.01, False),  # may be chance
        (0, 0, 0.0, False),
    ],
)
def test_maps_that_are_mostly_highest_at_the_border_ask_for_a_crop(
    at_border, num_images, low, advised
):
    peaks = {"at_border": at_border, "num_images": num_images, "low": low, "area": 0.234}
    assert (bright_border(category(peaks=peaks)) is not None) == advised
    assert bright_border(category(peaks=None)) is None


def synthetic(size: float | None) -> dict:
    return {"num_images": 32, "size_detected_in_90_percent": size}


@pytest.mark.parametrize(
    ("image", "size", "advised"),
    [
        (512, 0.051, True),
        (512, None, True),
        (511, 0.3, False),  # hardly shrunk
        (512, 0.05, False),
    ],
)
def test_small_defects_that_are_missed_on_shrunk_images_ask_for_tiles(image, size, advised):
    known, sides = metrics(synthetic=synthetic(size)), {"image": image, "seen": 256}
    advice = small_defects(category(metrics=known, sides=sides))
    assert (advice is not None) == advised
    if advice:
        assert advice.command == "dvc exp run -S data.tile_size=256 -S data.tile_overlap=32"
        assert "Of 512 pixels along a side, the model sees 256" in advice.reason
    assert small_defects(category(metrics=known, sides=None)) is None  # tiled already
    assert small_defects(category(sides=sides)) is None  # not measured


def selection(chosen: int = 1, **changes) -> dict:
    values = {"strides": [8, 16], "top_fraction": 0.01}
    return {
        "content": {"fit": "f", "validation": "v"},
        "default": 0,
        "chosen": chosen,
        "candidates": [
            values | {"model": "stfpm", "worst": 0.8, "override": {}},
            values
            | {"model": "gaussian", "worst": 0.9, "override": {"model": {"name": "gaussian"}}},
        ],
    } | changes


def of_images(size: float | None, **changes) -> dict:
    data = DATA | {"content": {"test": "t", "fit": "f", "validation": "v"}}
    return category(metrics=metrics(synthetic=synthetic(size), data=data), **changes)


def test_a_model_that_is_better_on_synthetic_defects_is_named_with_an_override_to_paste(tmp_path):
    advice = another_model(of_images(0.01), selection())
    assert "gaussian (strides 8+16, top_fraction 0.01) is better than stfpm" in advice.reason
    assert "0.900 instead of 0.800" in advice.reason
    block = advice.command.removesuffix("make repro")
    assert YAML(typ="safe").load(block) == {"overrides": {"bolt": {"model": {"name": "gaussian"}}}}
    params = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text().replace("mono", "bolt")
    params.write_text(re.sub("^overrides:.*", block, text, flags=re.MULTILINE))
    assert load_config(params).for_category("bolt")[0] == "gaussian"


def test_nothing_is_advised_where_the_comparison_keeps_the_model_or_its_choice_is_in_use():
    assert another_model(of_images(None), selection(chosen=0)) is None
    in_use = training(model="gaussian", parameters={"model": {"name": "gaussian"}})
    assert another_model(of_images(None, training=in_use), selection()) is None
    automatic = selection()
    automatic["candidates"][1]["override"]["training"] = {"num_epochs": "auto"}
    assert another_model(of_images(None, training=in_use), automatic) is None


@pytest.mark.parametrize(
    "stale",
    [
        None,
        selection(content={"fit": "other", "validation": "v"}),
        selection(candidates=[x | {"model": "y"} for x in selection()["candidates"]]),
    ],
    ids=["none", "of other images", "of other models"],
)
def test_without_a_comparison_of_this_model_on_these_images_a_late_detection_asks_for_one(stale):
    assert another_model(of_images(0.12), stale) is None
    advice = another_model(of_images(0.121), stale)
    assert advice.command == "python -m tools.select bolt"
    assert "only at 12.1 % of the image's side or larger" in advice.reason
    assert "even at the largest size" in another_model(of_images(None), stale).reason


def test_defective_test_images_say_only_that_a_result_is_poor():
    assert list(faults(of(miss_rate=0.3))) == []
    poor = of(calibration=calibrated(60), miss_rate=0.6, num_misses=3)
    assert next_steps(poor) == {
        "faults": ["3 of 5 defective test images are missed, 60 %."],
        "steps": [],
    }


def test_more_false_rejects_than_the_calibration_explains_are_a_fault():
    def found(low: float) -> list[str]:
        intervals = metrics()["intervals"] | {"false_reject_rate": [low, 0.9]}
        return list(faults(of(false_reject_rate=0.6, intervals=intervals)))

    assert found(0.3) == []
    assert "1 of 10 good test images are rejected, 60 %" in found(0.31)[0]


def test_without_defects_a_late_detection_of_synthetic_ones_is_a_fault():
    def found(size: float | None) -> list[str]:
        return list(faults(of(num_anomalous=0, miss_rate=None, synthetic=synthetic(size))))

    assert found(0.12) == []
    (fault,) = found(0.2)
    assert fault.startswith("90 % of synthetic defects are detected only at 20 % of the image's")


EVERYTHING = next_steps(  # of results to which every rule has something to say
    fit([2, 1])
    | {
        "metrics": metrics(
            data=with_near("calibration", 50),
            calibration=calibrated(19),
            synthetic=synthetic(None),
            miss_rate=0.6,
        ),
        "peaks": {"at_border": 20, "num_images": 20, "low": 0.8, "area": 0.234},
        "sides": {"image": 1024, "seen": 256},
    }
)


def test_what_is_advised_can_be_run_as_it_is_typed_and_is_explained_in_the_docs(tmp_path):
    assert len(EVERYTHING["steps"]) == len(RULES) + 1
    params, text = tmp_path / "params.yaml", (ROOT / "docs/if-the-result-is-poor.md").read_text()
    for step in EVERYTHING["steps"]:
        key = step["command"].split(" -S ")[-1].strip("\"'").split("=")[0].split(" bolt")[0]
        assert key in text
        words = shlex.split(step["command"].replace("LEFT,TOP,RIGHT,BOTTOM", "1,2,30,40"))
        if options := [word for word in words if "=" in word]:
            params.write_text((ROOT / "params.yaml").read_text())
            before = load_config(params)
            apply_overrides(params, options)
            assert load_config(params) != before


def test_advice_is_printed_with_its_faults_and_commands():
    printed = list(advice_lines("bolt", EVERYTHING))
    assert printed[0] == "bolt: what next"
    assert printed[1] == "  Poor: 1 of 5 defective test images are missed, 60 %."
    assert "      dvc exp run -S training.num_epochs=4" in printed
    assert list(advice_lines("bolt", {"faults": [], "steps": []})) == []
    assert "  No rule says why." in advice_lines("bolt", {"faults": ["x"], "steps": []})


@pytest.mark.parametrize(
    ("name", "value", "now", "expected"),
    [
        ("image_auroc", 0.9, [0.899, 0.901], "unchanged"),
        ("image_auroc", 0.94, [0.939, 0.941], "within noise"),
        ("image_auroc", 0.96, [0.959, 0.961], "better"),
        ("image_auroc", 0.7, [0.699, 0.701], "worse"),
        ("image_auroc", 0.7, [0.6, 1], "within noise"),  # the wider interval is the new one
        ("false_reject_rate", 0.01, [0.009, 0.011], "better"),
        ("miss_rate", 0.5, [0.499, 0.501], "worse"),
    ],
)
def test_a_change_is_called_by_its_direction_unless_an_interval_holds_it(
    name, value, now, expected
):
    before = metrics()
    after = metrics(**{name: value}, intervals=before["intervals"] | {name: now})
    assert trends(after, before)[name] == (before[name], expected)


def test_what_is_not_defined_or_of_other_test_images_has_no_trend():
    undefined = metrics(miss_rate=None, intervals=metrics()["intervals"] | {"miss_rate": None})
    assert "miss_rate" not in trends(undefined, metrics())
    with pytest.raises(DifferentTestImages):
        trends(metrics(data=DATA | {"content": {"test": "other"}}), metrics())


def test_the_summary_counts_pairs_and_test_images():
    data = DATA | {"num_near_duplicates": {"test": {"pairs": 410, "images": 70}}}
    row = report.headlines(metrics(data=data))
    assert (row["num_near_duplicates"], row["num_near_duplicate_images"]) == (410, 70)
    assert (row["image_f1"], row["image_f1_max"], row["image_f1_low"]) == (0.8, 0.85, 0.7)


def test_the_mean_of_other_test_images_says_so():
    def named(**tests: str) -> str:
        content = {name: {"content": {"test": test, "fit": "x"}} for name, test in tests.items()}
        return report.test_images([of(data=x) | {"name": name} for name, x in content.items()])

    assert re.fullmatch("bolt, nut: [0-9a-f]{8}", named(bolt="a", nut="b"))
    assert named(bolt="a", nut="b") == named(bolt="a", nut="b") != named(bolt="a", nut="c")
    assert named(**{f"part{k}": "a" for k in range(9)}).startswith("9 categories: ")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    (tmp_path / "params.yaml").write_text("training:\n  learning_rate: 0.4\ncategories: [a]\n")
    (tmp_path / "stages").mkdir()
    return tmp_path


@pytest.fixture
def repository(folder):
    someone = ["-c", "user.name=Someone", "-c", "user.email=someone@example.com"]
    for command in (["init", "-q"], ["add", "-A"], [*someone, "commit", "-qm", "The start"]):
        subprocess.run(["git", *command], check=True)
    return folder


def test_a_clean_revision_is_reproduced_by_make(repository):
    made = provenance.provenance()
    assert re.fullmatch(r"[0-9a-f]{7,} The start", made["revision"])
    assert made["commands"][0].startswith("git checkout ")
    assert made["commands"][1:] == ["make repro"]


def test_changed_parameters_become_the_options_of_an_experiment(repository, monkeypatch):
    changed = "training:\n  learning_rate: 0.1\n  new: null\ncategories: [a, b]\n"
    (repository / "params.yaml").write_text(changed)
    (repository / "stages" / "mine.py").write_text("")
    monkeypatch.setenv("DVC_EXP_NAME", "slow-try")
    made = provenance.provenance()
    assert made["commands"][1:] == [
        "# and the uncommitted changes in stages/",
        "dvc exp run -S training.learning_rate=0.1 -S +training.new=null -S 'categories=[a,b]'",
    ]
    assert "experiment slow-try" in made["revision"]
    assert "training.learning_rate=0.1" in made["revision"]


def test_a_folder_that_is_no_repository_can_be_reported_too(folder):
    assert provenance.provenance()["revision"] == "not in a git repository"
    assert provenance.committed("metrics/bolt/evaluate.json") is None
