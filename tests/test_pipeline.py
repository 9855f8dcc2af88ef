"""The real `dvc repro`: what it writes, and what a person sees of it."""

import json
import shutil

import nbformat
import numpy as np
import pytest
import torch
from builders.browser import DESKTOP, PHONE, Browser
from builders.projects import ALL, EVERY_CATEGORY, MARKUP, ROOT, Project, ran, stages
from nbclient import NotebookClient

from anomaly_detection import Detector

# In the report: the opacity in the middle of the first image, and the number of the focused one.
FIRST_CANVAS = (
    "document.querySelector('.card canvas').getContext('2d', { willReadFrequently: true })"
    ".getImageData(128, 128, 1, 1).data[3]"
)
FOCUSED = "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
PLOTS = {
    *("gallery.png", "scores.png"),
    *(
        f"{name}.{kind}"
        for name in ("confusion_matrix", "detection", "loss", "precision_recall", "roc")
        for kind in ("csv", "png")
    ),
}


@pytest.mark.long
def test_the_default_pipeline_detects_defects_of_the_built_in_solar_cells(tmp_path):
    """All stages with the default model, its weights and both exports; smaller, for one epoch."""
    project = Project(tmp_path / "project")
    shutil.copy(ROOT / "params.yaml", project.folder)
    project.change("data", image_size=64)
    project.change("training", num_epochs=1)
    project.change("evaluation", synthetic_images=1)
    assert project.repro() == stages(ALL, EVERY_CATEGORY, ["mono"])
    metrics = project.json("metrics/mono/evaluate.json")
    assert (metrics["num_normal"], metrics["num_anomalous"]) == (117, 313)
    assert metrics["image_auroc"] > 0.6
    parity = project.json("metrics/mono/parity.json")["formats"]
    assert {x: found["num_verdicts_changed"] for x, found in parity.items()} == dict.fromkeys(
        ("predict", "onnx", "openvino"), 0
    )


def test_the_pipeline_writes_what_it_promises(finished):
    for category in ("bolt", "nut"):
        metrics = finished.json(f"metrics/{category}/evaluate.json")
        assert (metrics["num_normal"], metrics["num_anomalous"]) == (4, 8)
        assert set(metrics["per_defect_type"]) == {"bright", "dark"}
        assert metrics["image_auroc"] > 0.5
        assert ("aupro" in metrics) == (category == "bolt")
        plots = finished.folder / "plots" / category
        assert {path.name for path in plots.iterdir()} == PLOTS
    summary = finished.json("metrics/summary.json")
    assert list(summary) == ["bolt", "nut", "mean"]
    aurocs = [summary[name]["image_auroc"] for name in ("bolt", "nut")]
    assert summary["mean"]["image_auroc"] == pytest.approx(np.mean(aurocs))
    assert summary["mean"]["test_images"].startswith("bolt, nut: ")
    # The built-in images are not written where nobody asks for them.
    assert [path.name for path in (finished.folder / "data/elpv").iterdir()] == ["note.txt"]


def test_verdicts_follow_from_the_scores_and_the_threshold(finished):
    threshold = finished.json("metrics/bolt/evaluate.json")["threshold"]
    rows = finished.rows("predictions/bolt/scores.csv")
    maps = np.load(finished.folder / "predictions/bolt/anomaly_maps.npy")
    assert maps.shape == (len(rows), 64, 64)
    for row in rows:
        assert int(row["pred_label"]) == (float(row["score"]) > threshold)
    top = np.sort(maps.reshape(len(rows), -1))[:, -41:].mean(axis=1)
    assert [float(row["score"]) for row in rows] == pytest.approx(top, rel=1e-5)


