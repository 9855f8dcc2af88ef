"""Drift: p-values by hand, bets against a reference, and how often and how soon an alarm comes."""

import csv
import json
from bisect import bisect_right, insort

import numpy as np
import pytest
from builders.detectors import write_detector
from online_cp.martingale import SimpleJumper

from anomaly_detection.cli import main
from anomaly_detection.line.drift import BETS, RATES, DriftMonitor, after_bet, moved
from anomaly_detection.line.past import values_in
from anomaly_detection.metrics import share_interval

LIMIT = 100_000  # a tenth of the default, so that false alarms can be counted
NUM_CALIBRATION = 71


def test_p_values_are_ranks_among_all_scores_so_far_by_hand():
    monitor = DriftMonitor([1.0, 2.0, 3.0])
    assert 1 / 4 <= monitor.add(2.5).p_value <= 2 / 4  # one of three is higher
    assert 0 <= monitor.add(9.0).p_value <= 1 / 5
    assert 5 / 6 * 0.99 <= monitor.add(0.0).p_value <= 1
    assert monitor.scores == [0, 1, 2, 2.5, 3, 9]


def test_equal_scores_are_ranked_at_random_over_all_their_places():
    found = [DriftMonitor([1.0] * 9, seed=seed).add(1.0).p_value for seed in range(500)]
    assert min(found) < 0.02
    assert max(found) > 0.98
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("draw", ["normal", "exponential", "few"])
def test_p_values_of_exchangeable_scores_are_uniform_and_independent(draw):
    rng = np.random.default_rng(0)
    scores = {
        "normal": rng.normal(size=4010),
        "exponential": rng.exponential(size=4010),
        "few": rng.integers(0, 3, 4010).astype(float),
    }[draw]
    monitor = DriftMonitor(scores[:10], limit=np.inf)
    found = np.array([monitor.add(score).p_value for score in scores[10:]])
    shares = np.histogram(found, 10, (0, 1))[0] / len(found)
    assert np.abs(shares - 0.1).max() < 0.02
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.05


def test_a_jumper_is_the_reference_s():
    rng = np.random.default_rng(0)
    reference = SimpleJumper(J=0.01, E=BETS.tolist())
    capital = np.full((1, len(BETS)), 1 / len(BETS))
    for p_value in rng.beta(0.6, 1, 300):
        reference.update(p_value)
        capital = moved(capital, np.array([0.01])) * (1 + BETS * (p_value - 0.5))
        assert capital.sum() == pytest.approx(reference.M, rel=1e-9)


def test_the_evidence_is_the_sum_of_bets_opened_at_every_image():
    """Shiryaev and Roberts' statistic, by its definition."""
    p_values = np.random.default_rng(1).uniform(size=40)
    expected = 0.0
    for start in range(40):
        capital = np.full((len(RATES), len(BETS)), 1 / (len(RATES) * len(BETS)))
        for p_value in p_values[start:]:
            capital = moved(capital, RATES) * (1 + BETS * (p_value - 0.5))
        expected += capital.sum()
    capital = np.zeros((len(RATES), len(BETS)))
    for p_value in p_values:
        capital = after_bet(capital, p_value)
    assert capital.sum() == pytest.approx(expected, rel=1e-9)


def test_a_bet_is_fair():
    """Its mean over all p-values is what was put in, and the image's own bet of 1."""
    capital = np.random.default_rng(0).uniform(size=(len(RATES), len(BETS)))
    p_values = (np.arange(1000) + 0.5) / 1000
    after = after_bet(np.broadcast_to(capital, (1000, *capital.shape)), p_values)
    assert after.sum(axis=(1, 2)).mean() == pytest.approx(capital.sum() + 1)


def first_alarms(num_runs, num_images, change):
    """The first alarm of each run, or infinity; `change` is added to each image's score."""
    rng, p_values = np.random.default_rng(0), np.empty((num_runs, num_images))
    for run in range(num_runs):
        known = sorted(rng.normal(size=NUM_CALIBRATION))
        for i, score in enumerate(rng.normal(size=num_images) + change):
            higher = len(known) - bisect_right(known, score)
            p_values[run, i] = (higher + rng.uniform()) / (len(known) + 1)
            insort(known, score)
    capital = np.zeros((num_runs, len(RATES), len(BETS)))
    alarms = np.full(num_runs, np.inf)
    for i in range(num_images):
        capital = after_bet(capital, p_values[:, i])
        is_new = (capital.sum(axis=(1, 2)) >= LIMIT) & np.isinf(alarms)
        alarms[is_new] = i
    return alarms


