import base64
import csv
import io
import json
import re
import subprocess

import numpy as np
import pytest
from builders.browser import Browser
from PIL import Image

from anomaly_detection.inference.files import COLUMNS
from anomaly_detection.report import DifferentTestImages, Trend, facts_script, plots, render, trends
from anomaly_detection.report.category import (
    CategoryResults,
    Pair,
    draw_gallery,
    draw_plots,
    gallery_rows,
    page_data,
    pairs_data,
    tables,
)
from anomaly_detection.report.history import history_curves
from anomaly_detection.report.page import flat, headlines, histogram, side_by_side
from anomaly_detection.report.thumbnails import BYTES_PER_IMAGE, thumbnails
from stages import provenance, report
from stages.plot import NUM_PAIRS
from stages.report import headlines as summary

RNG = np.random.default_rng(0)


NONE = {"pairs": 0, "images": 0}
DATA = {
    "content": {"test": "abc"},
    "num_images": {"test": 15},
    "near_duplicates": [],
    "num_near_duplicates": {"test": NONE, "calibration": NONE, "validation": NONE},
    "parts_in_train_and_test": [],
}


def metrics(**changes) -> dict:
    values = {
        "image_auroc": 0.9,
        "image_f1": 0.8,
        "false_reject_rate": 0.1,
        "miss_rate": 0.2,
        "threshold": 0.5,
        "threshold_method": "quantile",
        "size_unit": {"name": "% of the image's side", "per_side": 100},
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
            "method": "split",
            "requested_rate": 0.2,
            "false_reject_rate": {"expected": 0.1, "upper_95": 0.3},
            "thresholds": [
                {"rate": 0.02, "threshold": None, "images_needed": 49},
                {"rate": 0.1, "threshold": 0.8, "images_needed": 9},
            ],
        },
        "data": DATA,
    }
    return values | changes


def training(**changes) -> dict:
    values = {
        "model": "stfpm",
        "parameters": {"model": {"name": "stfpm"}, "training": {"learning_rate": 0.4}},
        "device": "cpu",
        "precision": "bfloat16",
        "hardware": {"cpu": "Xeon", "instructions": "AVX512, AMX"},
        "versions": {"torch": "2.14"},
        "best_epoch": 2,
        "best_metrics": {"val_loss": 1.5},
        "history": [
            {"epoch": 1, "train_loss": 3.0, "val_loss": 2.0, "learning_rate": 0.4},
            {"epoch": 2, "train_loss": 2.0, "val_loss": 1.5, "learning_rate": 0.4},
        ],
    }
    return values | changes


WITHOUT_EPOCHS = training(
    model="patchcore",
    parameters={"model": {"name": "patchcore", "layers": ["b.2", "b.4"]}, "training": {}},
    best_epoch=None,
    best_metrics=None,
    history=[],
)


PARITY = {
    "num_images": 2,
    "nearest_score": 0.03,
    "formats": {
        "onnx": {
            "num_verdicts_changed": 0,
            "largest_score_difference": 2.5e-7,
        }
    },
}


def category(**changes) -> dict:
    images = [
        {"path": "test/good/a.png", "defect_type": "good", "label": 0, "score": 0.1},
        {"path": "test/bad/b.png", "defect_type": "bad", "label": 1, "score": 0.9},
    ]
    values = {
        "name": "bolt",
        "metrics": metrics(),
        "training": training(),
        "images": images,
        "parity": PARITY,
        "pairs": [],
        "peaks": None,
        "sides": None,
    }
    return values | changes


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


def test_metrics_of_different_test_images_are_not_compared():
    other = metrics(data=metrics()["data"] | {"content": {"test": "other"}})
    with pytest.raises(DifferentTestImages):
        trends(metrics(), other)


def test_what_is_not_defined_has_no_trend_and_says_why():
    undefined = metrics(
        miss_rate=None,
        intervals=metrics()["intervals"] | {"miss_rate": None},
        undefined={"miss_rate": "there are no defective images."},
    )
    assert "miss_rate" not in trends(undefined, metrics())
    row = headlines(category(metrics=undefined))[2]
    assert row["text"](row["value"]) == "–"
    assert row["note"] == "there are no defective images."


