"""Judge images: a row for each, with its score and verdict, or the error of one that cannot be
read. The exit status is 0, or 1 if an image could not be read."""

import argparse
import sys
from pathlib import Path

from anomaly_detection.cli.arguments import add_device, positive


def add_options(parser: argparse.ArgumentParser) -> None:
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
    add_device(parser)
    parser.add_argument("--batch-size", type=positive, default=1, help="more is faster on a GPU")
    parser.add_argument("--threads", type=positive, help="that decode; default: one for each core")


def run(options: argparse.Namespace) -> int:
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
