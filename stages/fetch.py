"""Write the built-in data set: the package elpv-dataset -> data/elpv.

Where data.root is another folder, data/elpv stays empty.
"""

from pathlib import Path

from anomaly_detection.config import load_config
from anomaly_detection.data import elpv
from stages import run


def main() -> None:
    """Write it if it is asked for."""
    if Path(load_config().data.root) == Path(elpv.ROOT):
        elpv.write_elpv(Path(elpv.ROOT))
    else:
        Path(elpv.ROOT).mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    run(main, note_cost=True)
