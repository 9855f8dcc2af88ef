"""The study of false rejects: its models are the library's, and its promise that of the theory."""

import numpy as np
import pytest
import torch

from anomaly_detection import models
from anomaly_detection.models.maps import image_scores
from anomaly_detection.models.patchcore.model import nearest_distances
from benchmarks import false_rejects, several_pictures
from benchmarks.false_rejects import (
    Outcome,
    compared,
    cross_outcome,
    divide,
    few_cells,
    line,
    memory_bank,
    outcome,
    promised,
    score,
    split_outcome,
)


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8, generator=generator)


def test_distances_to_the_fit_s_cells_are_those_to_a_bank_of_all_their_patches(pictures):
    (maps,) = memory_bank(pictures)([0, 3, 4])([7, 9])
    model = models.spec("patchcore").build(models.parameters("patchcore")()).eval()
    with torch.no_grad():
        known, new = (model.extract(pictures[x]) for x in ([0, 3, 4], [7, 9]))
    patches = [x.movedim(1, 3).flatten(0, 2) for x in (known, new)]
    expected = nearest_distances(patches[1], patches[0])
    torch.testing.assert_close(maps.flatten(), expected, atol=1e-3, rtol=1e-3)


def test_scores_are_those_of_maps_standardised_by_the_validation_cells():
    known = torch.linspace(0, 5, 6 * 4).view(6, 2, 2).square()
    scores = score(lambda cells: [known[cells]], [0, 1, 2], [3, 4, 5])
    assert scores.shape == (3,)
    assert (np.diff(scores) > 0).all()
    twice = score(lambda cells: [2 * known[cells]], [0, 1, 2], [3, 4, 5])
    np.testing.assert_allclose(twice, scores, rtol=1e-4)
    assert image_scores(known[3][None, None], 1.0).item() == pytest.approx(known[3].mean().item())


@pytest.mark.parametrize(("count", "mean"), [(19, 1 / 20), (71, 3 / 72), (170, 8 / 171)])
def test_the_promise_is_the_share_of_ranks_above_the_threshold(count, mean):
    rates = [x.rate for x in promised(count, 117)]
    assert np.mean(rates) == pytest.approx(mean, abs=1e-4)


def test_exchangeable_scores_keep_the_promise():
    """So the study's own code neither adds rejects nor hides them."""
    rng = np.random.default_rng(0)
    drawn = [outcome(*np.split(rng.normal(size=71 + 117), [71])) for _ in range(4000)]
    rates, expected = ([x.rate for x in xs] for xs in (drawn, promised(71, 117)))
    assert np.mean(rates) == pytest.approx(np.mean(expected), abs=0.002)
    for share in (0.05, 0.5, 0.95):
        assert np.quantile(rates, share) == pytest.approx(np.quantile(expected, share), abs=0.01)


def test_cells_are_divided_like_the_pipeline_s():
    division = divide(list(map(str, range(588))), seed=0)
    assert list(map(len, division)) == [329, 71, 71, 117]
    assert len(set().union(*division)) == 588
    together = divide(["a"] * 10 + list(map(str, range(90))), seed=1)
    assert sum(bool(set(range(10)) & set(part)) for part in together) == 1
    few = few_cells(588, 50, seed=0)
    assert list(map(len, few)) == [23, 8, 19, 117]


def test_both_ways_of_calibration_use_the_cells_that_they_may():
    seen = []

    def fit(known):
        seen.append(sorted(known))
        return lambda cells: [torch.tensor(cells, dtype=torch.float32)[:, None, None]]

    division = few_cells(588, 50, seed=0)
    assert split_outcome(fit, division).num_calibration == 19
    assert seen == [sorted(division.fit)]
    seen.clear()
    found = cross_outcome(fit, division, seed=0)
    assert (found.num_calibration, found.num_test) == (42, 117)
    normal = sorted(division.fit + division.calibration)
    assert seen[-1] == normal
    assert sorted(x for known in seen[:-1] for x in known) == sorted(4 * normal)


def test_rates_are_summarised():
    rates = [Outcome(19, 10, n) for n in (0, 1, 2)]
    assert line("all", rates) == "| all | 10.00% | 0.0% / 10.0% / 20.0% | 66.7% | 33.3% |"
    assert compared(["all"], rates).startswith("| all | 19 | 5.00% |")
    assert len(false_rejects.SEEN) == 2


@pytest.mark.parametrize("unit", ["picture", "part"])
def test_several_pictures_of_a_part_are_divided_by_picture_or_by_part(unit):
    parts = [str(i // 3) for i in range(90)]
    division = several_pictures.divide(parts, unit, 0)
    names = [{parts[i] for i in cells} for cells in division]
    assert sorted(i for cells in division for i in cells) == list(range(90))
    assert not names[3] & (names[0] | names[1] | names[2])
    assert bool(names[0] & names[2]) == (unit == "picture")
