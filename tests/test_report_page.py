"""The report's page: what stands in it, and what it does in a browser."""

import base64
import csv
import io
import json
import re
from itertools import product

import numpy as np
import pytest
from builders.browser import Browser
from builders.reports import DATA, PARITY, WITHOUT_EPOCHS, category, metrics, results, training
from PIL import Image

from anomaly_detection.inference.files import COLUMNS
from anomaly_detection.report import Trend, facts_script, render
from anomaly_detection.report.category import page_data
from anomaly_detection.report.page import flat, headlines, histogram, side_by_side


def table(page: str, name: str) -> dict[str, list[str]]:
    """The cells of a table by its rows' first."""
    (body,) = re.findall(rf'<table id="{name}">(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return {first: others for first, *others in cells}


def without_defects(**changes) -> dict:
    """A category with good test images alone."""
    undefined = dict.fromkeys(("image_auroc", "image_f1", "miss_rate"))
    known = metrics(
        **undefined,
        intervals=metrics()["intervals"] | undefined,
        undefined=dict.fromkeys(undefined, "there are no defective images."),
        num_anomalous=0,
        num_misses=0,
        synthetic={"num_images": 32, "size_detected_in_90_percent": 0.168, "detection_by_size": []},
    )
    return category(name="nut", metrics=known | changes, images=category()["images"][:1])


def test_without_defects_synthetic_ones_come_first_and_nothing_is_empty():
    first, second = headlines(without_defects())
    assert (first["title"], first["text"](first["value"])) == ("Synthetic defects", "16.8\u00a0%")
    assert first["note"].startswith("size, % of the image's side, from which on 90 % of 32 are")
    assert second["title"] == "False rejects"
    page = render([without_defects()])
    assert "Misses" not in page.split("<section")[1]
    assert "missed</button>" not in page
    assert "missed</button>" in render([category()])


@pytest.mark.parametrize(
    ("synthetic", "note"),
    [
        (None, "not measured: evaluation.synthetic_images is 0"),
        (
            {"num_images": 32, "size_detected_in_90_percent": None},
            "of 32, less than 90 % are detected at the largest size",
        ),
    ],
)
def test_what_is_not_known_says_why(synthetic, note):
    row = headlines(without_defects(synthetic=synthetic))[0]
    assert row["text"](row["value"]) == "–"
    assert row["note"] == f"{note}; there are no defective test images"
    undefined = {"miss_rate": "there are no defective images."}
    row = headlines(category(metrics=metrics(miss_rate=None, undefined=undefined)))[2]
    assert row["text"](row["value"]) == "–"
    assert row["note"] == undefined["miss_rate"]


def test_categories_are_compared_in_one_table_and_a_single_one_is_not():
    rows = table(render([category(training=WITHOUT_EPOCHS), without_defects()]), "overview")
    heads = ["Image AUROC", "False rejects", "Misses", "Synthetic defects"]
    assert rows["Category"] == ["Model", *heads, "Fit, seconds"]
    assert rows["bolt"][:5] == ["patchcore", "0.900", "10.0\u00a0%", "20.0\u00a0%", "–"]
    assert rows["nut"][:5] == ["stfpm", "–", "10.0\u00a0%", "–", "16.8\u00a0%"]
    both = table(render([category(), category(name="nut")]), "overview")
    assert both["Category"] == ["Model", *heads[:3], "Fit, seconds"]
    assert 'id="overview"' not in render([category()])


def test_histogram_has_the_shares_of_each_kind_and_the_threshold():
    images = [{"label": 0, "score": 0.0}] * 3 + [{"label": 0, "score": 1.0}]
    images += [{"label": 1, "score": 1.0}] * 2
    assert histogram(category(images=images)) == {
        "normal": [0.75] + [0] * 34 + [0.25],
        "anomalous": [0] * 35 + [1],
        "threshold": 0.5,
    }


def test_the_page_keeps_markup_as_text():
    name = "<script>alert(1)</script>"
    image = {"path": f"test/bad/{name}.png", "defect_type": name, "label": 1, "score": 1.0}
    fitted = training(model=name, parameters={"model": {name: name}}, device=name)
    page = render([category(images=[image], training=fitted)])
    assert "alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    content = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(content)[0]["images"][0]["path"] == image["path"]


def test_the_page_names_no_address():
    addresses = set(re.findall(r"https?://[^\s\"'<]+", render([category()])))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a namespace


def test_near_duplicates_are_shown_side_by_side_with_their_splits():
    near = DATA["num_near_duplicates"] | {"test": {"pairs": 410, "images": 70}}
    urls = ["data:image/webp;base64,one", "data:image/webp;base64,two"]
    pair = {"splits": ["test", "fit"], "paths": ["test/good/<b>.png", "train/good/a.png"]}
    pair |= {"correlation": 0.987, "pictures": urls, "aspects": [1.0, 0.75]}
    known = metrics(data=DATA | {"num_near_duplicates": near})
    page = render([category(metrics=known, pairs=[pair])])
    shown = re.findall(r'<img src="(.*?)" alt=".*?" style="aspect-ratio: (.*?)">', page)
    assert shown == [(urls[0], "1.0"), (urls[1], "0.75")]
    assert "test: test/good/&lt;b&gt;.png<br>fit: train/good/a.png<br>correlation 0.99" in page
    assert "70 test images have" in page
    assert "410 pairs: the metrics may be optimistic" in page
    assert "threshold may be too low" not in page
    none = render([category()])
    assert "near-duplicates" not in none
    assert 'class="pairs"' not in none


def test_parameters_stand_side_by_side_by_section_with_a_dash_for_none():
    model = {"name": "a", "layers": ["x", "y"]}
    first = {"model": model, "training": {"seed": 0}, "a": {"b": 1e-5}}
    second = {"model": {"name": "b", "weights": None}, "training": {"amp": True}}
    assert side_by_side([flat(first), flat(second)]) == [
        ("model.name", ["a", "b"]),
        ("model.layers", ["x, y", "–"]),
        ("model.weights", ["–", "null"]),
        ("training.seed", ["0", "–"]),
        ("training.amp", ["–", "true"]),
        ("a.b", ["1e-05", "–"]),
    ]


def test_the_page_says_how_each_category_was_fitted_and_what_its_exports_were_found_to_do():
    page = render([category(), category(name="nut", training=WITHOUT_EPOCHS)])
    headings = re.findall(r'<h3>(\w+) <span class="model">(\w+)</span>', page)
    assert headings == [("bolt", "stfpm"), ("nut", "patchcore")]
    assert table(page, "parameters") == {
        "": ["bolt", "nut"],
        "model.name": ["stfpm", "patchcore"],
        "model.layers": ["–", "b.2, b.4"],
        "training.learning_rate": ["0.4", "–"],
    }
    assert table(page, "fits") == {
        "": ["bolt", "nut"],
        "model": ["stfpm", "patchcore"],
        "kept epoch": ["2", "–"],
        "device": ["cpu"] * 2,
        "precision": ["bfloat16"] * 2,
        "CPU": ["Xeon"] * 2,
        "instruction set": ["AVX512, AMX"] * 2,
        "torch": ["2.14"] * 2,
    }
    for name in ("bolt", "nut"):
        assert table(page, "parity")[name] == ["onnx", "0 of 2", "2.5e-07", "3.0e-02"]


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    blank = tmp_path_factory.mktemp("blank") / "index.html"
    blank.write_text("")
    with Browser(blank) as browser:
        yield browser


NUT = results(name="nut")
FACTS = {
    "revision": "abc The start",
    "made": "now",
    "commands": ["git checkout abc", "make repro"],
    "trends": {
        "bolt": {"image_auroc": Trend(0.85, "within noise"), "miss_rate": Trend(0.4, "better")},
        "nut": "Nothing to compare with.",
    },
    "times": [{"stage": "train@nut", "ended": "then", "seconds": 6.54, "peak_memory": 2e6}],
    "next": {"nut": {"faults": [], "steps": [{"reason": "A reason", "command": "make it"}]}},
    "speeds": {"nut": {"onnx": {"p50": 2.06, "p99": 3.0, "images_per_second": 312.4}}},
}


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page with a run's facts, if there are any, of the same results or of others."""
    folders, allowed = iter("abc"), []
    browser.console()

    def shown(*given, facts=FACTS, of=()) -> Browser:
        pages, others = (
            json.loads(json.dumps([page_data(x, "inferno") | {"parity": PARITY} for x in found]))
            for found in (given, of or given)
        )
        page = tmp_path / next(folders) / "index.html"
        page.parent.mkdir()
        page.write_text(render(pages), encoding="utf-8")
        if facts:
            page.with_name("run.js").write_text(facts_script(others, facts), encoding="utf-8")
        else:
            allowed.append("run.js")
        browser.driver.get(page.as_uri())
        return browser

    yield shown
    errors = [line for line in browser.console() if not any(name in line for name in allowed)]
    assert errors == []


DRAWN = "return [...document.querySelectorAll('.card canvas')].map((card) => card.toDataURL())"


def painted(browser: Browser) -> np.ndarray:
    """The pixels of each card (N, 256, 256, 4), as soon as all are painted."""

    def pixels() -> np.ndarray:
        files = [base64.b64decode(url.split(",")[1]) for url in browser.script(DRAWN)]
        return np.array([np.asarray(Image.open(io.BytesIO(file)), int) for file in files])

    browser.script("byId('gallery').scrollIntoView()")
    assert browser.until(lambda: (pixels()[..., 3] == 255).all())
    return pixels()


COUNTS = ("#true-passes", "#false-rejects", "#misses", "#detections")


def counts(browser: Browser) -> list[int]:
    return [int(browser.one(cell).text) for cell in COUNTS]


def test_a_model_without_maps_and_epochs_is_shown_without_an_error(show):
    browser = show(results(maps=None, training=WITHOUT_EPOCHS))
    assert np.abs(painted(browser)[..., :3] - 90).max() <= 2
    assert not browser.one("#blend").is_displayed()
    assert "not trained in epochs" in browser.one("#loss").text
    browser.find(".card")[0].click()
    assert browser.one("#large").is_displayed()


def test_images_heat_maps_and_outlines_have_the_aspect_of_the_original(show):
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 1
    browser = show(results(aspects=[0.25, 4 / 3, 1.0, 4 / 3], masks=[mask] * 4))
    browser.choose("#sort", "name")
    browser.script("byId('gallery').scrollIntoView()")
    shapes = DRAWN.replace("card.toDataURL()", "[card.width, card.height]")
    assert browser.script(shapes) == [[64, 256], [256, 192], [256, 256], [256, 192]]
    code = """const canvas = document.querySelectorAll('.card canvas')[1];
        const data = canvas.getContext('2d').getImageData(0, 50, canvas.width, 1).data;
        return data[3] && [...Array(canvas.width).keys()].filter((x) => data[4 * x] < 30)"""
    # The mask's right edge, green, is at half of the width in any row.
    assert browser.until(lambda: browser.script(code) == [127])
    browser.find(".card")[1].click()
    box = browser.one("#large canvas").rect
    assert box["width"] / box["height"] == pytest.approx(4 / 3, rel=0.01)


def test_the_slider_moves_one_more_image_below_the_threshold_at_each_step(show):
    browser, given = show(results()), results()
    assert counts(browser) == [1, 1, 1, 1]
    ranked = given.labels[np.argsort(given.scores)]
    for rank in range(5):
        browser.script(
            f"byId('slider').value = {rank}; byId('slider').dispatchEvent(new Event('input'))"
        )
        passed, rejected = ranked[:rank], ranked[rank:]
        good, defective = ([(x == label).sum() for x in (passed, rejected)] for label in (0, 1))
        assert counts(browser) == [*good, *defective]
        assert browser.one("#false-reject-rate").text == f"{100 * good[1] / 2:.1f} %"
        assert browser.one("#miss-rate").text == f"{100 * defective[0] / 2:.1f} %"
    browser.one("#reset").click()
    assert counts(browser) == [1, 1, 1, 1]
    assert browser.texts("#metrics tr")[1:3] == [
        "F1 at the threshold 0.800 0.700 to 0.900",
        "Best F1 at any threshold 0.850 chosen on the test images: an upper bound",
    ]


def test_a_row_of_the_table_sets_the_threshold_and_one_without_enough_images_says_so(show):
    browser = show(results())
    assert browser.one("#keep").text.startswith("# this is the detector's threshold")
    assert browser.texts("#rates tbody tr") == [
        "2 % needs 49 calibration images",
        "10 % 0.8000 0.0 % 50.0 %",
    ]
    few, enough = browser.find("#rates button")
    assert not few.is_enabled()
    enough.click()
    assert counts(browser) == [2, 0, 1, 1]
    command = "dvc exp run -S evaluation.threshold_method=manual -S evaluation.threshold=0.8"
    assert browser.one("#keep").text == command
    assert len(browser.find("#rates [aria-current=true]")) == 1
    focused = browser.script("return document.activeElement.ariaLabel")
    assert focused == "Threshold for 10 % false rejects"
    assert "no estimate for new ones" in browser.one("#threshold").text


def cheapest(ratio: float, share: float) -> list[int]:
    """The misses and false rejects of `results` that cost least; the fewest rejects of equals."""
    scores, labels = results().scores, results().labels
    candidates = []
    for threshold in (np.float32(-1), *scores):
        rejected = scores > threshold
        misses, rejects = (~rejected & (labels == 1)).sum(), (rejected & (labels == 0)).sum()
        cost = share * ratio * misses / 2 + (1 - share) * rejects / 2
        candidates.append((cost, rejected.sum(), misses, rejects))
    return list(min(candidates)[2:])


def test_the_costs_of_mistakes_set_the_cheapest_threshold(show):
    browser = show(results())
    assert browser.script("return byId('share').value") == "50"
    for ratio, share in product(("0.1", "1", "10", "1000"), (50, 1)):
        browser.script(f"""byId("share").value = {share};
            byId("cost").value = COSTS.indexOf({ratio});
            byId("cost").dispatchEvent(new Event("input"))""")
        _, rejects, misses, _ = counts(browser)
        assert [misses, rejects] == cheapest(float(ratio), share / 100), (ratio, share)
        assert browser.one("#ratio").text == ratio
        assert "false rejects." in browser.one("#cheapest").text
        assert "evaluation.threshold_method=manual" in browser.one("#keep").text


def test_the_verdicts_are_downloaded_as_csv_as_predict_writes_them(show, tmp_path):
    named, file = results().rows, tmp_path / "verdicts.csv"
    named[0]["path"] = 'test/x/a "quoted", name.png'
    browser = show(results(rows=named))
    browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))

    def downloaded() -> list[dict[str, str]]:
        file.unlink(missing_ok=True)
        browser.script("byId('download').click()")
        assert browser.until(file.exists)
        with file.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))

    rows = downloaded()
    assert set(rows[0]) - {"label", "defect_type", "category"} <= set(COLUMNS)
    words = {"0": "normal", "1": "anomalous"}
    assert sorted(map(tuple, (row.values() for row in rows))) == sorted(
        (
            *(row["path"], row["score"], "0.5", words[row["pred_label"]]),
            *(words[row["label"]], row["defect_type"], "bolt"),
        )
        for row in named
    )
    browser.choose("#verdict", "missed")
    assert len(downloaded()) == 1  # what is filtered