def without_defects(**changes) -> dict:
    """A category with good test images alone."""
    names = ("image_auroc", "image_f1", "miss_rate")
    synthetic = {"num_images": 32, "size_detected_in_90_percent": 0.168, "detection_by_size": []}
    known = metrics(
        **dict.fromkeys(names),
        intervals=metrics()["intervals"] | dict.fromkeys(names),
        undefined=dict.fromkeys(names, "there are no defective images."),
        num_anomalous=0,
        num_misses=0,
        synthetic=synthetic,
    )
    images = category()["images"][:1]
    return category(**{"name": "nut", "metrics": known | changes, "images": images})


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
    ("changes", "note"),
    [
        ({"synthetic": None}, "not measured: evaluation.synthetic_images is 0"),
        (
            {"synthetic": {"num_images": 32, "size_detected_in_90_percent": None}},
            "of 32, less than 90 % are detected at the largest size",
        ),
    ],
)
def test_a_size_of_synthetic_defects_that_is_not_known_says_why(changes, note):
    row = headlines(without_defects(**changes))[0]
    assert row["text"](row["value"]) == "–"
    assert row["note"] == f"{note}; there are no defective test images"


def test_categories_with_and_without_defects_are_in_one_table():
    rows = table(render([category(), without_defects()]), "overview")
    heads = ["Image AUROC", "False rejects", "Misses", "Synthetic defects"]
    assert rows["Category"] == ["Model", *heads, "Fit, seconds"]
    assert rows["bolt"][1:5] == ["0.900", "10.0\u00a0%", "20.0\u00a0%", "–"]
    assert rows["nut"][1:5] == ["–", "10.0\u00a0%", "–", "16.8\u00a0%"]


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
    fitted = training(model=name, parameters={"model": {name: name}}, device=name)
    page = render([category(images=[image], training=fitted)])
    assert "alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    content = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(content)[0]["images"][0]["path"] == image["path"]


def test_the_page_names_no_address():
    addresses = set(re.findall(r"https?://[^\s\"'<]+", render([category()])))
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
    made = thumbnails(pictures, maps, [None] * 20)
    assert 64 < len(decode(made[0]["picture"])) < 256
    size = sum(len(url) for image in made for url in image.values() if url)
    assert size / 20 <= BYTES_PER_IMAGE * 4 / 3 + 100


PAIR = {"splits": ["test", "fit"], "paths": ["test/good/<b>.png", "train/good/a.png"]}


def test_near_duplicates_are_shown_side_by_side_with_their_splits():
    near = DATA["num_near_duplicates"] | {"test": {"pairs": 410, "images": 70}}
    data = DATA | {"near_duplicates": [PAIR | {"correlation": 0.987}], "num_near_duplicates": near}
    pair = np.stack([np.full((3, 64, 64), level, np.uint8) for level in (10, 200)])
    (shown,) = pairs_data(results(metrics=metrics(data=data), pairs=[Pair(pair, (1.0, 0.75))]))
    assert [decode(url).mean() for url in shown["pictures"]] == pytest.approx([10, 200], abs=2)
    page = render([category(metrics=metrics(data=data), pairs=[shown])])
    assert all(f'<img src="{url}"' in page for url in shown["pictures"])
    assert re.findall(r'style="aspect-ratio: (.*?)">', page) == ["1.0", "0.75"]
    assert "test: test/good/&lt;b&gt;.png<br>fit: train/good/a.png<br>correlation 0.99" in page
    assert "70 test images have" in page
    assert "410 pairs: the metrics may be optimistic" in page
    assert "threshold may be too low" not in page
    none = render([category()])
    assert "near-duplicates" not in none
    assert 'class="pairs"' not in none


def test_the_summary_counts_pairs_and_test_images():
    near = DATA["num_near_duplicates"] | {"test": {"pairs": 410, "images": 70}}
    row = summary(metrics(data=DATA | {"num_near_duplicates": near}))
    assert (row["num_near_duplicates"], row["num_near_duplicate_images"]) == (410, 70)


