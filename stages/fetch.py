"""Write the built-in data set: the package elpv-dataset -> data/elpv."""

from pathlib import Path

from anomaly_detection import elpv
from stages import run


def main() -> None:
    """Write it."""
    elpv.write_elpv(Path(elpv.ROOT))


if __name__ == "__main__":
    run(main, note_cost=True)