def test_what_is_rejected_without_a_defect_has_its_interval_and_number_of_images(show):
    row = {"size": 0.1, "detection_rate": 0.5, "low": 0.2, "high": 0.8, "num_images": 32}
    synthetic = {
        "num_images": 64,
        "size_detected_in_90_percent": None,
        "detection_by_size": [row, row | {"size": 0.2}],
        "rejected_without_defect": 0.0,
        "rejected_without_defect_interval": [0.0, 0.369],
        "num_without_defect": 8,
    }
    browser = show(results(metrics=results().metrics | {"synthetic": synthetic}))
    expected = "without a defect: 0.0 % of 8 images rejected (95 %: 0.0 % to 36.9 %)"
    assert expected in browser.texts("#detection .legend li")


def test_what_to_try_next_is_shown_by_category_and_replaced_by_what_the_run_knows(show):
    browser = show(results(metrics=results().metrics | {"miss_rate": 0.6}), NUT)
    first, second = browser.texts(".next")
    assert "Poor: 1 of 2 defective test images are missed, 60 %." in first
    assert "A reason\nmake it" in second  # from run.js
    assert browser.one(".next").rect["y"] < 900
    calibration = results().metrics["calibration"] | {"num_images": 15}
    good = results(name="nut", metrics=results().metrics | {"calibration": calibration})
    assert show(good, facts=None).texts(".next") == ["What next: nothing to suggest."]


