import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

from anomaly_detection.report.plots import (
    draw_precision_recall_curve,
    draw_roc_curve,
    plot_confusion_matrix,
    plot_detection_by_size,
    plot_gallery,
    plot_losses,
    plot_nothing,
    plot_precision_recall_curve,
    plot_roc_curve,
    plot_score_histogram,
)

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


def gallery(save_path=None, rows=None, maps=MAPS, **colors):
    rows = rows or {"highest": [0, 1, 2], "lowest": [3]}
    return plot_gallery(IMAGES, maps, CAPTIONS, rows, **colors, save_path=save_path)


PLOTS = {
    "roc": lambda path=None: plot_roc_curve(LABELS, SCORES, path),
    "precision_recall": lambda path=None: plot_precision_recall_curve(LABELS, SCORES, path),
    "histogram": lambda path=None: plot_score_histogram(LABELS, SCORES, 0.45, path),
    "confusion": lambda path=None: plot_confusion_matrix(LABELS, SCORES > 0.45, path),
    "losses": lambda path=None: plot_losses(HISTORY, 2, path),
    "gallery": gallery,
    "gallery_without_maps": lambda path=None: gallery(path, maps=None),
    "detection": lambda path=None: plot_detection_by_size(BY_SIZE, 0.1, 0.2, path),
    "nothing": lambda path=None: plot_nothing("no images", path),
}


