"""Plot a category's results, and write its part of the report.

Reads predictions, metrics and data/prepared; writes plots/<category>, with the tables for
`dvc plots`, and report_data/<category>.json.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_detection.config import load_config
from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.report.category import (
    CategoryResults,
    Pair,
    draw_plots,
    page_data,
    tables,
)
from stages import run, write_json

NUM_PAIRS = 8  # near-duplicates on the page


def main(category: str) -> None:
    """Plot the results of `category`."""
    options, output = load_config().plots, Path("plots") / category
    results = read_results(category)
    draw_plots(results, output, options.gallery_size, options.colormap)
    for name, columns in tables(results).items():
        write_csv(output / f"{name}.csv", columns)
    content = page_data(results, options.colormap)
    write_json(Path("report_data") / f"{category}.json", content, indent=None)


def read_results(category: str) -> CategoryResults:
    """The results of the earlier stages; maps only if the model gives any."""
    metrics, predictions = Path("metrics") / category, Path("predictions") / category
    maps = predictions / "anomaly_maps.npy"
    test = PreparedArrays(Path("data/prepared") / category, "test")
    with (predictions / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    evaluation = json.loads((metrics / "evaluate.json").read_text())
    return CategoryResults(
        name=category,
        training=json.loads((metrics / "train.json").read_text()),
        metrics=evaluation,
        rows=rows,
        pictures=test.pictures(),
        maps=np.load(maps, mmap_mode="r") if maps.exists() else None,
        masks=[
            None if (mask := test.mask(i)) is None else test.shown(mask) for i in range(len(rows))
        ],
        aspects=test.aspects,
        pairs=pictures_of(evaluation["data"]["near_duplicates"][:NUM_PAIRS], category),
        side=None if test.is_tiled else shortest_side(test),
    )


def shortest_side(images: PreparedArrays) -> int:
    """The shortest side of all images, in pixels, of what is seen of them."""
    return min(int(row[key]) for row in images.rows for key in ("height", "width"))


def pictures_of(pairs: Sequence[Mapping[str, Any]], category: str) -> list[Pair]:
    """The two pictures of each pair of images."""
    prepared = Path("data/prepared") / category
    found: dict[str, tuple[np.ndarray, float]] = {}
    wanted = {path for pair in pairs for path in pair["paths"]}
    for splits in (("fit", "validation", "calibration"), ("test",)):
        arrays = PreparedArrays(prepared, splits)
        pictures, aspects = arrays.pictures(), arrays.aspects
        found |= {
            row["path"]: (pictures[i], aspects[i])
            for i, row in enumerate(arrays.rows)
            if row["path"] in wanted
        }
    both = [[found[path] for path in pair["paths"]] for pair in pairs]
    return [Pair(np.stack([a[0], b[0]]), (a[1], b[1])) for a, b in both]


def write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


if __name__ == "__main__":
    run(main, note_cost=True)
