"""The command `anomaly-detection`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from anomaly_detection.errors import UserError

DRIFT = """Look for drift in verdicts of the past: whether scores have changed since the detector
was calibrated. The exit status is 0."""
PREDICT = """Judge images: a row for each, with its score and verdict, or the error of one that
cannot be read. The exit status is 0, or 1 if an image could not be read."""


class Parser(argparse.ArgumentParser):
    """Leaves the exit status 2 to `--fail-on-anomaly`."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments with one line."""
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a subcommand, and exit with its status; a UserError is printed, with status 1."""
    parser = Parser(prog="anomaly-detection", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_predict(commands.add_parser("predict", help="judge images", description=PREDICT))
    add_drift(commands.add_parser("drift", help="look for drift", description=DRIFT))
    try:
        options = parser.parse_args(arguments)
        sys.exit(options.run(options))
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the rows has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def add_predict(parser: argparse.ArgumentParser) -> None:
    """The options of `predict`."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files, folders, patterns, or - for a list of paths on standard input",
    )
    parser.add_argument(
        "--detector",
        type=Path,
        required=True,
        help="detectors/<category>.pt, exports/<category>, or a model in it",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument(
        "--format", choices=("csv", "jsonl"), help="default: jsonl for a FILE.jsonl, else csv"
    )
    parser.add_argument(
        "--overlays", type=Path, metavar="FOLDER", help="write pictures, the anomalous pixels red"
    )
    parser.add_argument(
        "--maps", type=Path, metavar="FOLDER", help="write anomaly maps, float32 .npy"
    )
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="FOLDER",
        help="with a mask of each picture's name, if the detector was fitted with masks",
    )
    parser.add_argument(
        "--fail-on-anomaly", action="store_true", help="exit with 2 if an image is anomalous"
    )
    parser.add_argument("--device", default="cpu", help="of a .pt: cpu, cuda, mps, auto")
    parser.add_argument("--batch-size", type=positive, default=1, help="more is faster on a GPU")
    parser.add_argument("--threads", type=positive, help="that decode; default: one for each core")
    parser.set_defaults(run=predict)


def add_drift(parser: argparse.ArgumentParser) -> None:
    """The options of `drift`."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="FILE", help="rows of predict, the oldest first"
    )
    parser.add_argument("--detector", type=Path, required=True, help="that gave these verdicts")
    parser.add_argument(
        "--limit",
        type=positive,
        default=1_000_000,
        metavar="N",
        help="evidence that makes an alarm: false ones come at most once in about N images",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write scores and evidence")
    parser.add_argument("--fail-on-alarm", action="store_true", help="exit with 2 if there is one")
    parser.set_defaults(run=drift)


def positive(text: str) -> int:
    """A number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def predict(options: argparse.Namespace) -> int:
    """Judge images; returns the exit status."""
    from anomaly_detection.inference.detector import Detector
    from anomaly_detection.inference.files import find_images, judge_files

    judged = judge_files(
        Detector.load(options.detector, options.device),
        find_images(options.paths, sys.stdin),
        options.output,
        format=options.format,
        overlays=options.overlays,
        maps=options.maps,
        masks=options.masks,
        batch_size=options.batch_size,
        num_threads=options.threads,
    )
    if judged.num_errors:
        return 1
    return 2 if options.fail_on_anomaly and judged.num_anomalous else 0


def drift(options: argparse.Namespace) -> int:
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
