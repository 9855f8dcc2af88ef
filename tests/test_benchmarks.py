"""The benchmarks run, their baselines are the library's models, and their tables are right."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import prepare, write_category
from builders.projects import ROOT, read_json
from joblib import Memory
from ruamel.yaml import YAML
from torch import nn

from anomaly_detection import models
from anomaly_detection.features.moments import Moments
from anomaly_detection.models.gaussian.model import Gaussian
from anomaly_detection.models.maps import PRIOR_IMAGES, MapScale, image_scores
from anomaly_detection.models.patchcore.model import nearest_distances
from anomaly_detection.models.stfpm import STFPMModel, STFPMTrainer
from benchmarks import (
    detection,
    false_rejects,
    limits,
    selection,
    several_pictures,
    trials,
)
from benchmarks import run as benchmark
from benchmarks import trials_work as drafts
from benchmarks import work as tasks
from benchmarks.detection_work import Player, Recorder, evaluated
from benchmarks.false_rejects import Outcome, outcome, promised
from benchmarks.images import write_images

SMALL = benchmark.SETTINGS | {"backbone": "test_resnet", "image_size": 32, "batch_size": 8}
TASKS = ("training", "bare_training", "evaluation", "bare_forward", "one_image", "prepare")


def test_every_task_says_how_long_it_took_for_how_many_images(tmp_path):
    settings = SMALL | {"epochs": 1}
    write_images(tmp_path / "raw", num_train=60, num_test=26, side=32)
    tasks.prepare_once(tmp_path, settings)
    for name in (*TASKS, "decoding", "exported_image"):
        result = tasks.WORK[name](tmp_path, settings)
        assert result["seconds"] > 0, name
        assert result["items"] > 0, name


def test_processes_are_compared_by_time_and_memory_in_a_table(capsys):
    sides = [benchmark.whole([sys.executable, "-c", code]) for code in ("pass", "import json")]
    result = benchmark.compare("start", benchmark.Comparison("a", sides[0], "b", sides[1]), 2)
    assert result["ratio_from"] <= result["ratio"] <= result["ratio_to"]
    assert result["ours_peak_memory"] > 1e6
    report = {"machine": {"cores": 2}, "settings": SMALL, "results": {"start": result}}
    benchmark.print_table(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cores 2"
    assert lines[-1].startswith(f"| a | b | {result['ratio']:.2f} |")


@pytest.mark.exhaustive
def test_the_benchmark_compares_and_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(benchmark, "SIDE", 32)
    monkeypatch.setattr(benchmark, "SETTINGS", SMALL)
    names = ["training", "evaluation", "prepare", "one_image", "first_step"]
    options = ["--repeats", "1", "--images", "60", "--json", "report.json"]
    benchmark.main(*options, "--only", *names)
    results = read_json(tmp_path / "report.json")["results"]
    assert list(results) == names
    table = capsys.readouterr().out
    for result in results.values():
        assert result["ratio"] > 0
        assert result["ours_peak_memory"] > 10e6
        assert f"| {result['what']} | {result['against']} | {result['ratio']:.2f} |" in table


def test_the_limits_count_operations_and_share_out_the_time():
    convolution = nn.Conv2d(3, 4, kernel_size=3, padding=1)
    images = torch.zeros(2, 3, 8, 8)
    by_hand = 2 * (2 * 8 * 8) * (3 * 3 * 3) * 4
    assert limits.floating_point_operations(convolution, images) == by_hand
    trainer = STFPMTrainer(
        STFPMModel("test_resnet", weights="random"), device="cpu", checkpoint_dir=None
    )
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for passes, piece in limits.pieces(trainer, images).values():
        shares = limits.operators(piece, trainer.device)
        assert passes in (2, 3, 4)
        assert 0.5 < sum(shares.values()) <= 1
        assert any("convolution" in name for name in shares)
    assert limits.matrix_product(trainer, side=64) > 0


class Brightest(nn.Module):
    """The score is the highest pixel, which misses dark defects."""

    def forward(self, images):
        return {"pred_score": images.float().amax(dim=(1, 2, 3))}


def test_recorded_images_and_played_scores_give_the_metrics_of_the_model_itself(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_category(tmp_path / "data/widget", size=32)
    fractions = {"validation_fraction": 0.2, "calibration_fraction": 0.2}
    prepare(tmp_path / "data", image_size=32, **fractions)
    params = YAML().load(ROOT / "params.yaml")
    params["evaluation"] |= {"false_reject_rate": 0.25, "synthetic_images": 1}
    YAML().dump(params, tmp_path / "params.yaml")
    model, recorder = Brightest(), Recorder()
    evaluated(recorder, "widget")
    images = torch.from_numpy(np.concatenate(recorder.images))
    player = Player(model(images)["pred_score"].numpy())
    metrics = evaluated(player, "widget")
    assert metrics == evaluated(model, "widget")
    assert len(player.left) == 0
    assert metrics["per_defect_type"]["bright"]["detection_rate"] == 1
    assert metrics["per_defect_type"]["dark"]["detection_rate"] < 1
    assert metrics["synthetic"]["num_images"] == 32


def result(auroc, misses, size, seconds):
    return {
        "metrics": {
            "image_auroc": auroc,
            "intervals": {"image_auroc": [auroc - 0.02, auroc + 0.01]},
            "num_misses": misses,
            "num_anomalous": 20,
            "num_false_rejects": 1,
            "num_normal": 30,
            "synthetic": {"size_detected_in_90_percent": size},
        },
        "fit": {"wall": seconds, "cpu": 2 * seconds, "peak_memory": 1.25e9},
        "seconds_per_image": 0.0123,
        "detector_bytes": 3_450_000,
        "hardware": {"cpu": "some CPU", "instructions": "AVX2"},
        "versions": {"python": "3.11", "torch": "2.9"},
    }


def test_the_table_has_the_detection_of_each_category_and_the_costs_of_the_first():
    results = {
        "nut": {"`a`": result(0.95, 3, 0.091, 7.2), "b": result(0.5, 20, None, 60.0)},
        "bolt": {"`a`": result(0.9, 4, 0.2, 99.0), "b": result(0.6, 19, None, 99.0)},
    }
    rows = [line.strip("| ").split(" | ") for line in detection.table(results).splitlines()]
    assert len({len(row) for row in rows[1:]}) == 1
    assert rows[2] == [
        "`a`",
        *("0.950 (0.930 to 0.960)", "3 of 20", "1 of 30", "9.1 %"),
        *("0.900 (0.880 to 0.910)", "4 of 20", "1 of 30", "20.0 %"),
        *("7 s", "14 s", "1.2 GB", "12 ms", "3.5 MB"),
    ]
    assert rows[3][1:5] == ["0.500 (0.480 to 0.510)", "20 of 20", "1 of 30", "none"]


def test_the_conditions_name_the_hardware_and_the_versions_of_both_sides():
    peer = result(0.5, 20, None, 60.0) | {"versions": {"anomalib": "2.7.0", "torch": "2.9"}}
    del peer["hardware"]
    report = {"image_size": 128, "results": {"nut": {"`a`": result(0.9, 3, 0.1, 7), "b": peer}}}
    text = detection.conditions(report)
    for part in ("some CPU, AVX2", "128 x 128", "python 3.11, torch 2.9", "anomalib 2.7.0"):
        assert part in text


def test_distances_to_the_fit_s_cells_are_those_to_a_bank_of_all_their_patches():
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8, generator=generator)
    (maps,) = false_rejects.memory_bank(cells)([0, 3, 4])([7, 9])
    model = models.spec("patchcore").build(models.parameters("patchcore")()).eval()
    with torch.no_grad():
        known, new = (
            model.extract(cells[x]).movedim(1, 3).flatten(0, 2) for x in ([0, 3, 4], [7, 9])
        )
    expected = nearest_distances(new, known)
    torch.testing.assert_close(maps.flatten(), expected, atol=1e-3, rtol=1e-3)


def test_scores_are_those_of_maps_standardised_by_the_validation_cells():
    known = torch.linspace(0, 5, 6 * 4).view(6, 2, 2).square()
    scores, twice = (
        false_rejects.score(lambda cells, maps=maps: [maps[cells]], [0, 1, 2], [3, 4, 5])
        for maps in (known, 2 * known)
    )
    assert scores.shape == (3,)
    assert (np.diff(scores) > 0).all()
    np.testing.assert_allclose(twice, scores, rtol=1e-4)
    assert image_scores(known[3][None, None], 1.0).item() == pytest.approx(known[3].mean().item())


@pytest.mark.exhaustive
@pytest.mark.parametrize(("count", "mean"), [(19, 1 / 20), (170, 8 / 171)])
def test_the_promise_is_the_share_of_ranks_above_the_threshold(count, mean):
    assert np.mean([x.rate for x in promised(count, 117)]) == pytest.approx(mean, abs=1e-4)
    row = false_rejects.compared(["all"], [Outcome(count, 117, 0)])
    assert row.startswith(f"| all | {count} | {mean:.2%} |")


def test_exchangeable_scores_keep_the_promise():
    """So the study's own code neither adds rejects nor hides them."""
    rng = np.random.default_rng(0)
    drawn = [outcome(*np.split(rng.normal(size=71 + 117), [71])) for _ in range(4000)]
    rates, expected = ([x.rate for x in xs] for xs in (drawn, promised(71, 117)))
    assert np.mean(expected) == pytest.approx(3 / 72, abs=1e-4)
    assert np.mean(rates) == pytest.approx(np.mean(expected), abs=0.002)
    shares = (0.05, 0.5, 0.95)
    np.testing.assert_allclose(
        np.quantile(rates, shares), np.quantile(expected, shares), rtol=0, atol=0.01
    )