def test_the_page_shows_the_facts_of_the_run(show):
    browser = show(results(), NUT)
    assert browser.one("#run").text == "abc The start · now"
    trends = ["within noise, was 0.850", "", "better, was 40.0 %", "", "", ""]
    assert browser.texts(".trend") == trends
    assert browser.texts("[data-note]") == ["", "Nothing to compare with."]
    assert browser.texts("[data-fit]") == ["–", "6.5"]
    assert browser.one("#commands").text == "git checkout abc\nmake repro"
    assert browser.texts("#speeds td") == ["nut", "onnx", "2.1", "3.0", "312"]
    assert browser.texts("#times td") == ["train@nut", "then", "6.5", "2"]


@pytest.mark.parametrize(
    ("facts", "of"),
    [(None, ()), (FACTS, (results(training=WITHOUT_EPOCHS), NUT))],
    ids=["none", "of other results"],
)
def test_the_page_without_a_run_of_its_own_shows_no_facts_and_says_so(facts, of, show):
    browser = show(results(), NUT, facts=facts, of=of)
    assert "no run.js for these results" in browser.one("#run").text
    hidden = browser.find(".trend, .of-run, [data-note]")
    assert len(hidden) == 6 + 2 + 2
    assert not any(element.is_displayed() for element in hidden)
    assert browser.texts("[data-fit]") == ["–", "–"]
    assert len(browser.find(".card")) == 8


