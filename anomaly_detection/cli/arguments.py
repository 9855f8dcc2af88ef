"""What several subcommands' arguments have in common."""

import argparse

from anomaly_detection.line.drift import LIMIT


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option `--device`."""
    parser.add_argument("--device", default="cpu", help="of a .pt: cpu, cuda, mps, auto")


def add_limit(parser: argparse.ArgumentParser) -> None:
    """The option `--limit`."""
    parser.add_argument(
        "--limit",
        type=positive,
        default=LIMIT,
        metavar="N",
        help="evidence of drift that makes an alarm: false ones at most once in about N images",
    )


def positive(text: str) -> int:
    """A number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value
