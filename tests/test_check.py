"""The stage `check`, which refuses a bad params.yaml before DVC deletes the stages' outputs."""

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
from builders.projects import ROOT, write_params

from anomaly_detection.config import ConfigError
from anomaly_detection.errors import UserError
from stages import check


@pytest.fixture(autouse=True)
def parts(tmp_path, monkeypatch):
    """The working folder's `data` has the categories `gadget` and `widget`."""
    monkeypatch.chdir(tmp_path)
    for name in ("gadget", "widget"):
        write_category(Path("data") / name, size=32, num_train=8, num_test=1)


BOTH = {"data.categories": ["widget", "gadget"]}
OF_PARTS = {"data.root": "data", "data.categories": ["widget"], "evaluation.false_reject_rate": 0.5}


def checked(changes: dict[str, Any]) -> dict[str, str]:
    """Run the stage; returns what it has written."""
    write_params(OF_PARTS | changes)
    check.main()
    return written()


def written() -> dict[str, str]:
    files = [path for path in Path("checked").rglob("*") if path.is_file()]
    return {path.relative_to("checked").as_posix(): path.read_text() for path in files}


def as_dvc_runs_it() -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "stages.check"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_stage_writes_a_constant_and_what_each_category_is_fitted_with():
    write_params(OF_PARTS | BOTH | {"overrides.widget.training.num_epochs": 3})
    done = as_dvc_runs_it()
    assert (done.returncode, done.stderr) == (0, "")
    files = written()
    names = {"widget.json", "gadget.json"}
    assert set(files) == {"params", *names, *(f"pretrain/{name}" for name in names)}
    widget, gadget = (json.loads(files[f"{name}.json"]) for name in ("widget", "gadget"))
    assert widget["parameters"]["training"] == gadget["parameters"]["training"] | {"num_epochs": 3}
    assert widget["parameters"]["model"] == gadget["parameters"]["model"]
    assert gadget["parameters"]["model"]["name"] == "stfpm"
    assert gadget["parameters"]["training"]["num_epochs"] == 10
    assert widget["code"] == gadget["code"]
    write_params(OF_PARTS | {"training.learning_rate": "abc"})
    done = as_dvc_runs_it()
    line = "params.yaml: training.learning_rate must be a valid number, got 'abc'.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert written() == files
    assert set(checked({"data.categories": ["gadget"]})) == {  # nothing of the removed one
        "params",
        "gadget.json",
        "pretrain/gadget.json",
    }


def test_only_what_decides_a_fit_changes_the_file_of_a_category():
    before = checked(BOTH)
    others = {
        "training.learning_rate": 2e-3,  # which it was by itself
        "hardware.num_workers": 2,
        "hardware.feature_cache": 0,
        "patchcore.bank_size": 77,
        "data.image_size": 64,
        "plots.gallery_size": 3,
    }
    assert checked(BOTH | others) == before
    after = checked(BOTH | {"overrides.gadget.model.top_fraction": 0.5})
    assert {name for name in after if after[name] != before[name]} == {"gadget.json"}
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet").state_dict(), "weights.pth")
        of_file = {"model.weights": "weights.pth", "model.backbone": "test_resnet"}
        files.append(checked(of_file)["widget.json"])
    assert files[0] != files[1]


def test_what_decides_a_pretraining_is_there_for_a_model_that_has_one():
    assert json.loads(checked({})["pretrain/widget.json"]) == {}
    model = {"model": {"name": "efficientad"}, "efficientad": {"teacher": "distilled"}}
    files = checked({"overrides.widget": model})
    decides = json.loads(files["pretrain/widget.json"])
    assert decides["parameters"]["distillation_steps"] == 3000
    assert decides["code"] == json.loads(files["widget.json"])["code"]
    files = checked({"evaluation.calibration": "cross", "overrides.widget": model})
    assert json.loads(files["pretrain/widget.json"]) != decides  # other images to learn from


