import re
import shlex
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML
from test_report import NONE, category, metrics, training

from anomaly_detection.config import load_config
from anomaly_detection.evaluation.thresholds import (
    false_reject_bounds,
    false_reject_threshold,
    images_needed,
)
from anomaly_detection.report import advice_lines, next_steps
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

ROOT = Path(__file__).parent.parent


def fit(losses, best=None, **parameters) -> dict:
    history = [{"epoch": i, "val_loss": loss} for i, loss in enumerate(losses, 1)]
    parameters = parameters or {"training": {"seed": 0, "num_epochs": len(losses)}}
    return category(
        training=training(history=history, best_epoch=best or len(losses), parameters=parameters)
    )


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


@pytest.mark.parametrize(
    ("parameters", "option"),
    [
        ({"model": {"name": "x"}, "training": {"num_epochs": 2}}, "training.num_epochs=4"),
        ({"training": {"seed": 0}, "x": {"num_steps": 2000}}, "x.num_steps=4000"),
    ],
)
def test_training_longer_doubles_what_the_model_counts_in(parameters, option):
    advice = train_longer(fit([2, 1], **parameters))
    assert advice.command == f"dvc exp run -S {option}"
    assert "The last epoch, 2, was the best" in advice.reason
    assert "from 2 to 1 over the last epoch." in advice.reason


def test_a_model_without_a_length_of_training_is_not_asked_to_train_longer():
    assert train_longer(fit([2, 1], training={"seed": 0})) is None


def with_near(split: str, images: int) -> dict:
    near = {"test": NONE, "calibration": NONE, "validation": NONE}
    near[split] = {"pairs": 9, "images": images}
    data = metrics()["data"] | {
        "num_images": {"test": 50, "calibration": 50, "validation": 50},
        "num_near_duplicates": near,
    }
    return category(metrics=metrics(data=data))


@pytest.mark.parametrize(
    ("split", "consequence", "command"),
    [
        ("test", "metrics may be optimistic", "make repro"),  # groups move no test image
        ("calibration", "threshold may be too low", "data.group"),
    ],
)
def test_a_tenth_of_near_duplicates_asks_to_keep_parts_together(split, consequence, command):
    assert near_duplicates(with_near(split, 4)) is None
    advice = near_duplicates(with_near(split, 5))
    assert f"5 of 50 {split} images (10 %) have near-duplicates" in advice.reason
    assert consequence in advice.reason
    assert command in advice.command


def test_near_duplicates_among_validation_images_are_not_advised_about():
    assert near_duplicates(with_near("validation", 50)) is None


def calibrated(number: int, rate: float | None = 0.05, method: str = "split") -> dict:
    scores = range(number)
    threshold = false_reject_threshold(scores, rate) if rate else 0.5
    calibration = {
        "method": method,
        "num_images": number,
        "requested_rate": rate,
        "false_reject_rate": false_reject_bounds(scores, threshold),
    }
    return category(metrics=metrics(calibration=calibration))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
def test_calibration_images_are_few_until_there_are_enough(rate):
    enough = round(3 / rate)
    for number in range(images_needed(rate), 2 * enough):
        advice = few_calibration_images(calibrated(number, rate))
        assert (advice is not None) == (number < enough)


def test_few_calibration_images_are_named_with_what_they_bound():
    assert few_calibration_images(calibrated(19, rate=None)) is None  # none was asked for
    advice = few_calibration_images(calibrated(19))
    assert "19 calibration images are few for 5 % false rejects" in advice.reason
    assert "up to 14.6 % (95 %)" in advice.reason
    assert advice.command == "dvc exp run -S evaluation.calibration=cross"
    assert few_calibration_images(calibrated(19, method="cross")).command == "make repro"


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


def detecting(size: float | None, **changes) -> dict:
    made = {"num_images": 32, "size_detected_in_90_percent": size}
    return category(**{"metrics": metrics(synthetic=made)} | changes)


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
    advice = small_defects(detecting(size, sides={"image": image, "seen": 256}))
    assert (advice is not None) == advised
    if advice:
        assert advice.command == "dvc exp run -S data.tile_size=256 -S data.tile_overlap=32"
        assert "Of 512 pixels along a side, the model sees 256" in advice.reason
    assert small_defects(detecting(size, sides=None)) is None  # tiled already
    assert small_defects(category(sides={"image": 512, "seen": 256})) is None  # not measured


def selection(chosen: int = 1, override=None, **changes) -> dict:
    def candidate(model: str, worst: float, override: dict) -> dict:
        values = {"model": model, "worst": worst, "strides": [8, 16], "top_fraction": 0.01}
        return values | {"override": override}

    values = {
        "content": {"fit": "f", "validation": "v"},
        "default": 0,
        "chosen": chosen,
        "candidates": [
            candidate("stfpm", 0.8, {}),
            candidate("gaussian", 0.9, override or {"model": {"name": "gaussian"}}),
        ],
    }
    return values | changes


