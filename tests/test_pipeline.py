"""The real `dvc repro` on a small data set: what it writes, and what a person sees of it."""

import csv
import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from builders.browser import DESKTOP, PHONE, Browser
from builders.projects import ALL, EVERY_CATEGORY, MARKUP, Project, read_json, stages
from nbclient import NotebookClient

from anomaly_detection import Detector

pytestmark = pytest.mark.slow

# In the report: the opacity in the middle of the first image, and the number of the focused one.
FIRST_CANVAS = (
    "document.querySelector('.card canvas').getContext('2d', { willReadFrequently: true })"
    ".getImageData(128, 128, 1, 1).data[3]"
)
FOCUSED = "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    assert project.repro(measured=True) == stages(ALL, EVERY_CATEGORY, ["bolt", "nut"])
    project.commit("first run")
    return project


def test_the_pipeline_writes_what_it_promises(project):
    for category in ("bolt", "nut"):
        metrics = read_json(project.folder / "metrics" / category / "evaluate.json")
        assert metrics["num_normal"], metrics["num_anomalous"] == (4, 8)
        assert set(metrics["per_defect_type"]) == {"bright", "dark"}
        assert metrics["image_auroc"] > 0.5
        assert ("aupro" in metrics) == (category == "bolt")
        names = {path.name for path in (project.folder / "plots" / category).iterdir()}
        assert names == {
            "confusion_matrix.csv",
            "confusion_matrix.png",
            "detection.csv",
            "detection.png",
            "gallery.png",
            "loss.csv",
            "loss.png",
            "precision_recall.csv",
            "precision_recall.png",
            "roc.csv",
            "roc.png",
            "scores.png",
        }
    summary = read_json(project.folder / "metrics" / "summary.json")
    assert list(summary) == ["bolt", "nut", "mean"]
    aurocs = [summary[name]["image_auroc"] for name in ("bolt", "nut")]
    assert summary["mean"]["image_auroc"] == pytest.approx(np.mean(aurocs))
    assert summary["mean"]["test_images"].startswith("bolt, nut: ")