def line(figure, label):
    (found,) = [line for line in figure.axes[0].lines if str(line.get_label()).startswith(label)]
    return found


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_each_plot_is_a_figure_written_as_png_into_a_folder_it_makes(plot, tmp_path):
    path = tmp_path / "new" / "folder" / "plot.png"
    assert isinstance(plot(path), Figure)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100
        darkest, brightest = picture.convert("L").getextrema()
    assert darkest < brightest  # something is drawn


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_the_same_values_give_the_same_bytes(plot, tmp_path):
    plot(tmp_path / "one.png")
    plot(str(tmp_path / "two.png"))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_without_a_path_nothing_is_written(plot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(plot(), Figure)
    assert not list(tmp_path.iterdir())


def test_roc_curve_draws_the_points_of_scikit_learn_and_names_the_area():
    drawn = line(plot_roc_curve(LABELS, SCORES), "AUROC")
    false_rejects, detected, _ = roc_curve(LABELS, SCORES)
    np.testing.assert_array_equal(drawn.get_xdata(), false_rejects)
    np.testing.assert_array_equal(drawn.get_ydata(), detected)
    assert drawn.get_label() == "AUROC 0.917"  # 11 of 12 pairs are in order


def test_precision_recall_curve_draws_the_points_of_scikit_learn_and_chance():
    figure = plot_precision_recall_curve(LABELS, SCORES)
    precision, recall, _ = precision_recall_curve(LABELS, SCORES)
    drawn = line(figure, "average precision")
    np.testing.assert_array_equal(drawn.get_xdata(), recall)
    np.testing.assert_array_equal(drawn.get_ydata(), precision)
    # Down the scores: two hits, one false alarm, one hit: (1 + 1 + 3 / 4) / 3.
    assert drawn.get_label() == "average precision 0.917"
    assert set(line(figure, "chance").get_ydata()) == {3 / 7}


@pytest.mark.parametrize("plot", [plot_roc_curve, plot_precision_recall_curve])
@pytest.mark.parametrize("label", [0, 1])
def test_a_curve_of_one_class_is_an_error_and_writes_nothing(plot, label, tmp_path):
    with pytest.raises(ValueError, match=rf"both classes, 0 and 1, got only \[{label}\]"):
        plot(np.full(3, label), [1, 2, 3], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_histogram_bars_are_shares_of_their_kind_and_the_threshold_stands_where_it_is():
    figure = plot_score_histogram(LABELS, SCORES, 0.45)
    normal, anomalous = figure.axes[0].containers
    assert sum(bar.get_height() for bar in normal) == pytest.approx(1)
    assert sum(bar.get_height() for bar in anomalous) == pytest.approx(1)
    assert set(line(figure, "threshold").get_xdata()) == {0.45}
    assert set(legend(figure)) == {"threshold 0.45", "good (4)", "defective (3)"}


@pytest.mark.parametrize(("label", "name"), [(0, "good (3)"), (1, "defective (3)")])
def test_histogram_of_one_kind_shows_that_one_only(label, name):
    assert legend(plot_score_histogram([label] * 3, [0.5, 0.5, 0.5])) == [name]


def test_confusion_matrix_shows_counts_and_their_shares_of_the_truth():
    labels = [0] * 8 + [1] * 5
    verdicts = [0] * 6 + [1] * 2 + [0] * 1 + [1] * 4
    figure = plot_confusion_matrix(labels, verdicts)
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert cells == {  # (verdict, truth)
        (0, 0): "6\n75%",
        (1, 0): "2\n25%",
        (0, 1): "1\n20%",
        (1, 1): "4\n80%",
    }


def test_confusion_matrix_of_normal_images_only_has_zeros():
    texts = [text.get_text() for text in plot_confusion_matrix([0, 0], [0, 1]).axes[0].texts]
    assert texts == ["1\n50%", "1\n50%", "0\n0%", "0\n0%"]


def text(figure):
    (found,) = figure.texts
    return found.get_text()


def test_a_curve_without_points_says_why():
    reason = "not defined: the test images are all of one class"
    assert text(draw_roc_curve(np.empty((0, 4)), None)) == reason
    assert text(draw_precision_recall_curve(np.empty((0, 2)), None, 0.0)) == reason


def test_losses_are_drawn_over_epochs_with_the_epoch_that_was_kept():
    figure = plot_losses(HISTORY, 2)
    assert legend(figure) == ["training", "validation", "kept: epoch 2"]
    assert line(figure, "training").get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    assert line(figure, "validation").get_xydata().tolist() == [[1, 3], [2, 2], [3, 2.5]]
    assert set(line(figure, "kept: epoch 2").get_xdata()) == {2}
    assert figure.axes[0].get_ylabel() == "Loss"


def test_losses_without_a_kept_epoch_have_no_mark():
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
    history = [
        {"epoch": k, "train_loss": 1, "train_a_loss": 2, "train_b_loss": 3, "val_loss": 4}
        for k in (1, 2)
    ]
    lines = plot_losses(history).axes[0].lines
    assert len({to_hex(line.get_color()) for line in lines}) == 4
    assert len({line.get_linestyle() for line in lines}) == 4


@pytest.mark.parametrize("history", [[], [{"epoch": 1, "learning_rate": 0.1}]])
def test_a_model_without_a_history_has_a_picture_that_says_so(history):
    assert text(plot_losses(history)) == "this model is not trained in epochs"


def test_what_is_rejected_without_a_defect_is_told_with_its_images_and_interval():
    figure = plot_detection_by_size(BY_SIZE, None, 0.0, num_without_defect=8, interval=[0.0, 0.369])
    assert "without a defect: 0% of 8 images rejected\n(95 %: 0% to 37%)" in legend(figure)


def test_a_gallery_shows_each_picture_and_map_in_its_own_aspect():
    figure = plot_gallery(IMAGES, MAPS, CAPTIONS, {"all": [0, 1]}, aspects=[1.0, 4 / 3, 1, 1])
    cells = [axes for axes in figure.subfigs[0].axes if axes.images]
    assert [axes.get_aspect() for axes in cells] == pytest.approx([1, 0.75, 1, 0.75])


def test_detection_without_synthetic_defects_has_a_picture_that_says_so():
    assert text(plot_detection_by_size([])) == "not measured: there were no synthetic defects"


def panels(figure):
    return [panel.get_suptitle() for panel in figure.subfigs]


def shown(panel):
    """Each picture's title, image and heat map."""
    cells = [axes for axes in panel.axes if axes.images]
    half = len(cells) // 2
    return [
        (above.get_title(), above.images[0].get_array(), below.images[1].get_array())
        for above, below in zip(cells[:half], cells[half:], strict=True)
    ]


def test_gallery_rows_of_different_length_show_their_own_images_and_maps():
    figure = gallery(rows={"highest": [2, 0, 1], "lowest": np.array([3])})
    assert panels(figure) == ["highest", "lowest"]
    for panel, chosen in zip(figure.subfigs, ([2, 0, 1], [3]), strict=True):
        pictures = shown(panel)
        assert [title for title, _, _ in pictures] == [CAPTIONS[index] for index in chosen]
        for (_, image, heat), index in zip(pictures, chosen, strict=True):
            np.testing.assert_array_equal(image, IMAGES[index].transpose(1, 2, 0))
            np.testing.assert_array_equal(heat, MAPS[index])


def heats(figure):
    return [image for axes in figure.axes for image in axes.images if image.get_alpha()]


def test_all_maps_of_a_gallery_share_one_colour_scale():
    assert {heat.get_clim() for heat in heats(gallery(color_limit=0.8))} == {(0, 0.8)}


def test_the_colour_scale_of_negative_maps_begins_where_it_is_told():
    found = heats(gallery(maps=MAPS - 2, color_low=-2.0, color_limit=-1.0))
    assert {heat.get_clim() for heat in found} == {(-2, -1)}
    assert found[0].norm(-1.75) == pytest.approx(0.5)  # a quarter of the scale, by its root


def test_a_gallery_without_maps_shows_the_images_alone():
    figure = gallery(maps=None)
    assert panels(figure) == ["highest", "lowest"]
    assert heats(figure) == []
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(shown, IMAGES.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("level", [0.0, -3.0])
def test_gallery_of_maps_without_any_signal_can_be_drawn(level, tmp_path):
    path = tmp_path / "gallery.png"
    gallery(path, maps=np.full_like(MAPS, level), color_low=level, color_limit=level)
    assert path.stat().st_size
