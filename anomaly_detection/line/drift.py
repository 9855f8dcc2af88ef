"""Whether what comes in still looks like what the detector was calibrated on.

Each score becomes a p-value: its rank among the calibration scores and all scores before it (online
conformal prediction). While all these are exchangeable, the p-values are independent and uniform,
however few calibration scores there are (Vovk et al., 2005, theorem 8.1); ranks among the
calibration scores alone would not be. Bets against that gain when it no longer holds.

The bets are simple jumpers (Vovk et al., "Retrain or not retrain", arXiv:2102.10439, section 3):
1 + e (p - 1/2) for a few values of e, between which capital moves at a rate; several rates share it.
Every image starts a bet of 1, and the evidence is what all bets are worth, the Shiryaev-Roberts
statistic. Without drift it grows by 1 an image on average, so that by Doob's inequality it reaches
c within n images with a probability of at most n / c, and in the long run no more often than once
in c images.
"""

import random
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

BETS = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
RATES = np.array([1e-3, 1e-2, 1e-1])
UP, DOWN = "up", "down"


class Drift(NamedTuple):
    """What is known after an image.

    Attributes:
        p_value: Of this image, in [0, 1]; small for a high score.
        evidence: What all bets are worth; an alarm is at `images_per_false_alarm`.
        direction: `up` if scores are higher than they were, `down` if they are lower.
        is_alarm: Whether this image completes the evidence; it starts at 0 again then.
    """

    p_value: float
    evidence: float
    direction: str
    is_alarm: bool


class DriftMonitor:
    """Watches a stream of scores.

    Args:
        calibration_scores: Of the detector.
        images_per_false_alarm: How many images come, on average at least, until an alarm without
            drift.
        seed: Of the choice among equal ranks.
    """

    def __init__(
        self,
        calibration_scores: Iterable[float],
        images_per_false_alarm: float = 100_000,
        seed: int = 0,
    ) -> None:
        self.scores = sorted(map(float, calibration_scores))
        self.limit = images_per_false_alarm
        self.random = random.Random(seed)
        self.capital = np.zeros((len(RATES), len(BETS)))

    def add(self, score: float) -> Drift:
        """Take an image's score."""
        p_value = self._p_value(score)
        insort(self.scores, score)
        started = self.capital + 1 / self.capital.size
        self.capital = moved(started, RATES) * (1 + BETS * (p_value - 0.5))
        evidence = float(self.capital.sum())
        against = self.capital.sum(axis=0) @ BETS  # small p-values gain on negative bets
        is_alarm = evidence >= self.limit
        if is_alarm:
            self.capital = np.zeros_like(self.capital)
        return Drift(p_value, evidence, UP if against < 0 else DOWN, is_alarm)

    def _p_value(self, score: float) -> float:
        """The share of scores at least as high, its own among them, ties broken at random."""
        higher = len(self.scores) - bisect_right(self.scores, score)
        equal = bisect_right(self.scores, score) - bisect_left(self.scores, score)
        return (higher + self.random.random() * (equal + 1)) / (len(self.scores) + 1)

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on, in plain values."""
        return {
            "scores": self.scores,
            "limit": self.limit,
            "capital": self.capital.tolist(),
            "random": self.random.getstate(),
        }


def moved(capital: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Capital (R, E) after a share of each row, by its rate (R,), has moved evenly among its bets."""
    rates = rates[:, None]
    return (1 - rates) * capital + rates * capital.mean(axis=1, keepdims=True)