def test_the_checkpoint_is_self_contained_and_says_what_was_fitted_how(finished):
    folder = finished.folder / "checkpoints" / "bolt"
    assert [path.name for path in folder.iterdir()] == ["best_model.pth"]
    content = torch.load(folder / "best_model.pth", weights_only=True)
    assert content["image_size"] == 64
    assert content["parameters"]["training"]["batch_size"] == 8
    assert content["parameters"]["training"]["learning_rate"] == 2e-3  # auto, resolved
    assert content["hyperparameters"]["backbone"] == "tf_efficientnet_lite0"
    assert not any("optimizer" in key or "random" in key for key in content)
    facts = finished.json("metrics/bolt/train.json")
    assert facts["model"] == facts["parameters"]["model"]["name"] == "stfpm"
    assert "auto" not in (facts["parameters"]["training"] | {"precision": None}).values()
    assert set(facts["hardware"]) >= {"cpu", "instructions"}
    assert facts["best_epoch"] in [row["epoch"] for row in facts["history"]]


def test_the_detector_gives_the_verdicts_of_the_evaluation_from_the_files(finished):
    for category in ("bolt", "nut"):
        detector = Detector.load(finished.folder / "detectors" / f"{category}.pt")
        for row in finished.rows(f"predictions/{category}/scores.csv"):
            prediction = detector.predict(finished.folder / "parts" / category / row["path"])
            assert prediction.verdict == ("anomalous" if row["pred_label"] == "1" else "normal")
            assert prediction.score == pytest.approx(float(row["score"]), rel=1e-4)
        metrics = finished.json(f"metrics/{category}/evaluate.json")
        assert detector.threshold == metrics["threshold"]
        assert detector.provenance["category"] == category
        assert detector.provenance["data"] == metrics["data"]["content"]


@pytest.fixture(scope="module")
def report(finished):
    return finished.folder / "report" / "index.html"


@pytest.fixture(scope="module")
def chromium(report):
    with Browser(report) as browser:
        yield browser


@pytest.fixture
def browser(chromium, report):
    """The report, opened anew."""
    chromium.driver.get(report.as_uri())
    chromium.console()
    return chromium


@pytest.fixture(scope="module")
def images(finished) -> list[dict]:
    """What the report shows of each image, with the threshold of its category."""
    contents = [finished.json(f"report_data/{name}.json") for name in ("bolt", "nut")]
    return [
        image | {"category": content["name"], "threshold": content["metrics"]["threshold"]}
        for content in contents
        for image in content["images"]
    ]


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (PHONE, True)])
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


def test_the_gallery_sorts_filters_and_searches(browser, images):
    def wrong(image: dict) -> float:
        margin = (image["score"] - image["threshold"]) / abs(image["threshold"])
        return margin if image["label"] else -margin

    def names(chosen: list[dict]) -> list[str]:
        return [image["path"].split("/")[-1] for image in chosen]

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


def test_the_threshold_slider_gives_the_confusion_matrix_of_python(browser, images):
    scores, labels = (np.array([x[key] for x in images[:12]]) for key in ("score", "label"))
    cells = ("#true-passes", "#false-rejects", "#misses", "#detections")

    def expected(threshold: float) -> list[str]:
        rejected = scores > threshold
        counts = [~rejected & (labels == 0), rejected & (labels == 0)]
        counts += [~rejected & (labels == 1), rejected & (labels == 1)]
        return [str(count.sum()) for count in counts]

    def shown() -> list[str]:
        return [browser.one(cell).text for cell in cells]

    assert shown() == expected(images[0]["threshold"])
    slider = browser.one("#slider")
    slider.send_keys(browser.HOME)
    assert shown() == expected(-np.inf)
    for score in np.unique(scores):
        slider.send_keys(browser.RIGHT)
        assert shown() == expected(score)
    assert browser.one("#miss-rate").text == "100.0 %"
    assert not [text for text in browser.texts(".card .line") if "detected" in text][8:]
    browser.one("#reset").click()
    assert shown() == expected(images[0]["threshold"])


def test_the_report_is_walked_by_keys(browser):
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