def test_a_page_of_500_images_and_near_duplicates_stays_below_5_mb():
    """The worst: noise, which does not compress."""
    number, given = 20, results()
    pictures = RNG.integers(0, 256, (number, 3, 256, 256), dtype=np.uint8)
    maps = RNG.random((number, 256, 256), dtype=np.float32)
    given = results(
        rows=given.rows * (number // 4),
        pictures=pictures,
        maps=maps,
        masks=[None] * number,
        aspects=[1.0] * number,
        metrics=given.metrics
        | {"data": DATA | {"near_duplicates": [PAIR | {"correlation": 0.9}] * NUM_PAIRS}},
        pairs=[Pair(pictures[:2], (1.0, 1.0))] * NUM_PAIRS,
    )
    data = page_data(given, "viridis")
    images = data["images"] * (500 // number)
    whole = category(**data | {"images": images, "parity": PARITY, "pairs": []})
    assert len(render([whole])) < 5e6


def test_the_scale_of_negative_maps_begins_at_its_lower_end():
    maps = np.full((1, 64, 64), -3, np.float32)
    maps[:, 32:] = -2.75
    (made,) = thumbnails(np.zeros((1, 3, 64, 64), np.uint8), maps, [None], map_low=-3, map_limit=-2)
    levels = decode(made["map"])
    assert set(levels[:14].ravel()) == {0}
    assert set(levels[18:].ravel()) == {128}  # 255 times the root of a quarter of the scale


def test_thumbnails_of_a_model_without_maps_have_none():
    (made,) = thumbnails(np.zeros((1, 3, 64, 64), np.uint8), None, [np.ones((64, 64), np.uint8)])
    assert made["map"] is None
    assert (decode(made["mask"]) == 255).all()
    assert decode(made["picture"]).max() <= 2


def test_parameters_stand_side_by_side_by_section_with_a_dash_for_none():
    first = {
        "model": {"name": "a", "layers": ["x", "y"]},
        "training": {"seed": 0},
        "a": {"b": 1e-5},
    }
    second = {"model": {"name": "b", "weights": None}, "training": {"amp": True}}
    assert side_by_side([flat(first), flat(second)]) == [
        ("model.name", ["a", "b"]),
        ("model.layers", ["x, y", "–"]),
        ("model.weights", ["–", "null"]),
        ("training.seed", ["0", "–"]),
        ("training.amp", ["–", "true"]),
        ("a.b", ["1e-05", "–"]),
    ]


def table(page: str, name: str) -> dict[str, list[str]]:
    """The cells of a table by its rows' first."""
    (body,) = re.findall(rf'<table id="{name}">(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return {first: others for first, *others in cells}


def test_the_page_says_which_model_each_category_has_and_how_it_was_fitted():
    categories = [category(), category(name="nut", training=WITHOUT_EPOCHS)]
    page = render(categories)
    headings = re.findall(r'<h3>(\w+) <span class="model">(\w+)</span>', page)
    assert headings == [("bolt", "stfpm"), ("nut", "patchcore")]
    assert table(page, "parameters") == {
        "": ["bolt", "nut"],
        "model.name": ["stfpm", "patchcore"],
        "model.layers": ["–", "b.2, b.4"],
        "training.learning_rate": ["0.4", "–"],
    }
    fits = table(page, "fits")
    assert fits["kept epoch"] == ["2", "–"]
    assert fits["CPU"] == ["Xeon", "Xeon"]
    assert fits["instruction set"] == ["AVX512, AMX", "AVX512, AMX"]
    assert fits["precision"] == ["bfloat16", "bfloat16"]
    assert fits["torch"] == ["2.14", "2.14"]


def test_several_categories_are_compared_in_one_table_and_a_single_one_is_not():
    categories = [category(), category(name="nut", training=WITHOUT_EPOCHS)]
    rows = table(render(categories), "overview")
    assert rows["Category"] == ["Model", "Image AUROC", "False rejects", "Misses", "Fit, seconds"]
    assert [row[0] for row in rows.values()] == ["Model", "stfpm", "patchcore"]
    assert 'id="overview"' not in render(categories[:1])


def results(**changes) -> CategoryResults:
    """Two normal and two anomalous images of 64 x 64 pixels; the maps are 0 to 3."""
    scores, labels = (0.1, 0.6, 0.3, 0.95), (0, 0, 1, 1)
    values = {
        "name": "bolt",
        "training": training(),
        "metrics": metrics(
            image_average_precision=0.8,
            per_defect_type={},
            num_normal=2,
            num_anomalous=2,
        ),
        "rows": [
            {
                "path": f"test/x/{i}.png",
                "defect_type": "x" if label else "good",
                "label": str(label),
                "score": str(score),
                "pred_label": str(int(score > 0.5)),
            }
            for i, (score, label) in enumerate(zip(scores, labels, strict=True))
        ],
        "pictures": np.full((4, 3, 64, 64), 90, np.uint8),
        "maps": np.arange(4, dtype=np.float32)[:, None, None] * np.ones((64, 64), np.float32),
        "masks": [None] * 4,
        "aspects": [1.0] * 4,
    }
    return CategoryResults(**(values | changes))


ONE_CLASS = [row | {"label": "0"} for row in results().rows]


@pytest.mark.parametrize(
    "given",
    [
        results(),
        results(maps=results().maps - 5),
        results(maps=None, training=WITHOUT_EPOCHS),
        results(rows=ONE_CLASS, maps=np.zeros((4, 64, 64), np.float32)),
    ],
    ids=["usual", "negative", "no maps, no epochs", "one class, no signal"],
)
def test_every_model_and_data_set_gives_the_same_files(given, tmp_path):
    draw_plots(given, tmp_path, 2, "viridis")
    names = ["confusion_matrix", "detection", "gallery", "loss"]
    names += ["precision_recall", "roc", "scores"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.png" for name in names]
    made = tables(given)
    assert sorted(made) == sorted({*names} - {"gallery", "scores"})
    assert all(len({len(column) for column in table.values()}) == 1 for table in made.values())


def test_tables_hold_what_the_plots_show():
    made = tables(results())
    assert made["loss"] == {
        "epoch": [1, 2, 1, 2],
        "loss": [3.0, 2.0, 2.0, 1.5],
        "split": ["training", "training", "validation", "validation"],
    }
    assert made["confusion_matrix"]["truth"].tolist() == ["good"] * 2 + ["defective"] * 2
    assert made["confusion_matrix"]["verdict"].tolist() == ["passed", "rejected"] * 2
    # Down the scores: a hit, a false reject, a hit.
    assert made["roc"]["false_reject_rate"].tolist() == [0, 0, 0.5, 0.5, 1]
    assert made["roc"]["detection_rate"].tolist() == [0, 0.5, 0.5, 1, 1]


def test_tables_without_a_curve_have_their_header_only():
    made = tables(results(rows=ONE_CLASS, training=WITHOUT_EPOCHS))
    assert made["loss"] == {"epoch": [], "loss": [], "split": []}
    assert made["detection"] == {"size": [], "detection_rate": []}
    assert {name: len(column) for name, column in made["roc"].items()} == {
        "false_reject_rate": 0,
        "detection_rate": 0,
        "low": 0,
        "high": 0,
    }


def test_a_gallery_has_the_highest_the_nearest_and_the_lowest_scores():
    rows = gallery_rows(np.array([5.0, 1.0, 3.0, 2.0]), 2.9, 2)
    assert {title: chosen.tolist() for title, chosen in rows.items()} == {
        "highest scores": [0, 2],
        "nearest to the threshold": [2, 3],
        "lowest scores": [1, 3],
    }


@pytest.mark.parametrize("shift", [0, 1, -2, -9])
def test_a_constant_added_to_all_maps_shifts_the_colours_of_the_gallery(
    shift, tmp_path, monkeypatch
):
    given = {}
    monkeypatch.setattr(plots, "plot_gallery", lambda *args, **options: given.update(options))
    draw_gallery(results(maps=results().maps + shift), 1, "gray", tmp_path / "gallery.png")
    assert given["color_low"] == 1.5 + shift  # the median of maps of 0, 1, 2 and 3
    assert given["color_limit"] == pytest.approx(2.7 + shift)


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        (results().maps, (1.5, 3)),
        (results().maps - 5, (-3.5, -2)),
        (results().maps * 0, (0, 1)),
        (results().maps * 0 - 2, (-2, -1)),
        (None, (0, 1)),
    ],
)
def test_colours_rise_from_the_median_to_the_highest_value(maps, expected):
    assert results(maps=maps).map_range == expected


def test_the_peaks_of_good_maps_at_the_border_are_counted():
    maps = np.zeros((4, 64, 64), np.float32) - 9
    maps[0, 3, 30] = -1  # good, within a sixteenth of the side of the upper edge
    maps[1, 4, 30] = -1  # good, just inside
    maps[2:, 0, 0] = -1  # defective: they do not count
    peaks = page_data(results(maps=maps, side=300), "gray")["peaks"]
    assert peaks == {
        "at_border": 1,
        "num_images": 2,
        "low": pytest.approx(1 - 0.975**0.5),
        "area": 1 - 56**2 / 64**2,
    }
    flat = page_data(results(maps=maps * 0, side=300), "gray")["peaks"]
    assert (flat["at_border"], flat["num_images"]) == (0, 0)
    assert page_data(results(maps=None, side=300), "gray")["peaks"] is None
    assert page_data(results(maps=maps), "gray")["peaks"] is None  # tiled
    assert page_data(results(side=300), "gray")["sides"] == {"image": 300, "seen": 64}


def test_page_data_holds_each_score_exactly_as_it_was_compared():
    data = page_data(results(), "gray")
    assert data["images"][1]["score"] == float(np.float32(0.6)) != 0.6
    assert data["curves"]["roc"][-1][:2] == [1, 1]
    assert data["history"]["curves"]["validation"] == [(1, 2.0), (2, 1.5)]
    assert data["colors"][:6] == [0, 0, 0, 1, 1, 1]
    assert page_data(results(rows=ONE_CLASS), "gray")["curves"] == {}


def test_the_page_shows_what_the_exports_were_found_to_do():
    page = render([category()])
    table = page[page.index('id="parity"') :]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table[: table.index("</table>")])
    assert cells == ["bolt", "onnx", "0 of 2", "2.5e-07", "3.0e-02"]


def test_history_curves_are_the_losses_if_there_are_any():
    assert history_curves(training()["history"]).title == "Loss"
    found = history_curves([{"epoch": 1, "train_a": 1, "val_score": 2, "loss": 3, "val_x": None}])
    assert found == ("Training", {"train a": [(1, 1)], "val score": [(1, 2)]})
    assert history_curves([]).curves == {}


def open_page(folder, *given, facts=FACTS, of=()) -> Browser:
    """The page with a run's facts, if there are any, of the same results or of others."""
    pages, others = (
        json.loads(json.dumps([page_data(x, "inferno") | {"parity": PARITY} for x in results]))
        for results in (given, of or given)
    )
    page = folder / "index.html"
    page.write_text(render(pages), encoding="utf-8")
    if facts:
        (folder / "run.js").write_text(facts_script(others, facts), encoding="utf-8")
    return Browser(page)


DRAWN = "return [...document.querySelectorAll('.card canvas')].map((card) => card.toDataURL())"


def painted(browser: Browser) -> np.ndarray:
    """The pixels of each card (N, 256, 256, 4), as soon as all are painted."""

    def pixels() -> np.ndarray:
        files = [base64.b64decode(url.split(",")[1]) for url in browser.script(DRAWN)]
        return np.array([np.asarray(Image.open(io.BytesIO(file)), int) for file in files])

    browser.one("#gallery").location_once_scrolled_into_view  # noqa: B018, it scrolls
    assert browser.until(lambda: (pixels()[..., 3] == 255).all())
    return pixels()


def test_a_model_without_maps_and_epochs_is_shown_without_an_error(tmp_path):
    with open_page(tmp_path, results(maps=None, training=WITHOUT_EPOCHS)) as browser:
        assert np.abs(painted(browser)[..., :3] - 90).max() <= 2
        assert not browser.one("#blend").is_displayed()
        assert "not trained in epochs" in browser.one("#loss").text
        browser.find(".card")[0].click()
        assert browser.one("#large").is_displayed()
        assert browser.console() == []


WIDE = [0.25, 4 / 3, 1.0, 4 / 3]


def test_images_heat_maps_and_outlines_have_the_aspect_of_the_original(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 1
    with open_page(tmp_path, results(aspects=WIDE, masks=[mask] * 4)) as browser:
        browser.choose("#sort", "name")
        browser.one("#gallery").location_once_scrolled_into_view  # noqa: B018, it scrolls
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
        assert browser.console() == []


def test_a_row_of_the_table_sets_the_threshold_and_one_without_enough_images_says_so(tmp_path):
    with open_page(tmp_path, results()) as browser:
        assert browser.one("#keep").text.startswith("# this is the detector's threshold")
        assert browser.texts("#rates tbody tr") == [
            "2 % needs 49 calibration images",
            "10 % 0.8000 0.0 % 50.0 %",
        ]
        few, enough = browser.find("#rates button")
        assert not few.is_enabled()
        enough.click()
        assert browser.one("#misses").text == "1"
        assert browser.one("#false-rejects").text == "0"
        command = "dvc exp run -S evaluation.threshold_method=manual -S evaluation.threshold=0.8"
        assert browser.one("#keep").text == command
        assert len(browser.find("#rates [aria-current=true]")) == 1
        focused = browser.script("return document.activeElement.ariaLabel")
        assert focused == "Threshold for 10 % false rejects"
        assert "no estimate for new ones" in browser.one("#threshold").text
        assert browser.console() == []


def cheapest(ratio: float, share: float) -> tuple[int, int]:
    """The misses and false rejects of `results` that cost least; the fewest rejects of equals."""
    scores, labels = results().scores, results().labels
    candidates = []
    for threshold in (np.float32(-1), *scores):
        rejected = scores > threshold
        misses, rejects = (~rejected & (labels == 1)).sum(), (rejected & (labels == 0)).sum()
        cost = share * ratio * misses / 2 + (1 - share) * rejects / 2
        candidates.append((cost, rejected.sum(), misses, rejects))
    return tuple(int(x) for x in min(candidates)[2:])


@pytest.mark.parametrize("ratio", ["0.1", "1", "10", "1000"])
@pytest.mark.parametrize("share", [50, 1])
def test_the_costs_of_mistakes_set_the_cheapest_threshold(ratio, share, tmp_path):
    set_cost = f"""const cost = document.getElementById("cost");
        document.getElementById("share").value = {share};
        cost.value = COSTS.indexOf({ratio});
        cost.dispatchEvent(new Event("input"))"""
    with open_page(tmp_path, results()) as browser:
        assert browser.script("return document.getElementById('share').value") == "50"
        browser.script(set_cost)
        found = tuple(int(browser.one(cell).text) for cell in ("#misses", "#false-rejects"))
        assert found == cheapest(float(ratio), share / 100)
        assert browser.one("#ratio").text == ratio
        assert "false rejects." in browser.one("#cheapest").text
        assert "evaluation.threshold_method=manual" in browser.one("#keep").text
        assert browser.console() == []


def test_the_verdicts_are_downloaded_as_csv_as_predict_writes_them(tmp_path):
    named = results().rows
    named[0]["path"] = 'test/x/a "quoted", name.png'
    with open_page(tmp_path, results(rows=named)) as browser:
        browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.choose("#sort", "name")
        browser.script("document.getElementById('download').click()")
        file = tmp_path / "verdicts.csv"
        assert browser.until(file.exists)
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        assert set(rows[0]) - {"label", "defect_type", "category"} <= set(COLUMNS)
        assert sorted(row["path"] for row in rows) == sorted(row["path"] for row in named)
        by_path = {row["path"]: row for row in rows}
        for row in named:
            found = by_path[row["path"]]
            assert found["score"] == row["score"]
            assert found["threshold"] == "0.5"
            assert found["verdict"] == ("anomalous" if row["pred_label"] == "1" else "normal")
            assert found["label"] == ("anomalous" if row["label"] == "1" else "normal")
            assert (found["defect_type"], found["category"]) == (row["defect_type"], "bolt")
        browser.choose("#verdict", "missed")
        file.unlink()
        browser.script("document.getElementById('download').click()")
        assert browser.until(file.exists)
        assert len(file.read_text().splitlines()) == 2  # what is filtered
        assert browser.console() == []


def test_what_is_rejected_without_a_defect_has_its_interval_and_number_of_images(tmp_path):
    row = {"size": 0.1, "detection_rate": 0.5, "low": 0.2, "high": 0.8, "num_images": 32}
    synthetic = {
        "num_images": 64,
        "size_detected_in_90_percent": None,
        "detection_by_size": [row, row | {"size": 0.2}],
        "rejected_without_defect": 0.0,
        "rejected_without_defect_interval": [0.0, 0.369],
        "num_without_defect": 8,
    }
    known = results().metrics | {"synthetic": synthetic}
    with open_page(tmp_path, results(metrics=known)) as browser:
        expected = "without a defect: 0.0 % of 8 images rejected (95 %: 0.0 % to 36.9 %)"
        assert expected in browser.texts("#detection .legend li")


def test_what_to_try_next_is_shown_by_category_and_replaced_by_what_the_run_knows(tmp_path):
    poor = results().metrics | {"miss_rate": 0.6}
    with open_page(tmp_path, results(metrics=poor), NUT) as browser:
        first, second = browser.texts(".next")
        assert "Poor: 1 of 2 defective test images are missed, 60 %." in first
        assert "A reason\nmake it" in second  # from run.js
        assert browser.one(".next").rect["y"] < 900
    calibration = results().metrics["calibration"] | {"num_images": 15}
    good = results(name="nut", metrics=results().metrics | {"calibration": calibration})
    with open_page(tmp_path, good, facts=None) as browser:
        assert browser.texts(".next") == ["What next: nothing to suggest."]


NUT = results(name="nut")


def test_the_page_shows_the_facts_of_the_run(tmp_path):
    with open_page(tmp_path, results(), NUT) as browser:
        assert browser.one("#run").text == "abc The start · now"
        assert browser.texts(".trend") == [
            "within noise, was 0.850",
            "",
            "better, was 40.0 %",
            *[""] * 3,
        ]
        assert browser.texts("[data-note]") == ["", "Nothing to compare with."]
        assert browser.texts("[data-fit]") == ["–", "6.5"]
        assert browser.one("#commands").text == "git checkout abc\nmake repro"
        assert browser.texts("#speeds td") == ["nut", "onnx", "2.1", "3.0", "312"]
        assert browser.texts("#times td") == ["train@nut", "then", "6.5", "2"]
        assert browser.console() == []


@pytest.mark.parametrize(
    ("facts", "of"),
    [(None, ()), (FACTS, (results(training=WITHOUT_EPOCHS), NUT))],
    ids=["none", "of other results"],
)
def test_the_page_without_a_run_of_its_own_shows_no_facts_and_says_so(facts, of, tmp_path):
    with open_page(tmp_path, results(), NUT, facts=facts, of=of) as browser:
        assert "no run.js for these results" in browser.one("#run").text
        hidden = browser.find(".trend, .of-run, [data-note]")
        assert len(hidden) == 6 + 2 + 2
        assert not any(element.is_displayed() for element in hidden)
        assert browser.texts("[data-fit]") == ["–", "–"]
        assert len(browser.find(".card")) == 8
        assert all("run.js" in line for line in browser.console())


def test_the_facts_of_a_run_keep_markup_as_text(tmp_path):
    name = "</script><img src=x onerror=alert(1)>"
    facts = FACTS | {"revision": name, "commands": [name], "trends": {"bolt": name}}
    with open_page(tmp_path, results(), facts=facts) as browser:
        assert browser.one("#run").text == f"{name} · now"
        assert browser.one("#commands").text == browser.one("[data-note]").text == name
        assert browser.find("img") == []


def test_maps_that_differ_by_a_constant_look_alike(tmp_path):
    shift = 5.0  # the maps, the scores and the threshold
    rows = [row | {"score": str(float(row["score"]) - shift)} for row in results().rows]
    moved = metrics(image_average_precision=0.8, per_defect_type={}, threshold=0.5 - shift)
    ramps = results().maps * np.arange(64, dtype=np.float32) / 64
    with open_page(tmp_path, results(maps=ramps)) as browser:
        expected = painted(browser)
    assert len(np.unique(expected[:, 0], axis=0)) == 4  # each map another one
    with open_page(tmp_path, results(maps=ramps - 5, rows=rows, metrics=moved)) as browser:
        np.testing.assert_array_equal(painted(browser), expected)
        browser.script("document.getElementById('outlines').click()")
        assert browser.until(lambda: (painted(browser) != expected).any())  # there were outlines
        assert browser.console() == []


def test_the_page_draws_the_curves_of_a_history_in_their_order(tmp_path):
    history = [
        {"epoch": k, "train_z_loss": 3.0, "train_a_loss": 2.0, "val_loss": 1.0} for k in (1, 2)
    ]
    with open_page(tmp_path, results(training=training(history=history, best_epoch=1))) as browser:
        labels = browser.texts("#loss .legend li")
        assert labels == ["train z loss", "train a loss", "validation", "kept: epoch 1"]
        assert len(browser.find("#loss path.line")) == 4
        assert browser.console() == []


def test_the_mean_of_other_test_images_says_so():
    def of(name: str, test: str) -> dict:
        return category(name=name, metrics=metrics(data={"content": {"test": test, "fit": "x"}}))

    pair = [of("bolt", "a"), of("nut", "b")]
    named = report.test_images(pair)
    assert re.fullmatch("bolt, nut: [0-9a-f]{8}", named)
    assert report.test_images([of("bolt", "a"), of("nut", "b")]) == named
    assert report.test_images([of("bolt", "a"), of("nut", "c")]) != named
    assert report.test_images([of(f"part{k}", "a") for k in range(9)]).startswith("9 categories: ")


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
