"""Take pictures with an inspector's label into the data set, as a commit that `dvc repro` then
uses: normal ones to train with, anomalous ones to test with. If a row has a fault, nothing is
written. The exit status is 0."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `feedback`."""
    parser.add_argument(
        "corrections",
        type=Path,
        metavar="CORRECTIONS.csv",
        help="rows of predict with a column label (normal, anomalous, or empty: not looked at), "
        "and defect_type, if you like",
    )
    parser.add_argument(
        "--category",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of the category's images: <data.root>/<category>",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be copied, and write nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Take in what was labelled; returns the exit status."""
    from anomaly_detection.line.feedback import add, commit, described, next_steps, planned

    images = planned(options.corrections, options.category)
    if options.dry_run:
        for image in images:
            if image.is_new:
                print(f"{image.source} -> {image.path}")
        print(described(images))
    else:
        add(images, options.category)
        print(described(images))
        print(commit(images, options.category, options.corrections))
        print(next_steps())
    return 0