def test_markup_in_a_file_name_stays_text(browser):
    browser.one("#search").send_keys("onerror")
    assert browser.texts(".card .name") == [f"{MARKUP}.png"]
    browser.one(".card").click()
    assert f"bright/{MARKUP}.png: " in browser.one("#large .caption").text
    assert browser.find("img") == []


def test_what_to_try_next_is_printed_as_the_report_shows_it(finished, browser, tmp_path):
    project = finished.copy(tmp_path / "project")
    page = project.folder / "report" / "index.html"

    def printed() -> list[str]:
        return project.run("python", "-m", "tools.advice", measured=True).stdout.splitlines()

    commands = [line for text in browser.texts(".next pre") for line in text.splitlines()]
    assert "dvc exp run -S evaluation.calibration=cross" in commands  # 3 images calibrate
    assert [line.strip() for line in printed() if line.startswith(" " * 6)] == commands
    content = project.json("metrics/bolt/audit.json")["content"]
    one = {"model": "stfpm", "strides": [], "top_fraction": None, "override": {}, "worst": 0.5}
    other = one | {"model": "gaussian", "override": {"model": {"name": "gaussian"}}, "worst": 0.9}
    chosen = {"content": {"fit": content["fit"]}, "default": 0, "chosen": 1}
    selection = project.folder / "selection.json"
    selection.write_text(json.dumps({"bolt": chosen | {"candidates": [one, other]}}))
    before = page.read_bytes()
    assert any("gaussian is better than stfpm" in line for line in printed())
    project.stage("report")
    assert page.read_bytes() == before  # what tools.select has found is in run.js alone
    browser.driver.get(page.as_uri())
    assert "gaussian is better than stfpm" in browser.texts(".next")[0]
    assert "gaussian" not in browser.texts(".next")[1]


def test_the_plots_of_dvc_are_drawn_without_a_network(finished, chromium, tmp_path):
    project = finished.copy(tmp_path / "project")
    project.run("python", "-m", "tools.offline_plots", measured=True)
    project.dvc("plots", "show")
    chromium.requests()
    chromium.driver.get((project.folder / "dvc_plots" / "index.html").as_uri())
    assert chromium.until(lambda: len(chromium.find(".vega-embed svg.marks")) == 2 * 8)
    assert len(chromium.find("img")) == 2 * 7
    assert all(url.startswith("file://") for url in chromium.requests())


def test_the_notebook_runs_from_top_to_bottom(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    path = project.folder / "notebooks" / "eval_stfpm.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for own, ours in (('"mono", 256', '"bolt", 64'), ("data/elpv", "parts")):
        assert own in notebook.cells[1].source
        notebook.cells[1].source = notebook.cells[1].source.replace(own, ours)
    NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 4
    expected = project.json("metrics/bolt/evaluate.json")["image_auroc"]
    assert f"'image_auroc': {expected!r}" in shown[1]["text/plain"]


def test_a_second_fit_and_evaluation_change_no_byte_that_git_or_dvc_knows(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    lock = (project.folder / "dvc.lock").read_bytes()
    (project.folder / "README.md").open("a").write("A change that has no part in the results.\n")
    project.commit("another commit")
    again = ["train@bolt", "evaluate@bolt", "report"]
    assert project.repro("--force", "--single-item", *again) == sorted(again)
    assert (project.folder / "dvc.lock").read_bytes() == lock
    assert project.git("status", "--porcelain") == ""
    assert "another commit" in (project.folder / "report" / "run.js").read_text()


@pytest.mark.exhaustive
def test_a_second_run_of_everything_changes_no_byte_that_git_or_dvc_knows(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    lock = (project.folder / "dvc.lock").read_bytes()
    output = project.dvc("repro", "--force")
    assert ran(output) == stages(ALL, EVERY_CATEGORY, ["bolt", "nut"])
    assert (project.folder / "dvc.lock").read_bytes() == lock
    assert project.git("status", "--porcelain") == ""
