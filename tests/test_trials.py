"""The trials: their baselines are the library's models, and their tables say what is best."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib import Memory

from anomaly_detection.features.moments import Moments
from anomaly_detection.models.gaussian.model import Gaussian
from anomaly_detection.models.maps import MapScale, image_scores
from anomaly_detection.models.patchcore.model import join_levels, nearest_distances
from benchmarks import trials, trials_work
from benchmarks.trials_work import SPLITS, Images, by_position, each, gaussian, nearest

SIZE = 8


@pytest.fixture
def features():
    """Two levels of random features, with 12 images in each split."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 6, SIZE, SIZE), (12, 9, SIZE // 2, SIZE // 2)]
    return [{x: torch.randn(shape, generator=generator) for x in SPLITS} for shape in shapes]


def moments(maps):
    result = Moments()
    result.add(maps)
    return result


def test_the_gaussian_of_the_trials_is_the_librarys(features):
    fine = features[0]
    model = Gaussian(SIZE**2, 6, 6, is_shared=False)
    model.estimate(moments(fine["fit"]), shrinkage=0.2)
    torch.testing.assert_close(gaussian(fine)["small"], model(fine["small"]), atol=1e-4, rtol=1e-4)


def test_the_bank_of_the_trials_is_the_librarys(features, monkeypatch):
    monkeypatch.setattr(trials_work, "BANK_SIZE", 10**6)  # all patches
    levels = [trials_work.averaged(level) for level in features]
    known, new = (
        join_levels({str(i): level[split] for i, level in enumerate(features)}).movedim(1, 3)
        for split in ("fit", "normal")
    )
    expected = nearest_distances(new.reshape(-1, 15), known.reshape(-1, 15))
    maps = nearest(trials_work.joined(levels))
    torch.testing.assert_close(maps["normal"].flatten(), expected, atol=1e-4, rtol=1e-4)


def test_maps_are_standardised_and_scored_as_in_the_library(features):
    maps = each(lambda x: x[:, 0].square(), features[0])
    scale = MapScale((SIZE, SIZE))
    scale.estimate(moments(maps["validation"][:, None]))
    standard = by_position(maps)
    torch.testing.assert_close(standard["large"], scale(maps["large"]), atol=1e-5, rtol=1e-4)
    images = Images("any", SIZE, argparse.Namespace(), Memory(None))
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
    parts = trials_work.cells(tmp_path, seed=0)
    names = [path.name for part in parts for path in part]
    test = {path.name for path in Path(tmp_path).glob("*/test/*/*.png")}
    assert len(set(names)) == len(names)
    assert len(test) > 1000
    assert not test & set(names)
