"""How many good parts are rejected where several pictures of one part are divided by picture.

    python -m benchmarks.several_pictures [--divisions N]

Generated parts are each pictured three times, under other light and with other noise. A fifth of
the parts is the test. The pictures of the others are divided as the pipeline does, once picture by
picture and once part by part, as with `data.group`. Divided by picture, calibration pictures have
a near-duplicate among those of the fit, score too low, and so does the threshold. Of both, the
table has the share of rejected test pictures, whose parts are always new.

The models and the scores are those of `benchmarks.false_rejects`.
"""

import argparse

from stages import run  # isort: skip, before PyTorch: it makes idle threads sleep

import numpy as np
import torch
from torch import Tensor

from anomaly_detection.data import draw_folds, split_normal_images
from anomaly_detection.data.decode import resize_image
from benchmarks.false_rejects import (
    CALIBRATION,
    IMAGE_SIZE,
    RATE,
    TEST_FOLDS,
    VALIDATION,
    Division,
    gaussian,
    memory_bank,
    split_outcome,
)
from benchmarks.generated import PRODUCTS, SIDE

PICTURES = 3  # of each part
NUM_PARTS = 108  # so that 39 pictures calibrate, which allow 5 % exactly
PRODUCT_NAMES = ("tile", "board")
NOISE = 3.0  # grey levels


def main(*arguments: str) -> None:
    """Divide, fit, and print a table in Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.several_pictures", description=__doc__
    )
    parser.add_argument("--divisions", type=int, default=200, help="default: 200")
    seeds = range(parser.parse_args(arguments).divisions)
    parts = [str(i // PICTURES) for i in range(NUM_PARTS * PICTURES)]
    print(f"| product | model | divided by | false rejects, {RATE:.0%} asked for | 5 / 50 / 95 % |")
    print("|---|---|---|---|---|")
    for product in PRODUCT_NAMES:
        images = pictures(product)
        for model, known in (("PatchCore", memory_bank), ("Gaussian", gaussian)):
            fit = known(images)
            for unit in ("picture", "part"):
                outcomes = [split_outcome(fit, divide(parts, unit, seed)) for seed in seeds]
                rates = np.array([outcome.rate for outcome in outcomes])
                low, middle, high = np.quantile(rates, (0.05, 0.5, 0.95))
                spread = f"{low:.1%} / {middle:.1%} / {high:.1%}"
                row = (product, model, unit, f"{rates.mean():.1%}", spread)
                print(f"| {' | '.join(row)} |", flush=True)


def pictures(product: str) -> Tensor:
    """The pictures of all parts, those of one after the other, uint8 (N, 3, S, S)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    found = []
    for _ in range(NUM_PARTS):
        part = PRODUCTS[product].draw(rng)
        for _ in range(PICTURES):
            light = rng.uniform(0.85, 1.15) + rng.normal(0, 0.1) * x + rng.normal(0, 0.1) * y
            seen = (part * light + rng.normal(0, NOISE, part.shape)).clip(0, 255).astype(np.uint8)
            found.append(resize_image(seen, IMAGE_SIZE))
    return torch.from_numpy(np.stack(found))


def divide(parts: list[str], unit: str, seed: int) -> Division:
    """Test pictures of parts of their own; the others divided by `part` or by `picture`."""
    fold = draw_folds(parts, TEST_FOLDS, seed)
    test = [i for i, x in enumerate(fold) if x == 0]
    train = [i for i, x in enumerate(fold) if x != 0]
    names = [parts[i] if unit == "part" else str(i) for i in train]
    drawn = split_normal_images(names, VALIDATION, CALIBRATION, seed)
    fit, validation, calibration = (
        [i for i, split in zip(train, drawn, strict=True) if split == name]
        for name in ("fit", "validation", "calibration")
    )
    return Division(fit, validation, calibration, test)


if __name__ == "__main__":
    run(main)
