import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from builders.images import write_category
from ruamel.yaml import YAML

from anomaly_detection.config import ConfigError
from anomaly_detection.errors import UserError

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the categories `gadget` and `widget` in `data`."""
    for name in ("gadget", "widget"):
        write_category(tmp_path / "data" / name, num_train=8, num_test=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_params(changes: dict[str, Any]) -> None:
    """The project's params.yaml, for `data/widget`, with values changed by their dotted paths."""
    yaml = YAML(typ="safe", pure=True)
    values = yaml.load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    defaults = {
        "data.root": "data",
        "data.categories": ["widget"],
        "evaluation.false_reject_rate": 0.5,
        "hardware.device": "auto",
        "overrides": {},
    }
    for path, value in (defaults | changes).items():
        *parents, key = path.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
    yaml.dump(values, Path("params.yaml"))


def run_check() -> subprocess.CompletedProcess:
    """The stage as DVC runs it."""
    return subprocess.run(
        [sys.executable, "-m", "stages.check"],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )


def check(monkeypatch) -> None:
    """The stage without a process of its own, whose imports take seconds."""
    monkeypatch.syspath_prepend(PROJECT)
    from stages.check import main

    main()


def checked() -> dict[str, str]:
    return {
        path.relative_to("checked").as_posix(): path.read_text()
        for path in Path("checked").rglob("*")
        if path.is_file()
    }


def test_valid_file_writes_a_constant_and_what_each_category_is_fitted_with(folder):
    write_params(
        {
            "data.categories": ["widget", "gadget"],
            "overrides.widget.training.num_epochs": 3,
        }
    )
    done = run_check()
    assert (done.returncode, done.stderr) == (0, "")
    files = checked()
    categories = {"widget.json", "gadget.json"}
    assert set(files) == {"params", *categories, *(f"pretrain/{name}" for name in categories)}
    widget, gadget = (json.loads(files[f"{name}.json"]) for name in ("widget", "gadget"))
    assert widget["parameters"]["training"] == gadget["parameters"]["training"] | {"num_epochs": 3}
    assert widget["parameters"]["model"] == gadget["parameters"]["model"]
    assert gadget["parameters"]["model"]["name"] == "stfpm"
    assert gadget["parameters"]["training"]["num_epochs"] == 10
    assert widget["code"] == gadget["code"]


def test_only_what_decides_a_fit_changes_the_file_of_a_category(folder, monkeypatch):
    write_params({"data.categories": ["widget", "gadget"]})
    check(monkeypatch)
    before = checked()
    write_params(
        {
            "data.categories": ["widget", "gadget"],
            "training.learning_rate": 2e-3,  # which it was by itself
            "hardware.num_workers": 2,
            "hardware.feature_cache": 0,
            "patchcore.bank_size": 77,
            "data.image_size": 64,
            "plots.gallery_size": 3,
        }
    )
    check(monkeypatch)
    assert checked() == before
    write_params(
        {"data.categories": ["widget", "gadget"], "overrides.gadget.model.top_fraction": 0.5}
    )
    check(monkeypatch)
    after = checked()
    assert {name for name in after if after[name] != before[name]} == {"gadget.json"}


def test_another_content_of_the_weights_file_changes_the_file_of_a_category(folder, monkeypatch):
    write_params({"model.weights": "weights.pth", "model.backbone": "resnet18"})
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("resnet18").state_dict(), "weights.pth")
        check(monkeypatch)
        files.append(checked()["widget.json"])
    assert files[0] != files[1]


def test_positions_need_a_model_that_tells_them_apart(folder, monkeypatch):
    tiles = {"data.categories": ["widget"], "data.tile_size": 64, "data.per_position": True}
    write_params(tiles)
    with pytest.raises(ConfigError, match=r"per_position must be false with stfpm, .* 'patchcore'"):
        check(monkeypatch)
    write_params(tiles | {"overrides.widget.model.name": "patchcore"})
    check(monkeypatch)


def test_what_decides_a_pretraining_is_there_for_a_model_that_has_one(folder, monkeypatch):
    write_params({"data.categories": ["widget"]})
    check(monkeypatch)
    assert json.loads(checked()["pretrain/widget.json"]) == {}
    model = {"model": {"name": "efficientad"}, "efficientad": {"teacher": "distilled"}}
    write_params({"data.categories": ["widget"], "overrides.widget": model})
    check(monkeypatch)
    decides = json.loads(checked()["pretrain/widget.json"])
    assert decides["parameters"]["distillation_steps"] == 3000
    assert decides["code"] == json.loads(checked()["widget.json"])["code"]
    cross = {"evaluation.calibration": "cross", "data.categories": ["widget"]}
    write_params(cross | {"overrides.widget": model})
    check(monkeypatch)
    assert json.loads(checked()["pretrain/widget.json"]) != decides  # other images to learn from