def test_rates_are_summarised():
    rates = [Outcome(19, 10, n) for n in (0, 1, 2)]
    line = false_rejects.line("all", rates)
    assert line == "| all | 10.00% | 0.0% / 10.0% / 20.0% | 66.7% | 33.3% |"
    assert len(false_rejects.SEEN) == 2


def test_cells_are_divided_like_the_pipeline_s():
    division = false_rejects.divide(list(map(str, range(588))), seed=0)
    assert list(map(len, division)) == [329, 71, 71, 117]
    assert len(set().union(*division)) == 588
    together = false_rejects.divide(["a"] * 10 + list(map(str, range(90))), seed=1)
    assert sum(bool(set(range(10)) & set(part)) for part in together) == 1
    assert list(map(len, false_rejects.few_cells(588, 50, seed=0))) == [23, 8, 19, 117]


def test_both_ways_of_calibration_use_the_cells_that_they_may():
    seen = []

    def fit(known):
        seen.append(sorted(known))
        return lambda cells: [torch.tensor(cells, dtype=torch.float32)[:, None, None]]

    division = false_rejects.few_cells(588, 50, seed=0)
    assert false_rejects.split_outcome(fit, division).num_calibration == 19
    assert seen == [sorted(division.fit)]
    seen.clear()
    found = false_rejects.cross_outcome(fit, division, seed=0)
    assert (found.num_calibration, found.num_test) == (42, 117)
    normal = sorted(division.fit + division.calibration)
    assert seen[-1] == normal
    assert sorted(x for known in seen[:-1] for x in known) == sorted(4 * normal)


