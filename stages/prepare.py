"""Decode, resize and split one category: <data.root>/<category> -> data/prepared/<category>."""

from pathlib import Path

from anomaly_detection.config import load_config
from anomaly_detection.data import prepare_category
from stages import run


def main(category: str) -> None:
    """Prepare `category`."""
    data = load_config().data
    prepare_category(
        Path(data.root),
        category,
        Path("data/prepared") / category,
        image_size=data.image_size,
        bit_depth=data.bit_depth,
        validation_fraction=data.validation_fraction,
        calibration_fraction=data.calibration_fraction,
        seed=data.seed,
    )


if __name__ == "__main__":
    run(main)
