"""Look for drift in verdicts of the past: whether scores have changed since the detector was
calibrated. The exit status is 0."""

import argparse
from pathlib import Path

from anomaly_detection.cli.arguments import add_limit
from anomaly_detection.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `drift`."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="FILE", help="rows of predict, the oldest first"
    )
    parser.add_argument("--detector", type=Path, required=True, help="that gave these verdicts")
    add_limit(parser)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write scores and evidence")
    parser.add_argument("--fail-on-alarm", action="store_true", help="exit with 2 if there is one")


def run(options: argparse.Namespace) -> int:
    """Look for drift; returns the exit status."""
    from anomaly_detection.inference.detector import Detector
    from anomaly_detection.line.past import described, draw, watched

    detector = Detector.load(options.detector)
    past = watched(detector, options.paths, options.limit)
    if not len(past.scores):
        raise UserError(f"{options.paths[0]} must have scores, but has none.")
    print(described(past, options.limit))
    if options.picture:
        draw(past, detector, options.limit, options.picture)
    return 2 if options.fail_on_alarm and past.alarms else 0
