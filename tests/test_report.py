import base64
import io
import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from anomaly_detection.report import DifferentTestImages, render, trends
from anomaly_detection.report.page import headlines, histogram
from anomaly_detection.thumbnails import BYTES_PER_IMAGE, thumbnails
from stages import provenance

RNG = np.random.default_rng(0)


def metrics(**changes) -> dict:
    values = {
        "image_auroc": 0.9,
        "image_f1": 0.8,
        "false_reject_rate": 0.1,
        "miss_rate": 0.2,
        "threshold": 0.5,
        "threshold_method": "quantile",
        "num_normal": 10,
        "num_anomalous": 5,
        "num_false_rejects": 1,
        "num_misses": 1,
        "intervals": {
            "image_auroc": [0.8, 0.95],
            "image_f1": [0.7, 0.9],
            "false_reject_rate": [0.05, 0.2],
            "miss_rate": [0.1, 0.4],
        },
        "calibration": {
            "num_images": 9,
            "false_reject_rate": {"expected": 0.1, "upper_95": 0.3},
        },
        "data": {"content": {"test": "abc"}, "num_images": {"test": 15}, "near_duplicates": []},
    }
    return values | changes


def category(**changes) -> dict:
    images = [
        {"path": "test/good/a.png", "defect_type": "good", "label": 0, "score": 0.1},
        {"path": "test/bad/b.png", "defect_type": "bad", "label": 1, "score": 0.9},
    ]
    values = {
        "name": "bolt",
        "metrics": metrics(),
        "training": {"device": "cpu", "precision": "float32", "best_epoch": 3, "versions": {}},
        "images": images,
        "trends": {},
    }
    return values | changes


PROVENANCE = {"revision": "abc", "made": "now", "commands": [], "params": "a: 1", "times": []}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("image_auroc", 0.9, "unchanged"),
        ("image_auroc", 0.94, "within noise"),
        ("image_auroc", 0.96, "better"),
        ("image_auroc", 0.7, "worse"),
        ("false_reject_rate", 0.01, "better"),
        ("miss_rate", 0.5, "worse"),
    ],
)
def test_a_change_is_called_by_its_direction_unless_an_interval_holds_it(name, value, expected):
    before = metrics()
    intervals = before["intervals"] | {name: [value - 0.001, value + 0.001]}
    trend = trends(metrics(**{name: value}, intervals=intervals), before)[name]
    assert trend == (before[name], expected)


def test_a_value_within_the_wider_new_interval_is_within_noise():
    wide = metrics(image_auroc=0.7, intervals=metrics()["intervals"] | {"image_auroc": [0.6, 1]})
    assert trends(wide, metrics())["image_auroc"].word == "within noise"


def test_figures_of_different_test_images_are_not_compared():
    other = metrics(data=metrics()["data"] | {"content": {"test": "other"}})
    with pytest.raises(DifferentTestImages):
        trends(metrics(), other)


def test_what_is_not_defined_has_no_trend_and_says_why():
    undefined = metrics(
        miss_rate=None,
        intervals=metrics()["intervals"] | {"miss_rate": None},
        undefined={"miss_rate": "there are no anomalous images."},
    )
    assert "miss_rate" not in trends(undefined, metrics())
    row = headlines(category(metrics=undefined))[2]
    assert row["text"](row["value"]) == "–"
    assert row["note"] == "there are no anomalous images."


def test_histogram_has_the_shares_of_each_kind_and_the_threshold():
    images = [{"label": 0, "score": 0.0}] * 3 + [{"label": 0, "score": 1.0}]
    images += [{"label": 1, "score": 1.0}] * 2
    result = histogram(category(images=images))
    assert result["normal"] == [0.75] + [0] * 34 + [0.25]
    assert result["anomalous"] == [0] * 35 + [1]
    assert result["threshold"] == 0.5


def test_the_page_keeps_markup_as_text():
    name = "<script>alert(1)</script>"
    image = {"path": f"test/bad/{name}.png", "defect_type": name, "label": 1, "score": 1.0}
    params = PROVENANCE | {"params": name, "revision": name, "commands": [name]}
    page = render([category(images=[image])], params)
    assert "alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    content = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(content)[0]["images"][0]["path"] == image["path"]


def test_the_page_names_no_address():
    addresses = set(re.findall(r"https?://[^\s\"'<]+", render([category()], PROVENANCE)))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a namespace


def decode(url: str) -> np.ndarray:
    kind, content = url.split(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L"), dtype=int)


def test_thumbnails_hold_picture_map_and_mask():
    pictures = np.full((2, 3, 128, 128), 90, np.uint8)
    maps = np.zeros((2, 128, 128), np.float32)
    maps[:, :, 64:] = 0.25
    mask = np.zeros((128, 128), np.uint8)
    mask[:64] = 1
    first, second = thumbnails(pictures, maps, [mask, None], map_limit=1.0)
    assert np.abs(decode(first["picture"]) - 90).max() <= 2
    levels = decode(first["map"])
    assert levels.shape == (64, 64)
    assert set(levels[:, :30].ravel()) == {0}
    assert set(levels[:, 34:].ravel()) == {128}  # 255 times the square root of 0.25
    assert (decode(first["mask"])[:60] == 255).all()
    assert (decode(first["mask"])[68:] == 0).all()
    assert second["mask"] is None


def test_thumbnails_of_noise_are_reduced_until_they_fit():
    pictures = RNG.integers(0, 256, (20, 3, 256, 256), dtype=np.uint8)
    maps = np.zeros((20, 256, 256), np.float32)
    made = thumbnails(pictures, maps, [None] * 20, 1.0)
    assert 64 < len(decode(made[0]["picture"])) < 256
    size = sum(len(url) for image in made for url in image.values() if url)
    assert size / 20 <= BYTES_PER_IMAGE * 4 / 3 + 100


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    (tmp_path / "params.yaml").write_text("training:\n  learning_rate: 0.4\ncategories: [a]\n")
    (tmp_path / "stages").mkdir()
    for command in (
        ["init", "-q"],
        ["config", "user.name", "Someone"],
        ["config", "user.email", "someone@example.com"],
        ["add", "-A"],
        ["commit", "-qm", "The start"],
    ):
        subprocess.run(["git", *command], check=True)
    return tmp_path


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


def test_a_folder_that_is_no_repository_can_be_reported_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert provenance.provenance()["revision"] == "not in a git repository"
    assert provenance.committed("metrics/bolt/evaluate.json") is None