def test_removed_category_leaves_no_file_behind(folder, monkeypatch):
    write_params({"data.categories": ["widget", "gadget"]})
    check(monkeypatch)
    write_params({"data.categories": ["gadget"]})
    check(monkeypatch)
    assert set(checked()) == {"params", "gadget.json", "pretrain/gadget.json"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"training.learning_rate": "abc"},
            "params.yaml: training.learning_rate must be a valid number, got 'abc'.",
        ),
        (
            {"data.categories": ["widget", "wigdet"]},
            "params.yaml: data.categories must be folders in data with samples.csv (csv), or ",
        ),
        (
            {"model.backbone": "resnet81", "model.weights": "random"},
            "model.backbone must be a timm model, got 'resnet81'; the nearest: ",
        ),
    ],
)
def test_refusal_is_one_line_and_status_1_and_leaves_the_earlier_output(folder, changes, line):
    write_params({})
    assert run_check().returncode == 0
    before = checked()
    write_params(changes)
    done = run_check()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(line)
    assert checked() == before


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"data.root": "nowhere"}, ["params.yaml: data.root must be a folder, got 'nowhere'"]),
        ({"data.auxiliary": "data/nowhere"}, ["data.auxiliary must be a folder with images"]),
        (
            {"data.layout": "visa"},
            ["names 'widget', but data/widget must have images to train with: Data/Images (visa)"],
        ),
        (
            {"data.root": "data/elpv", "data.layout": "csv", "data.categories": ["mono"]},
            ["data.categories must be folders in data/elpv with samples.csv (csv)"],
        ),
        ({"data.root": "params.yaml"}, ["data.root must be a folder, got 'params.yaml'"]),
        (
            {"data.root": "data/elpv", "data.categories": ["multi"]},
            ["data.categories must be folders in data/elpv", "got 'multi'", "mono, poly"],
        ),
        (
            {"overrides.wodget.training.num_epochs": 3},
            ["overrides must be folders in data with", "got 'wodget'; there are: gadget, widget"],
        ),
        (
            {"overrides.widget.training.num_epoch": 3},
            ["did you mean overrides.widget.training.num"],
        ),
        ({"model.backbone": "resnet1", "model.weights": "random"}, ["'resnet1'", "resnet18"]),
        (
            {"model.layers": ["layer1", "blocks.1"]},
            [
                "model.layers must be levels of tf_efficientnet_lite0, got layer1",
                "blocks.1 (stride",
            ],
        ),
        (
            {"model.weights": "gone.pth"},
            ["model.weights must be bundled, timm, random or a file, got 'gone.pth'"],
        ),
        ({"model.backbone": "resnet18"}, ["model.weights bundled are those of tf_efficientnet"]),
        (
            {
                "data.categories": ["gadget", "widget"],
                "overrides.widget.model.backbone": "resnet81",
            },
            ["model.backbone must be a timm model, got 'resnet81'"],
        ),
        ({"hardware.device": "cuda:99"}, ["hardware.device must be a device of this machine"]),
        pytest.param(
            {"hardware.device": "mps"},
            ["hardware.device must be a device of this machine, got mps", "use auto"],
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="mps is available"),
        ),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(folder, monkeypatch, changes, texts):
    write_params({"model.backbone": "tf_efficientnet_lite0", "model.weights": "bundled"} | changes)
    with pytest.raises(UserError) as error:
        check(monkeypatch)
    for text in texts:
        assert text in str(error.value)
    assert not Path("checked").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"data.root": "data/elpv", "data.categories": ["mono", "poly"]},  # fetched only later
        {"model.backbone": "resnet18", "model.weights": "timm"},  # no download here
        {"model.backbone": "resnet18", "model.weights": "random", "model.layers": ["layer1"]},
        {"overrides.gadget.training.num_epochs": 3},  # of a category that is not trained now
        {"hardware.device": "cpu"},
    ],
)
def test_what_is_there_is_accepted(folder, monkeypatch, changes):
    write_params(changes)
    check(monkeypatch)
    assert checked()["params"]


def test_too_few_images_are_refused_before_anything_is_deleted(folder, monkeypatch):
    write_params({"evaluation.false_reject_rate": 0.25})
    with pytest.raises(
        ConfigError, match=r"^data.widget: .* 3 calibration images, got 1 of 8 norm"
    ):
        check(monkeypatch)
    assert not Path("checked").exists()
    write_params({"evaluation.false_reject_rate": 0.25, "evaluation.calibration": "cross"})
    check(monkeypatch)
    write_params({"evaluation.false_reject_rate": 0.25, "evaluation.threshold_method": "quantile"})
    check(monkeypatch)
    write_params({"data.validation_fraction": 0.01})
    with pytest.raises(ConfigError, match="each of fit, validation and calibration must get an"):
        check(monkeypatch)


def test_images_that_are_drawn_for_the_test_do_not_calibrate(folder, monkeypatch):
    for path in Path("data/widget/test/good").iterdir():
        path.rename(Path("data/widget/train/good/more.png"))
    write_params({"evaluation.false_reject_rate": 0.12, "evaluation.calibration": "cross"})
    with pytest.raises(ConfigError, match="needs at least 8 calibration images, got 7 of 9"):
        check(monkeypatch)


def test_names_that_name_no_part_are_refused_before_anything_is_deleted(folder, monkeypatch):
    write_params({"data.group": "good/(.*)"})
    with pytest.raises(
        ConfigError, match=r"params.yaml: data/widget/test/bright/000.png: must match"
    ):
        check(monkeypatch)
    write_params({"data.group": "(good|bright|dark)"})
    with pytest.raises(ConfigError, match="got 1, 0 and 0 of 1 distinct images"):
        check(monkeypatch)
    write_params({"data.group": r"(\d)\.png", "evaluation.false_reject_rate": 0.25})
    with pytest.raises(ConfigError, match="3 calibration parts, got 1 of 8 normal parts"):
        check(monkeypatch)
    write_params({"data.group": r"(\d)\.png"})
    check(monkeypatch)
