"""The pictures of a report: plots, thumbnails, and what a category's results give to be drawn."""

import base64
import io

import numpy as np
import pytest
from builders.reports import DATA, PARITY, WITHOUT_EPOCHS, category, metrics, results, training
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

from anomaly_detection.metrics.visualization import (
    draw_precision_recall_curve,
    draw_roc_curve,
    plot_confusion_matrix,
    plot_nothing,
    plot_precision_recall_curve,
    plot_roc_curve,
    plot_score_histogram,
)
from anomaly_detection.report import plots, render
from anomaly_detection.report.category import (
    Pair,
    draw_gallery,
    draw_plots,
    gallery_rows,
    page_data,
    pairs_data,
    tables,
)
from anomaly_detection.report.history import history_curves
from anomaly_detection.report.plots import (
    plot_detection_by_size,
    plot_gallery,
    plot_losses,
)
from anomaly_detection.report.thumbnails import BYTES_PER_IMAGE, thumbnails
from stages.plot import NUM_PAIRS

RNG = np.random.default_rng(0)
LABELS = np.array([0, 0, 0, 0, 1, 1, 1])
SCORES = np.array([0.1, 0.3, 0.2, 0.5, 0.4, 0.9, 0.7])
IMAGES = RNG.integers(0, 256, (4, 3, 12, 12), dtype=np.uint8)
MAPS = RNG.random((4, 12, 12))
CAPTIONS = ["a", "b", "c", "d"]
HISTORY = [
    {"epoch": 1, "train_loss": 3, "val_loss": 3, "val_score": 9, "learning_rate": 0.4},
    {"epoch": 2, "train_loss": 2, "val_loss": 2, "val_score": 9, "learning_rate": 0.4},
    {"epoch": 3, "train_loss": 1, "val_loss": 2.5, "val_score": 9, "learning_rate": 0.4},
]
BY_SIZE = [
    {"size": 0.02, "detection_rate": 0.5, "low": 0.2, "high": 0.8},
    {"size": 0.2, "detection_rate": 1.0, "low": 0.6, "high": 1.0},
]


def gallery(save_path=None, rows=None, maps=MAPS, **options):
    rows = rows or {"highest": [0, 1, 2], "lowest": [3]}
    return plot_gallery(IMAGES, maps, CAPTIONS, rows, **options, save_path=save_path)


PLOTS = {
    "roc": lambda path=None: plot_roc_curve(SCORES, LABELS, path),
    "precision_recall": lambda path=None: plot_precision_recall_curve(SCORES, LABELS, path),
    "histogram": lambda path=None: plot_score_histogram(SCORES, LABELS, 0.45, path),
    "confusion": lambda path=None: plot_confusion_matrix(SCORES > 0.45, LABELS, path),
    "losses": lambda path=None: plot_losses(HISTORY, 2, path),
    "gallery": gallery,
    "gallery_without_maps": lambda path=None: gallery(path, maps=None),
    "gallery_without_signal": lambda path=None: gallery(
        path, maps=np.full_like(MAPS, -3.0), color_low=-3.0, color_limit=-3.0
    ),
    "detection": lambda path=None: plot_detection_by_size(BY_SIZE, 0.1, 0.2, path),
    "nothing": lambda path=None: plot_nothing("no images", path),
}


