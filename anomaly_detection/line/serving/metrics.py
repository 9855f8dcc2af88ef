"""What Prometheus scrapes, and what is said on standard error."""

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Summary,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from anomaly_detection.inference.statistics import Statistics
from anomaly_detection.line.journal import Row
from anomaly_detection.line.monitor import Alarm
from anomaly_detection.line.patience import say

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters, gauges and histograms, all named `anomaly_detection_...`."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "anomaly_detection", "registry": self.registry}
        self.requests = Counter("requests", "Requests", ["endpoint", "status"], **own)
        self.seconds = Histogram(
            "request_seconds", "Time to an answer", ["endpoint"], buckets=SECONDS, **own
        )
        self.waiting = Gauge("waiting", "Requests that wait for a verdict", **own)
        self.verdicts = Counter("verdicts", "Verdicts", ["category", "verdict"], **own)
        self.scores = Summary("score", "Scores", ["category"], **own)
        self.evidence = Gauge("drift_evidence", "Of drift", ["category", "quantity"], **own)
        self.alarms = Counter(
            "drift_alarms", "Alarms of drift", ["category", "quantity", "direction"], **own
        )
        self.statistics = {
            name: Gauge(f"picture_{name}", f"The last picture's {name}", ["category"], **own)
            for name in Statistics._fields
        }
        self.detector = Info("detector", "The detector that serves", ["category"], **own)
        self.reloads = Counter("reloads", "Detectors exchanged", ["category"], **own)
        self.failed_reloads = Counter(
            "failed_reloads", "New detectors that were refused", ["category"], **own
        )
        self.failures = Counter("failures", "Writes that failed", ["what"], **own)
        for what in ("journal", "pictures"):
            self.failures.labels(what)
        self.said: set[str] = set()

    def judged(self, category: str, verdict: str, score: float) -> None:
        """Count a verdict."""
        self.verdicts.labels(category, verdict).inc()
        self.scores.labels(category).observe(score)

    def recorded(self, row: Row) -> None:
        """Take what a row says of the line."""
        category = row["category"]
        for name, gauge in self.statistics.items():
            gauge.labels(category).set(row[name])

    def drifted(
        self, category: str, evidence: Mapping[str, float], alarms: Sequence[Alarm]
    ) -> None:
        """Take what a monitor says of an image."""
        for name, value in evidence.items():
            self.evidence.labels(category, name).set(value)
        for alarm in alarms:
            self.alarms.labels(category, alarm.quantity, alarm.direction).inc()

    def fails(self, what: str, text: str) -> None:
        """Count a failure, and say it if what fails has worked before."""
        self.failures.labels(what).inc()
        if what not in self.said:
            self.said.add(what)
            say(text)

    def works(self, what: str) -> None:
        """Say the next failure again."""
        self.said.discard(what)

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self.registry)