def test_verdicts_follow_from_the_scores_and_the_threshold(project):
    metrics = read_json(project.folder / "metrics" / "bolt" / "evaluate.json")
    with (project.folder / "predictions" / "bolt" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    maps = np.load(project.folder / "predictions" / "bolt" / "anomaly_maps.npy")
    assert maps.shape == (len(rows), 64, 64)
    for row in rows:
        assert int(row["pred_label"]) == (float(row["score"]) > metrics["threshold"])
    top = np.sort(maps.reshape(len(rows), -1))[:, -41:].mean(axis=1)
    assert [float(row["score"]) for row in rows] == pytest.approx(top, rel=1e-5)


def test_the_checkpoint_is_self_contained_and_has_no_other_file_beside_it(project):
    folder = project.folder / "checkpoints" / "bolt"
    assert [path.name for path in folder.iterdir()] == ["best_model.pth"]
    content = torch.load(folder / "best_model.pth", weights_only=True)
    assert content["image_size"] == 64
    assert content["parameters"]["training"]["batch_size"] == 8
    assert content["parameters"]["training"]["learning_rate"] == 2e-3  # auto, resolved
    assert content["model"]["hyperparameters"]["backbone"] == "tf_efficientnet_lite0"
    assert not any("optimizer" in key or "random" in key for key in content)


def test_the_built_in_images_are_not_written_where_nobody_asks_for_them(project):
    assert [path.name for path in (project.folder / "data/elpv").iterdir()] == ["note.txt"]


def test_train_json_says_what_was_fitted_with_what_and_on_what(project):
    facts = read_json(project.folder / "metrics" / "bolt" / "train.json")
    assert facts["model"] == facts["parameters"]["model"]["name"] == "stfpm"
    assert "auto" not in (facts["parameters"]["training"] | {"precision": None}).values()
    assert set(facts["hardware"]) >= {"cpu", "instructions"}
    assert facts["best_epoch"] in [row["epoch"] for row in facts["history"]]


def test_the_detector_gives_the_verdicts_of_the_evaluation_from_the_files(project):
    for category in ("bolt", "nut"):
        detector = Detector.load(project.folder / "detectors" / f"{category}.pt")
        with (project.folder / "predictions" / category / "scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            prediction = detector.predict(project.folder / "parts" / category / row["path"])
            assert prediction.verdict == ("anomalous" if row["pred_label"] == "1" else "normal")
            assert prediction.score == pytest.approx(float(row["score"]), rel=1e-4)
        metrics = read_json(project.folder / "metrics" / category / "evaluate.json")
        assert detector.threshold == metrics["threshold"]
        assert detector.provenance["category"] == category
        assert detector.provenance["data"] == metrics["data"]["content"]


@pytest.fixture
def report(project) -> Path:
    return project.folder / "report" / "index.html"


@pytest.fixture
def images(project) -> list[dict]:
    """What the report shows of each image, with the threshold of its category."""
    contents = [
        read_json(project.folder / "report_data" / f"{name}.json") for name in ("bolt", "nut")
    ]
    return [
        image | {"category": content["name"], "threshold": content["metrics"]["threshold"]}
        for content in contents
        for image in content["images"]
    ]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_report_opens_from_disk_with_no_network_and_no_error(report, size, dark):
    with Browser(report, size, dark) as browser:
        assert len(browser.find(".card")) == 24
        assert len(browser.find(".verdict")) == 2
        assert len(browser.find(".chart svg")) == 7
        browser.one("#images").location_once_scrolled_into_view  # noqa: B018, it scrolls
        assert browser.until(lambda: browser.script(f"return {FIRST_CANVAS}") == 255)
        assert browser.script("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.console() == []
        files = [report, report.with_name("run.js")]
        assert browser.requests() == [path.as_uri() for path in files]


def test_the_gallery_sorts_filters_and_searches(report, images):
    def wrong(image: dict) -> float:
        margin = (image["score"] - image["threshold"]) / abs(image["threshold"])
        return margin if image["label"] else -margin

    def names(chosen: list[dict]) -> list[str]:
        return [image["path"].split("/")[-1] for image in chosen]

    with Browser(report) as browser:
        assert browser.texts(".card .name") == names(sorted(images, key=wrong))
        browser.choose("#only", "bolt")
        browser.choose("#sort", "highest score")
        of_bolt = [image for image in images if image["category"] == "bolt"]
        highest = sorted(of_bolt, key=lambda image: -image["score"])
        assert browser.texts(".card .name") == names(highest)
        browser.choose("#type", "dark")
        assert len(browser.find(".card")) == 4
        browser.one("#search").send_keys("003")
        assert browser.texts(".card .name") == ["003.png"]
        browser.one("#search").clear()
        browser.choose("#type", "all")
        for label, verdict in ((0, "false reject"), (1, "missed")):
            for category in ("bolt", "nut"):
                browser.script("scrollTo(0, 0)")
                browser.one(f"[data-show='{verdict}'][data-category='{category}']").click()
                wrong_of_category = [
                    image
                    for image in images
                    if (image["category"], image["label"]) == (category, label)
                    and (image["score"] > image["threshold"]) != label
                ]
                assert len(browser.find(".card")) == len(wrong_of_category)
                assert browser.one("#count").text == f"{len(wrong_of_category)} of 24 images"
        assert browser.console() == []


def test_the_threshold_slider_gives_the_confusion_matrix_of_python(report, images):
    scores, labels = (np.array([x[key] for x in images[:12]]) for key in ("score", "label"))
    cells = ("#true-passes", "#false-rejects", "#misses", "#detections")

    def expected(threshold: float) -> list[str]:
        rejected = scores > threshold
        counts = [~rejected & (labels == 0), rejected & (labels == 0)]
        counts += [~rejected & (labels == 1), rejected & (labels == 1)]
        return [str(count.sum()) for count in counts]

    with Browser(report) as browser:
        shown = [browser.one(cell).text for cell in cells]
        assert shown == expected(images[0]["threshold"])
        slider = browser.one("#slider")
        slider.send_keys(browser.HOME)
        assert [browser.one(cell).text for cell in cells] == expected(-np.inf)
        for score in np.unique(scores):
            slider.send_keys(browser.RIGHT)
            assert [browser.one(cell).text for cell in cells] == expected(score)
        assert browser.one("#miss-rate").text == "100.0 %"
        assert not [text for text in browser.texts(".card .line") if "detected" in text][8:]
        browser.one("#reset").click()
        assert [browser.one(cell).text for cell in cells] == shown


def test_the_report_is_walked_by_keys(report):
    with Browser(report) as browser:
        browser.script("document.querySelectorAll('.card')[3].focus()")
        browser.press(browser.RIGHT)
        assert browser.script(f"return {FOCUSED}") == 4
        browser.press(browser.ENTER)
        assert browser.one("#large").is_displayed()
        caption = browser.one("#large .caption").text
        browser.press(browser.RIGHT)
        assert browser.one("#large .caption").text != caption
        browser.press(browser.ESCAPE)
        assert not browser.one("#large").is_displayed()
        assert browser.script(f"return {FOCUSED}") == 5


def test_what_to_try_next_is_printed_as_the_report_shows_it(project, report):
    def printed() -> list[str]:
        return project._run("python", "-m", "tools.advice", measured=True).stdout.splitlines()

    with Browser(report) as browser:
        commands = [line for text in browser.texts(".next pre") for line in text.splitlines()]
    assert "dvc exp run -S evaluation.calibration=cross" in commands  # 3 images calibrate
    assert [line.strip() for line in printed() if line.startswith(" " * 6)] == commands
    content = read_json(project.folder / "metrics" / "bolt" / "audit.json")["content"]
    one = {"model": "stfpm", "strides": [], "top_fraction": None, "override": {}, "worst": 0.5}
    other = one | {"model": "gaussian", "override": {"model": {"name": "gaussian"}}, "worst": 0.9}
    chosen = {"content": {"fit": content["fit"]}, "default": 0, "chosen": 1}
    selection = project.folder / "selection.json"
    selection.write_text(json.dumps({"bolt": chosen | {"candidates": [one, other]}}))
    page = report.read_bytes()
    assert any("gaussian is better than stfpm" in line for line in printed())
    project._run("python", "-m", "stages.report")
    assert report.read_bytes() == page  # what tools.select has found is in run.js alone
    with Browser(report) as browser:
        assert "gaussian is better than stfpm" in browser.texts(".next")[0]
        assert "gaussian" not in browser.texts(".next")[1]
    selection.unlink()
    project._run("python", "-m", "stages.report")


def test_markup_in_a_file_name_stays_text(report):
    with Browser(report) as browser:
        browser.one("#search").send_keys("onerror")
        assert browser.texts(".card .name") == [f"{MARKUP}.png"]
        browser.one(".card").click()
        assert f"bright/{MARKUP}.png: " in browser.one("#large .caption").text
        assert browser.find("img") == []


def test_the_plots_of_dvc_are_drawn_without_a_network(project):
    project._run("python", "-m", "tools.offline_plots", measured=True)
    project.dvc("plots", "show")
    page = project.folder / "dvc_plots" / "index.html"
    with Browser(page) as browser:
        assert browser.until(lambda: len(browser.find(".vega-embed svg.marks")) == 2 * 8)
        assert len(browser.find("img")) == 2 * 7
        assert all(url.startswith("file://") for url in browser.requests())


def test_the_notebook_runs_from_top_to_bottom(project):
    path = project.folder / "notebooks" / "eval_stfpm.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = notebook.cells[1].source.replace("mono", "bolt")
    NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 4
    expected = read_json(project.folder / "metrics" / "bolt" / "evaluate.json")["image_auroc"]
    assert f"'image_auroc': {expected!r}" in shown[0]["text/plain"]