def line(figure, label):
    (found,) = [line for line in figure.axes[0].lines if str(line.get_label()).startswith(label)]
    return found


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def text(figure):
    (found,) = figure.texts
    return found.get_text()


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_each_plot_is_a_figure_and_the_same_png_wherever_it_is_written(plot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(plot(), Figure)
    assert not list(tmp_path.iterdir())
    path = tmp_path / "new" / "folder" / "plot.png"
    assert isinstance(plot(path), Figure)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
        darkest, brightest = image.convert("L").getextrema()
    assert darkest < brightest  # something is drawn
    plot(str(tmp_path / "two.png"))
    assert (tmp_path / "two.png").read_bytes() == path.read_bytes()


def test_curves_draw_the_points_of_scikit_learn_and_name_their_area():
    drawn = line(plot_roc_curve(SCORES, LABELS), "AUROC")
    np.testing.assert_array_equal(drawn.get_data(), roc_curve(LABELS, SCORES)[:2])
    assert drawn.get_label() == "AUROC 0.917"  # 11 of 12 pairs are in order
    figure = plot_precision_recall_curve(SCORES, LABELS)
    drawn, (precision, recall, _) = line(figure, "aver"), precision_recall_curve(LABELS, SCORES)
    np.testing.assert_array_equal(drawn.get_data(), [recall, precision])
    # Down the scores: two hits, one false alarm, one hit: (1 + 1 + 3 / 4) / 3.
    assert drawn.get_label() == "average precision 0.917"
    assert set(line(figure, "chance").get_ydata()) == {3 / 7}


@pytest.mark.parametrize("plot", [plot_roc_curve, plot_precision_recall_curve])
@pytest.mark.parametrize("label", [0, 1])
def test_a_curve_of_one_class_is_an_error_and_writes_nothing(plot, label, tmp_path):
    with pytest.raises(ValueError, match=rf"both classes, 0 and 1, got only \[{label}\]"):
        plot([1, 2, 3], np.full(3, label), tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_has_an_image_that_says_why():
    reason = "not defined: the test images are all of one class"
    assert text(draw_roc_curve(np.empty((0, 4)), None)) == reason
    assert text(draw_precision_recall_curve(np.empty((0, 2)), None, 0.0)) == reason
    for history in ([], [{"epoch": 1, "learning_rate": 0.1}]):
        assert text(plot_losses(history)) == "this model is not trained in epochs"
    assert text(plot_detection_by_size([])) == "not measured: there were no synthetic defects"


def test_histogram_bars_are_shares_of_their_kind_and_the_threshold_stands_where_it_is():
    figure = plot_score_histogram(SCORES, LABELS, 0.45)
    for bars in figure.axes[0].containers:
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    assert set(line(figure, "threshold").get_xdata()) == {0.45}
    assert set(legend(figure)) == {"threshold 0.45", "good (4)", "defective (3)"}
    for label, name in enumerate(["good (3)", "defective (3)"]):
        assert legend(plot_score_histogram([0.5, 0.5, 0.5], [label] * 3)) == [name]


def test_confusion_matrix_shows_counts_and_their_shares_of_the_truth():
    figure = plot_confusion_matrix([0] * 6 + [1] * 2 + [0] + [1] * 4, [0] * 8 + [1] * 5)
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    expected = {(0, 0): "6\n75%", (1, 0): "2\n25%", (0, 1): "1\n20%", (1, 1): "4\n80%"}
    assert cells == expected  # (verdict, truth)
    texts = [text.get_text() for text in plot_confusion_matrix([0, 1], [0, 0]).axes[0].texts]
    assert texts == ["1\n50%", "1\n50%", "0\n0%", "0\n0%"]


def test_losses_are_drawn_over_epochs_with_the_epoch_that_was_kept():
    figure = plot_losses(HISTORY, 2)
    assert legend(figure) == ["training", "validation", "kept: epoch 2"]
    assert line(figure, "training").get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    assert line(figure, "validation").get_xydata().tolist() == [[1, 3], [2, 2], [3, 2.5]]
    assert set(line(figure, "kept: epoch 2").get_xdata()) == {2}
    assert figure.axes[0].get_ylabel() == "Loss"
    assert legend(plot_losses(HISTORY)) == ["training", "validation"]


def test_without_losses_the_other_metrics_are_drawn_where_they_were_recorded():
    history = [
        {"epoch": 1, "train_distance": -2.0, "learning_rate": 0.4},
        {"epoch": 2, "train_distance": -3.0, "val_score": 0.5},
        {"epoch": 3, "train_distance": -4.0, "val_score": None},
    ]
    figure = plot_losses(history)
    assert legend(figure) == ["train distance", "val score"]
    assert line(figure, "val score").get_xydata().tolist() == [[2, 0.5]]
    assert figure.axes[0].get_ylabel() == "Value"
    assert figure.axes[0].get_ylim()[0] < -4


def test_four_losses_differ_in_colour_and_in_line():
    losses = {"train_loss": 1, "train_a_loss": 2, "train_b_loss": 3, "val_loss": 4}
    lines = plot_losses([{"epoch": k} | losses for k in (1, 2)]).axes[0].lines
    assert len({to_hex(line.get_color()) for line in lines}) == 4
    assert len({line.get_linestyle() for line in lines}) == 4


def test_history_curves_are_the_losses_if_there_are_any():
    assert history_curves(training()["history"]).title == "Loss"
    found = history_curves([{"epoch": 1, "train_a": 1, "val_score": 2, "loss": 3, "val_x": None}])
    assert found == ("Training", {"train a": [(1, 1)], "val score": [(1, 2)]})
    assert history_curves([]).curves == {}


def test_what_is_rejected_without_a_defect_is_told_with_its_images_and_interval():
    figure = plot_detection_by_size(BY_SIZE, None, 0.0, num_without_defect=8, interval=[0.0, 0.369])
    assert "without a defect: 0% of 8 images rejected\n(95 %: 0% to 37%)" in legend(figure)


def cells(panel):
    """The axes of each image and of each heat map in a part of a gallery."""
    found = [axes for axes in panel.axes if axes.images]
    return found[: len(found) // 2], found[len(found) // 2 :]


def test_gallery_rows_of_different_length_show_their_own_images_and_maps():
    figure = gallery(rows={"highest": [2, 0, 1], "lowest": np.array([3])}, color_limit=0.8)
    assert [panel.get_suptitle() for panel in figure.subfigs] == ["highest", "lowest"]
    for panel, chosen in zip(figure.subfigs, ([2, 0, 1], [3]), strict=True):
        for index, above, below in zip(chosen, *cells(panel), strict=True):
            assert above.get_title() == CAPTIONS[index]
            np.testing.assert_array_equal(
                above.images[0].get_array(), IMAGES[index].transpose(1, 2, 0)
            )
            np.testing.assert_array_equal(below.images[1].get_array(), MAPS[index])
            assert below.images[1].get_clim() == (0, 0.8)  # all share one scale


def test_a_gallery_shows_each_image_and_map_in_its_own_aspect():
    above, below = cells(gallery(rows={"all": [0, 1]}, aspects=[1.0, 4 / 3, 1, 1]).subfigs[0])
    assert [axes.get_aspect() for axes in above + below] == pytest.approx([1, 0.75, 1, 0.75])


def heats(figure):
    return [image for axes in figure.axes for image in axes.images if image.get_alpha()]


def test_the_colour_scale_of_negative_maps_begins_where_it_is_told():
    found = heats(gallery(maps=MAPS - 2, color_low=-2.0, color_limit=-1.0))
    assert {heat.get_clim() for heat in found} == {(-2, -1)}
    assert found[0].norm(-1.75) == pytest.approx(0.5)  # a quarter of the scale, by its root


def test_a_gallery_without_maps_shows_the_images_alone():
    figure = gallery(maps=None)
    assert [panel.get_suptitle() for panel in figure.subfigs] == ["highest", "lowest"]
    assert heats(figure) == []
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(shown, IMAGES.transpose(0, 2, 3, 1))


# Thumbnails.


def decode(url: str) -> np.ndarray:
    kind, content = url.split(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L"), dtype=int)


@pytest.mark.parametrize("low", [0.0, -3.0])
def test_thumbnails_hold_image_map_and_mask(low):
    images = np.full((2, 3, 128, 128), 90, np.uint8)
    maps = np.full((2, 128, 128), low, np.float32)
    maps[:, :, 64:] += 0.25
    mask = np.zeros((128, 128), np.uint8)
    mask[:64] = 1
    first, second = thumbnails(images, maps, [mask, None], map_low=low, map_limit=low + 1)
    assert np.abs(decode(first["picture"]) - 90).max() <= 2
    levels = decode(first["map"])
    assert levels.shape == (64, 64)
    assert set(levels[:, :30].ravel()) == {0}
    assert set(levels[:, 34:].ravel()) == {128}  # 255 times the root of a quarter of the scale
    assert (decode(first["mask"])[:60] == 255).all()
    assert (decode(first["mask"])[68:] == 0).all()
    assert second["mask"] is None


def test_thumbnails_of_a_model_without_maps_have_none():
    (made,) = thumbnails(np.zeros((1, 3, 64, 64), np.uint8), None, [np.ones((64, 64), np.uint8)])
    assert made["map"] is None
    assert (decode(made["mask"]) == 255).all()
    assert decode(made["picture"]).max() <= 2


def test_thumbnails_of_noise_are_reduced_until_a_page_of_500_stays_below_5_mb():
    """The worst: noise, which does not compress, and as many near-duplicates as are shown."""
    number, given = 20, results()
    images = RNG.integers(0, 256, (number, 3, 256, 256), dtype=np.uint8)
    near = DATA | {"near_duplicates": [PAIR | {"correlation": 0.9}] * NUM_PAIRS}
    given = results(
        rows=given.rows * (number // 4),
        pictures=images,
        maps=RNG.random((number, 256, 256), dtype=np.float32),
        masks=[None] * number,
        aspects=[1.0] * number,
        metrics=given.metrics | {"data": near},
        pairs=[Pair(images[:2], (1.0, 1.0))] * NUM_PAIRS,
    )
    data = page_data(given, "viridis")
    made = data["images"]
    assert 64 < len(decode(made[0]["picture"])) < 256
    size = sum(len(image[kind]) for image in made for kind in ("picture", "map"))
    assert size / number <= BYTES_PER_IMAGE * 4 / 3 + 100
    whole = category(**data | {"images": made * (500 // number), "parity": PARITY, "pairs": []})
    assert len(render([whole])) < 5e6


PAIR = {"splits": ["test", "fit"], "paths": ["test/good/<b>.png", "train/good/a.png"]}


def test_near_duplicates_are_shown_side_by_side():
    data = DATA | {"near_duplicates": [PAIR | {"correlation": 0.987}]}
    images = np.stack([np.full((3, 64, 64), level, np.uint8) for level in (10, 200)])
    (shown,) = pairs_data(results(metrics=metrics(data=data), pairs=[Pair(images, (1.0, 0.75))]))
    levels = [decode(url).mean() for url in shown["pictures"]]
    assert levels == pytest.approx([10, 200], abs=2)
    assert shown["aspects"] == [1.0, 0.75]
    assert shown["paths"] == PAIR["paths"]


# A category's results.

ONE_CLASS = [row | {"label": "0"} for row in results().rows]


@pytest.mark.parametrize(
    "given",
    [
        results(),
        results(maps=None, training=WITHOUT_EPOCHS),
        results(rows=ONE_CLASS, maps=np.full((4, 64, 64), -5, np.float32)),
    ],
    ids=["usual", "no maps, no epochs", "one class, no signal"],
)
def test_every_model_and_data_set_gives_the_same_files(given, tmp_path):
    draw_plots(given, tmp_path, 2, "viridis")
    names = {"confusion_matrix", "detection", "gallery", "loss", "precision_recall", "roc"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{x}.png" for x in names | {"scores"}}
    made = tables(given)
    assert set(made) == names - {"gallery"}
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
    made = tables(results(rows=ONE_CLASS, training=WITHOUT_EPOCHS))  # without curves
    assert made["loss"] == {"epoch": [], "loss": [], "split": []}
    assert made["detection"] == {"size": [], "detection_rate": []}
    assert list(made["roc"]) == ["false_reject_rate", "detection_rate", "low", "high"]
    assert not any(len(column) for column in made["roc"].values())


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


def test_colours_rise_from_the_median_to_the_highest_value():
    maps = results().maps
    assert results(maps=maps).map_range == (1.5, 3)
    assert results(maps=maps - 5).map_range == (-3.5, -2)
    assert results(maps=maps * 0).map_range == (0, 1)
    assert results(maps=maps * 0 - 2).map_range == (-2, -1)
    assert results(maps=None).map_range == (0, 1)


def test_the_peaks_of_good_maps_at_the_border_are_counted():
    maps = np.zeros((4, 64, 64), np.float32) - 9
    maps[0, 3, 30] = -1  # good, within a sixteenth of the side of the upper edge
    maps[1, 4, 30] = -1  # good, just inside
    maps[2:, 0, 0] = -1  # defective: they do not count
    data = page_data(results(maps=maps, side=300), "gray")
    assert data["sides"] == {"image": 300, "seen": 64}
    low, area = pytest.approx(1 - 0.975**0.5), 1 - 56**2 / 64**2
    assert data["peaks"] == {"at_border": 1, "num_images": 2, "low": low, "area": area}
    flat = results(maps=maps * 0, side=300).peaks
    assert (flat["at_border"], flat["num_images"]) == (0, 0)
    assert results(maps=None, side=300).peaks is None
    assert results(maps=maps).peaks is None  # tiled


def test_page_data_holds_each_score_exactly_as_it_was_compared():
    data = page_data(results(), "gray")
    assert data["images"][1]["score"] == float(np.float32(0.6)) != 0.6
    assert data["curves"]["roc"][-1][:2] == [1, 1]
    assert data["history"]["curves"]["validation"] == [(1, 2.0), (2, 1.5)]
    assert data["colors"][:6] == [0, 0, 0, 1, 1, 1]
    assert page_data(results(rows=ONE_CLASS), "gray")["curves"] == {}