@pytest.mark.exhaustive
def test_without_drift_no_more_runs_alarm_than_stated():
    """At most one in twenty by the bound, which is nearly reached: but for chance in 200 runs."""
    found = np.isfinite(first_alarms(200, 5000, np.zeros(5000)))
    lowest, _ = share_interval(int(found.sum()), 200)
    assert lowest < 5000 / LIMIT


@pytest.mark.parametrize("shift", [1.0, -1.0])
@pytest.mark.parametrize("start", [0, 500, 3000])
def test_a_shift_by_one_deviation_is_found_within_200_images_in_the_median(shift, start):
    images = np.arange(start + 300)
    alarms = first_alarms(40, len(images), shift * (images >= start))
    assert (alarms >= start).mean() > 0.9
    assert np.median(alarms) - start < 200


@pytest.mark.parametrize("slope", [1 / 1000, -1 / 2000])
def test_slow_drift_is_found_within_2000_images_in_the_median(slope):
    images = np.arange(3000)
    alarms = first_alarms(40, 3000, slope * np.maximum(0, images - 1000))
    assert np.median(alarms) - 1000 < 2000


@pytest.mark.parametrize(("shift", "direction"), [(2.0, "up"), (-2.0, "down")])
def test_an_alarm_says_where_scores_have_gone_and_the_next_starts_anew(shift, direction):
    rng = np.random.default_rng(0)
    monitor = DriftMonitor(rng.normal(size=NUM_CALIBRATION), LIMIT)
    for score in rng.normal(size=300):
        assert not monitor.add(score).is_alarm
    found = [monitor.add(score) for score in rng.normal(size=100) + shift]
    first = next(i for i, one in enumerate(found) if one.is_alarm)
    assert found[first].direction == direction
    assert found[first].evidence >= LIMIT
    assert found[first + 1].evidence < 100


# --- the command


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector's file, with normally distributed calibration scores."""
    scores = np.random.default_rng(5).normal(size=NUM_CALIBRATION).tolist()
    path = tmp_path_factory.mktemp("detectors") / "part.pt"
    return write_detector(path, threshold=2.0, calibration_scores=scores)


@pytest.fixture
def verdicts(tmp_path):
    """Files of 400 verdicts as they were and 400 higher ones, with an unreadable image between."""
    rng = np.random.default_rng(0)
    first, second = tmp_path / "first.csv", tmp_path / "second.jsonl"
    with first.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "score", "threshold", "verdict", "p_value", "error"])
        for i, score in enumerate(rng.normal(size=400)):
            writer.writerow([f"{i}.png", score, 2.0, "normal", 0.5, ""])
        writer.writerow(["bad.png", "", "", "", "", "cannot be decoded"])
    rows = [{"path": "x.png", "score": score} for score in rng.normal(size=400) + 1.5]
    rows.append({"path": "bad.png", "score": None, "error": "cannot be decoded"})
    second.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return first, second


@pytest.fixture
def run(detector):
    def run_drift(*arguments):
        with pytest.raises(SystemExit) as status:
            main(["drift", "--detector", str(detector), *map(str, arguments)])
        return status.value.code

    return run_drift


def test_the_command_finds_the_change(run, verdicts, tmp_path, capsys):
    assert run(*verdicts, "--picture", tmp_path / "drift.png") == 0
    *alarms, last = capsys.readouterr().out.splitlines()
    assert last.startswith("800 images, ")
    assert last.endswith("the probability of any is at most 0.08%")
    first = alarms[0].split()
    assert 400 < int(first[1]) < 500
    assert "scores are higher than at calibration" in alarms[0]
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert run(*verdicts, "--fail-on-alarm") == 2
    assert run(verdicts[0], "--fail-on-alarm") == 0


def test_images_that_could_not_be_read_have_no_score(verdicts):
    assert [len(list(values_in(path))) for path in verdicts] == [400, 400]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.csv", None, "must be a CSV or .jsonl file of `predict`"),
        ("a.csv", "path,verdict\nx.png,normal\n", "a.csv, line 2: must be a row of `predict`"),
        ("a.csv", "path,score\nx.png,1\ny.png,high\n", "a.csv, line 3: must be a row of"),
        ("a.jsonl", '{"score": 1}\n{"score": \n', "must be a CSV or .jsonl file of `predict`"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: must be a row of `predict`"),
        ("a.csv", "path,score\n", "a.csv must have scores, but has none."),
    ],
)
def test_what_is_no_file_of_verdicts_is_refused_in_a_line(run, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = run(tmp_path / name)
    assert message in found
    assert "\n" not in found
