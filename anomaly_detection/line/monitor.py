"""What has changed on the line: scores against the calibration images, pictures against those that
the detector was fitted to.

Each quantity has a drift monitor of its own. Only other parts and defects change the scores alone;
another lamp, exposure or focus shows in the pictures as well.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from anomaly_detection.inference.detector import Detector
from anomaly_detection.line.drift import LIMIT, MOST_SCORES, DriftMonitor

SCORE = "score"
RECENT = 1000  # images for which a change of the pictures explains one of the scores
SUSPICION = 10  # a change of the pictures explains others at this part of an alarm's evidence
CAUSES = {
    ("score", "up"): "scores are higher than at calibration: other parts, or other pictures",
    ("score", "down"): "scores are lower than at calibration: defects may be missed",
    ("brightness", "up"): "pictures are brighter than the fit images: look at light and exposure",
    ("brightness", "down"): "pictures are darker than the fit images: look at light and exposure",
    ("contrast", "up"): "pictures have more contrast than the fit images: look at the light",
    ("contrast", "down"): "pictures have less contrast than the fit images: look at light and lens",
    ("sharpness", "up"): "pictures are sharper or noisier than the fit images: look at the camera",
    ("sharpness", "down"): "pictures are less sharp than the fit images: look at focus and lens",
}
OF_CAMERA = "the pictures have changed too ({}): look at camera and light first"
OF_PARTS = "brightness, contrast and sharpness have not changed: look at the parts first"


class Alarm(NamedTuple):
    """That a quantity has changed.

    Attributes:
        quantity: `score`, or a field of `Statistics`.
        direction: `up` or `down`.
        text: For people: what has changed, and where to look.
    """

    quantity: str
    direction: str
    text: str


class LineMonitor:
    """Watches a detector's scores, and the pictures that they are of.

    Args:
        detector: Its calibration scores and fit images are what is compared with.
        limit: As in `DriftMonitor`, for each quantity.
    """

    def __init__(self, detector: Detector, limit: float = LIMIT) -> None:
        known = {SCORE: detector.calibration_scores.tolist(), **detector.fit_statistics}
        self.monitors = {name: DriftMonitor(values, limit) for name, values in known.items()}
        self.limit, self.num_images = limit, 0
        self.changes: dict[str, tuple[int, str]] = {}  # suspected last: at which image, and whither

    def add(self, values: Mapping[str, float]) -> tuple[dict[str, float], list[Alarm]]:
        """Take an image's score and statistics; returns the evidence of each, and new alarms.

        A statistic that is not known is left out.
        """
        self.num_images += 1
        watched = {name: one for name, one in self.monitors.items() if name in values}
        found = {name: one.add(values[name]) for name, one in watched.items()}
        for name, one in found.items():
            if one.evidence >= self.limit / SUSPICION:
                self.changes[name] = (self.num_images, one.direction)
        new = {name: one.direction for name, one in found.items() if one.is_alarm}
        alarms = [Alarm(name, way, self._text(name, way, set(found))) for name, way in new.items()]
        return {name: one.evidence for name, one in found.items()}, alarms

    def _text(self, quantity: str, direction: str, watched: set[str]) -> str:
        cause, of_pictures = CAUSES[quantity, direction], watched - {SCORE}
        if quantity != SCORE or not of_pictures:
            return cause
        changed = [
            f"{name} {way}"
            for name, (image, way) in self.changes.items()
            if name in of_pictures and image > self.num_images - RECENT
        ]
        return f"{cause}; " + (OF_CAMERA.format(", ".join(changed)) if changed else OF_PARTS)

    @property
    def state(self) -> dict[str, Any]:
        """What `restore` needs besides the values themselves, for JSON."""
        return {
            "num_images": self.num_images,
            "changes": self.changes,
            "capital": {name: one.capital.tolist() for name, one in self.monitors.items()},
        }

    @property
    def is_learning(self) -> bool:
        """Whether the next image's values will be kept to rank later ones by."""
        return any(len(one.scores) < MOST_SCORES for one in self.monitors.values())

    def restore(self, state: Mapping[str, Any], values: Iterable[Mapping[str, float]]) -> None:
        """Go on where another monitor of the same detector has stopped.

        Args:
            state: Its `state`.
            values: What it was given while it was learning.
        """
        self.num_images = state["num_images"]
        self.changes = {name: (image, way) for name, (image, way) in state["changes"].items()}
        seen = list(values)
        for name, one in self.monitors.items():
            one.restore(
                state["capital"][name], [x[name] for x in seen if name in x], seed=self.num_images
            )