def test_the_facts_of_a_run_and_the_names_of_files_keep_markup_as_text(show):
    name = "</script><img src=x onerror=alert(1)>"
    rows = [row | {"path": f"x{name}", "defect_type": name} for row in results().rows]
    facts = FACTS | {"revision": name, "commands": [name], "trends": {"bolt": name}}
    browser = show(results(rows=rows), facts=facts)
    assert browser.one("#run").text == f"{name} · now"
    assert browser.one("#commands").text == browser.one("[data-note]").text == name
    assert browser.texts(".card .name") == ["script><img src=x onerror=alert(1)>"] * 4
    browser.find(".card")[0].click()
    assert browser.one("#large .caption").text.startswith(f"bolt/x{name}: ")
    assert browser.find("img") == []


def test_maps_that_differ_by_a_constant_look_alike(show):
    shift = 5.0  # the maps, the scores and the threshold
    rows = [row | {"score": str(float(row["score"]) - shift)} for row in results().rows]
    moved = results().metrics | {"threshold": 0.5 - shift}
    ramps = results().maps * np.arange(64, dtype=np.float32) / 64
    expected = painted(show(results(maps=ramps)))
    assert len(np.unique(expected[:, 0], axis=0)) == 4  # each map another one
    browser = show(results(maps=ramps - 5, rows=rows, metrics=moved))
    np.testing.assert_array_equal(painted(browser), expected)
    browser.script("byId('outlines').click()")
    assert browser.until(lambda: (painted(browser) != expected).any())  # there were outlines


def test_the_page_draws_the_curves_of_a_history_in_their_order(show):
    losses = {"train_z_loss": 3.0, "train_a_loss": 2.0, "val_loss": 1.0}
    history = [{"epoch": k} | losses for k in (1, 2)]
    browser = show(results(training=training(history=history, best_epoch=1)))
    labels = browser.texts("#loss .legend li")
    assert labels == ["train z loss", "train a loss", "validation", "kept: epoch 1"]
    assert len(browser.find("#loss path.line")) == 4
