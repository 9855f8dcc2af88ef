"""Whether what comes in still looks like what the detector was calibrated on.

Each score becomes a p-value: its rank among the calibration scores and all scores before it (online
conformal prediction). While all of them are exchangeable, the p-values are independent and uniform,
however few calibration scores there are (Vovk, Gammerman and Shafer, "Algorithmic Learning in a
Random World", 2005, chapter 8). Ranks among the calibration scores alone would not be independent.
Bets against uniform p-values gain when scores have changed.

The bets are simple jumpers (Vovk et al., "Retrain or not retrain", 2021, arXiv:2102.10439):
1 + e (p - 1/2) for some values of e, among which capital moves at a rate; several rates share it.
Every image opens a bet of 1, and the evidence is what all open bets are worth, the Shiryaev-Roberts
statistic. Without a change its mean after n images is n, so that by Doob's inequality it reaches c
within n images with a probability of at most n / c.
"""

import random
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

BETS = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
RATES = np.array([1e-3, 1e-2, 1e-1])
MOST_SCORES = 100_000  # that are kept to rank by; later ones are ranked among the first
LIMIT = 1_000_000  # by default: false alarms come at most once in about so many images


class Drift(NamedTuple):
    """What is known after an image.

    Attributes:
        p_value: Of this image, in [0, 1]; small for a high score.
        evidence: What all bets are worth.
        direction: `up` if scores are higher than before, `down` if they are lower.
        is_alarm: Whether the evidence has reached its limit; it starts at 0 again then.
    """

    p_value: float
    evidence: float
    direction: str
    is_alarm: bool


class DriftMonitor:
    """Watches a stream of scores.

    Args:
        calibration_scores: The detector's.
        limit: The evidence that makes an alarm. Without a change, the probability of an alarm
            within n images is at most n / limit.
        seed: Breaks ties.
    """

    def __init__(
        self, calibration_scores: Iterable[float], limit: float = LIMIT, seed: int = 0
    ) -> None:
        self.scores = sorted(map(float, calibration_scores))
        self.limit = limit
        self.random = random.Random(seed)
        self.capital = np.zeros((len(RATES), len(BETS)))

    def add(self, score: float) -> Drift:
        """Take an image's score."""
        p_value = self._p_value(score)
        if len(self.scores) < MOST_SCORES:
            insort(self.scores, score)
        self.capital = after_bet(self.capital, p_value)
        evidence = float(self.capital.sum())
        direction = "up" if float((self.capital @ BETS).sum()) < 0 else "down"
        is_alarm = evidence >= self.limit
        if is_alarm:
            self.capital = np.zeros_like(self.capital)
        return Drift(p_value, evidence, direction, is_alarm)

    def restore(self, capital: Sequence[Any], scores: Iterable[float], seed: int) -> None:
        """Go on where another monitor has stopped, with its capital and the scores that it took."""
        self.capital = np.array(capital)
        room = max(0, MOST_SCORES - len(self.scores))
        self.scores = sorted([*self.scores, *islice(scores, room)])
        self.random = random.Random(seed)

    def _p_value(self, score: float) -> float:
        """The share of scores at least as high, its own among them; ties are broken at random."""
        first, last = bisect_left(self.scores, score), bisect_right(self.scores, score)
        higher, equal = len(self.scores) - last, last - first
        return (higher + self.random.random() * (equal + 1)) / (len(self.scores) + 1)


def after_bet(capital: np.ndarray, p_value: float | np.ndarray) -> np.ndarray:
    """What capital is worth after another image, which opens a bet of 1.

    Args:
        capital: Shape (..., R, E) for each of RATES and BETS.
        p_value: Of the image, shape (...).
    """
    opened = capital + 1 / (len(RATES) * len(BETS))
    return moved(opened, RATES) * (1 + BETS * (np.asarray(p_value)[..., None, None] - 0.5))


def moved(capital: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Capital (..., R, E) after a share of each row, by its rate (R,), has spread over its bets."""
    shares = rates[:, None]
    return (1 - shares) * capital + shares * capital.mean(axis=-1, keepdims=True)