@pytest.mark.parametrize("unit", ["picture", "part"])
def test_several_pictures_of_a_part_are_divided_by_picture_or_by_part(unit):
    parts = [str(i // 3) for i in range(90)]
    division = several_pictures.divide(parts, unit, 0)
    names = [{parts[i] for i in cells} for cells in division]
    assert sorted(i for cells in division for i in cells) == list(range(90))
    assert not names[3] & (names[0] | names[1] | names[2])
    assert bool(names[0] & names[2]) == (unit == "picture")


SIZE = 8


@pytest.fixture
def features():
    """Two levels of random features, with 12 images in each split."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 6, SIZE, SIZE), (12, 9, SIZE // 2, SIZE // 2)]
    return [{x: torch.randn(shape, generator=generator) for x in drafts.SPLITS} for shape in shapes]


def moments(maps):
    result = Moments()
    result.add(maps)
    return result


def test_the_gaussian_of_the_trials_is_the_librarys(features):
    fine = features[0]
    model = Gaussian(SIZE**2, 6, 6, is_shared=False)
    model.estimate(moments(fine["fit"]), shrinkage=0.2)
    maps = drafts.gaussian(fine)["small"]
    torch.testing.assert_close(maps, model(fine["small"]), atol=1e-4, rtol=1e-4)


def test_the_distances_of_the_trials_are_the_librarys(features, monkeypatch):
    monkeypatch.setattr(drafts, "BANK_SIZE", 10**6)  # all patches
    joined = drafts.joined([drafts.averaged(level) for level in features])
    known, new = (joined[split].movedim(1, 3).reshape(-1, 15) for split in ("fit", "normal"))
    maps = drafts.nearest(joined)
    expected = nearest_distances(new, known)
    torch.testing.assert_close(maps["normal"].flatten(), expected, atol=1e-4, rtol=1e-4)


def test_maps_are_standardised_and_scored_as_in_the_library(features):
    maps = drafts.each(lambda x: x[:, 0].square(), features[0])
    scale = MapScale((SIZE, SIZE))
    scale.estimate(moments(maps["validation"][:, None]))
    standard = drafts.by_position(maps, prior=PRIOR_IMAGES)
    torch.testing.assert_close(standard["large"], scale(maps["large"]), atol=1e-5, rtol=1e-4)
    images = drafts.Images("any", SIZE, argparse.Namespace(), Memory(None))
    expected = image_scores(scale(maps["large"])[:, None], 0.1).numpy()
    np.testing.assert_allclose(images.score(standard, 0.1)["large"], expected, rtol=1e-4)


def test_areas_are_those_of_each_defect_and_the_best_of_a_column_is_bold():
    scores = {"normal": np.array([0.0, 1.0]), "small": np.array([0.5]), "large": np.array([2.0])}
    assert trials.aurocs(scores) == [50.0, 100.0]
    areas = {
        "a": {"tile": [50.0, 100.0], "poly": [60.0, 70.0], "brick": [70.0, 90.0]},
        "b": {"tile": [50.0, 100.0], "poly": [61.0, 70.04], "brick": [60.0, 80.0]},
    }
    assert trials.table("levels", areas).splitlines() == [
        "| `levels` | 2 generated, small | large | poly, 1/3 | 2/3 |",
        "| --- | --- | --- | --- | --- |",
        "| a | **60.0** | **95.0** | 60.0 | **70.0** |",
        "| b | 55.0 | 90.0 | **61.0** | **70.0** |",
    ]
    assert "brick, small | large" in trials.table("levels", areas, per_set=True)


def test_the_cells_of_poly_are_in_neither_test_set(tmp_path):
    pytest.importorskip("elpv_dataset")
    names = [path.name for part in drafts.cells(tmp_path, seed=0) for path in part]
    test = {path.name for path in Path(tmp_path).glob("*/test/*/*.png")}
    assert len(set(names)) == len(names)
    assert len(test) > 1000
    assert not test & set(names)


def test_right_and_wrong_choices_of_a_selection_are_counted():
    def row(model: str, area: float, auroc: float) -> dict:
        areas = {"blob": area, "noise": area}
        own = {"model": model, "strides": [8], "top_fraction": 0.01}
        return own | {"areas": areas, "image_auroc": auroc}

    results = {
        "right": [row("a", 0.5, 0.8), row("b", 0.6, 0.9)],
        "wrong": [row("a", 0.5, 0.9), row("b", 0.6, 0.84)],
        "alike": [row("a", 0.5, 0.9), row("b", 0.6, 0.901)],
    }

    by_default = selection.by_default(results).splitlines()
    assert by_default[2] == "| `a` | 3 | 1 | 1 | 1 | +0.014 | -0.060 | 0.020 |"
    assert by_default[3] == "| `b` | 3 | 3 | 0 | 0 | +0.000 | +0.000 | 0.020 |"
    by_pair = selection.by_pair(results).splitlines()
    assert by_pair[2] == "| the worst family | 2 | 0 | 50% | 0.060 | 0.060 |"