RANDOM = {"model.backbone": "resnet18", "model.weights": "random"}
ELPV = {"data.root": "data/elpv", "data.categories": ["mono"]}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data.root": "nowhere"}, "params.yaml: data.root must be a folder, got 'nowhere'"),
        ({"data.root": "params.yaml"}, "data.root must be a folder, got 'params.yaml'"),
        ({"data.auxiliary": "data/nowhere"}, "data.auxiliary must be a folder with images"),
        (
            {"data.categories": ["widget", "wigdet"]},
            r"params.yaml: data.categories must be folders in data with samples.csv \(csv\), or ",
        ),
        (
            {"data.layout": "visa"},
            "'widget', but data/widget must have images to train with: Data/Images .visa",
        ),
        (
            ELPV | {"data.layout": "csv"},
            r"data.categories must be folders in data/elpv with samples.csv \(csv\)",
        ),
        (
            ELPV | {"data.categories": ["multi"]},
            "data.categories must be folders in data/elpv.*got 'multi'.* mono, poly",
        ),
        ({"data.mask": "gone.png"}, "data.mask must be an image or a folder in data/widget, got"),
        (
            {"overrides.wodget.training.num_epochs": 3},
            "overrides must be folders in data with .*got 'wodget'; there are: gadget, widget",
        ),
        (RANDOM | {"model.backbone": "resnet81"}, "a timm model, got 'resnet81'; the nearest: "),
        (RANDOM | {"model.backbone": "resnet1"}, "'resnet1'.*resnet18"),
        (BOTH | {"overrides.widget.model.backbone": "resnet81"}, "a timm model, got 'resnet81'"),
        (
            {"model.layers": ["layer1", "blocks.1"]},
            r"must be levels of tf_efficientnet_lite0, got layer1.*blocks.1 \(stride",
        ),
        ({"model.weights": "gone.pth"}, "must be bundled, timm, random or a file, got 'gone.pth'"),
        ({"model.backbone": "resnet18"}, "model.weights bundled are those of tf_efficientnet"),
        ({"hardware.device": "cuda:99"}, "hardware.device must be a device of this machine"),
        ({"evaluation.precision": "bfloat16"}, "evaluation.precision must be float32 to export"),
        ({"evaluation.false_reject_rate": 0.25}, "^data/widget: .* 3 calibration images, got 1 of"),
        ({"data.validation_fraction": 0.01}, "fit, validation and calibration must get an"),
        ({"data.group": "(good|bright)"}, "params.yaml: data/widget/test/dark/000.png: must match"),
        ({"data.group": "(good|bright|dark)"}, "got 1, 0 and 0 of 1 distinct images"),
        (
            {"data.group": r"(\d)\.png", "evaluation.false_reject_rate": 0.25},
            "3 calibration parts, got 1 of 8 normal parts",
        ),
        pytest.param(
            {"hardware.device": "mps"},
            "hardware.device must be a device of this machine, got mps.*use auto",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="mps is available"),
        ),
    ],
)
def test_what_is_not_there_is_refused_in_a_line_and_leaves_the_earlier_output(changes, text):
    Path("checked").mkdir()
    Path("checked/earlier").touch()
    bundled = {"model.backbone": "tf_efficientnet_lite0", "model.weights": "bundled"}
    with pytest.raises(UserError, match=text) as error:
        checked(bundled | changes)
    assert "\n" not in str(error.value)
    assert written() == {"earlier": ""}


@pytest.mark.parametrize(
    "changes",
    [
        ELPV | {"data.categories": ["mono", "poly"]},  # fetched only later
        RANDOM | {"model.weights": "timm"},  # no download here
        RANDOM | {"model.layers": ["layer1"]},
        {"overrides.gadget.training.num_epochs": 3},  # of a category that is not trained now
        {"hardware.device": "cpu"},
        {"data.tile_size": 64, "overrides.widget.model.name": "patchcore"},
        {"evaluation.false_reject_rate": 0.25, "evaluation.calibration": "cross"},
        {"evaluation.false_reject_rate": 0.25, "evaluation.threshold_method": "quantile"},
        {"data.group": r"(\d)\.png"},
    ],
)
def test_what_is_there_is_accepted(changes):
    assert checked(changes)["params"]


def test_images_that_are_drawn_for_the_test_do_not_calibrate():
    for path in Path("data/widget/test/good").iterdir():
        path.rename(Path("data/widget/train/good/more.png"))
    with pytest.raises(ConfigError, match="needs at least 8 calibration images, got 7 of 9"):
        checked({"evaluation.false_reject_rate": 0.12, "evaluation.calibration": "cross"})