def of_images(size: float | None, **changes) -> dict:
    content = {"test": "t", "fit": "f", "validation": "v"}
    made = {"num_images": 32, "size_detected_in_90_percent": size}
    return category(
        metrics=metrics(synthetic=made, data=metrics()["data"] | {"content": content}), **changes
    )


def test_a_model_that_is_better_on_synthetic_defects_is_named_with_its_override():
    advice = another_model(of_images(0.01), selection())
    assert "gaussian (strides 8+16, top_fraction 0.01) is better than stfpm" in advice.reason
    assert "0.900 instead of 0.800" in advice.reason
    block = advice.command.removesuffix("make repro")
    assert YAML(typ="safe").load(block) == {"overrides": {"bolt": {"model": {"name": "gaussian"}}}}


def test_nothing_is_advised_where_the_comparison_keeps_the_model_or_its_choice_is_in_use():
    poor = of_images(None)
    assert another_model(poor, selection(chosen=0)) is None
    in_use = training(model="gaussian", parameters={"model": {"name": "gaussian"}})
    assert another_model(of_images(None, training=in_use), selection()) is None
    automatic = {"model": {"name": "gaussian"}, "training": {"num_epochs": "auto"}}
    assert another_model(of_images(None, training=in_use), selection(override=automatic)) is None


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
    assert list(faults(category(metrics=metrics(miss_rate=0.3)))) == []
    known = calibrated(60)["metrics"] | {"miss_rate": 0.6, "num_misses": 3}
    poor = category(metrics=known, peaks=None, sides=None)
    assert list(faults(poor)) == ["3 of 5 defective test images are missed, 60 %."]
    assert next_steps(poor)["steps"] == []


def test_more_false_rejects_than_the_calibration_explains_are_a_fault():
    def of(low: float) -> list[str]:
        intervals = metrics()["intervals"] | {"false_reject_rate": [low, 0.9]}
        return list(faults(category(metrics=metrics(false_reject_rate=0.6, intervals=intervals))))

    assert of(0.3) == []
    assert "1 of 10 good test images are rejected, 60 %" in of(0.31)[0]


def test_without_defects_a_late_detection_of_synthetic_ones_is_a_fault():
    def of(size: float | None) -> list[str]:
        made = {"num_images": 32, "size_detected_in_90_percent": size}
        known = metrics(num_anomalous=0, miss_rate=None, synthetic=made)
        return list(faults(category(metrics=known)))

    assert of(0.12) == []
    (fault,) = of(0.2)
    assert fault.startswith("90 % of synthetic defects are detected only at 20 % of the image's")


def everything() -> dict:
    """Results to which every rule has something to say."""
    peaks = {"at_border": 20, "num_images": 20, "low": 0.8, "area": 0.234}
    known = (
        with_near("calibration", 50)["metrics"]
        | {"calibration": calibrated(19)["metrics"]["calibration"]}
        | {"synthetic": detecting(None)["metrics"]["synthetic"], "miss_rate": 0.6}
    )
    return fit([2, 1]) | {
        "metrics": known,
        "peaks": peaks,
        "sides": {"image": 1024, "seen": 256},
    }


def test_what_is_advised_can_be_run_as_it_is_typed(tmp_path):
    steps = next_steps(everything())["steps"]
    assert len(steps) == len(RULES) + 1
    params = tmp_path / "params.yaml"
    for step in steps:
        words = shlex.split(step["command"].replace("LEFT,TOP,RIGHT,BOTTOM", "1,2,30,40"))
        if options := [word for word in words if "=" in word]:
            params.write_text((ROOT / "params.yaml").read_text())
            before = load_config(params)
            apply_overrides(params, options)
            assert load_config(params) != before


def test_an_advised_override_can_be_pasted(tmp_path):
    advice = another_model(of_images(0.01), selection())
    block = advice.command.removesuffix("make repro")
    params = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text().replace("mono", "bolt")
    params.write_text(re.sub("^overrides:.*", block, text, flags=re.MULTILINE))
    assert load_config(params).for_category("bolt")[0] == "gaussian"


def test_advice_is_printed_with_its_faults_and_commands():
    printed = list(advice_lines("bolt", next_steps(everything())))
    assert printed[0] == "bolt: what next"
    assert printed[1] == "  Poor: 1 of 5 defective test images are missed, 60 %."
    assert "      dvc exp run -S training.num_epochs=4" in printed
    assert list(advice_lines("bolt", {"faults": [], "steps": []})) == []
    assert "  No rule says why." in advice_lines("bolt", {"faults": ["x"], "steps": []})


def test_every_rule_is_explained_in_the_docs():
    text = (ROOT / "docs" / "if-the-result-is-poor.md").read_text()
    for step in next_steps(everything())["steps"]:
        command = step["command"].split(" -S ")[-1].strip("\"'").split("=")[0].split(" bolt")[0]
        assert command in text, command
