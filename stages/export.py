"""Export the detector, and prove it: detectors -> exports, metrics/<category>/parity.json.

Every test image goes from its raw file through `predict` and through each exported format. If one
changes a verdict of the evaluation, the stage fails and the exports are removed.
"""

import csv
import shutil
from pathlib import Path

import numpy as np

from anomaly_detection.config import load_config
from anomaly_detection.data import PreparedArrays
from anomaly_detection.data.sample import picture_named
from anomaly_detection.export import (
    FORMATS,
    SUBSET,
    close_calls,
    export_detector,
    measure_parity,
    refuse_changes,
)
from anomaly_detection.inference import Detector
from stages import TIMES, run, write_json


def main(category: str) -> None:
    """Export the detector of `category`."""
    config = load_config()
    detector, folder = Path("detectors") / f"{category}.pt", Path("exports") / category
    fit = PreparedArrays(Path("data/prepared") / category, "fit")
    some = np.linspace(0, len(fit.positions) - 1, min(SUBSET, len(fit.positions))).astype(int)
    export_detector(detector, config.export.formats, folder, fit.read(some))
    files = {"predict": detector}
    files |= {name: folder / FORMATS[name].file for name in config.export.formats}
    detectors = {name: Detector.load(path) for name, path in files.items()}
    raw = Path(config.data.root) / category
    paths, *found = evaluated(category)
    masks = None
    if config.data.mask and (raw / config.data.mask).is_dir():
        masks = [picture_named(path, raw / config.data.mask) for path in paths]
    parity, speeds = measure_parity(detectors, [raw / path for path in paths], *found, masks=masks)
    try:
        refuse_changes(parity, config.export.allow_changed_verdicts)
    except Exception:
        shutil.rmtree(folder)
        raise
    write_json(TIMES / category / "speeds.json", speeds)
    write_json(Path("metrics") / category / "parity.json", parity)
    write_json(Path("report_data/parity") / f"{category}.json", parity)
    for name in close_calls(parity):
        print(
            f"{category}: a score is {parity['nearest_score']:.1e} from the threshold, and {name} "
            "differs by more; see docs/deployment.md for a threshold with a margin."
        )


def evaluated(category: str) -> tuple[list[Path], np.ndarray, np.ndarray, np.ndarray | None]:
    """The test images' files in the category, their scores (N,), verdicts (N,) and maps."""
    folder = Path("predictions") / category
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    maps = folder / "anomaly_maps.npy"
    return (
        [Path(row["path"]) for row in rows],
        np.array([row["score"] for row in rows], dtype=np.float32),
        np.array([row["pred_label"] == "1" for row in rows]),
        np.load(maps, mmap_mode="r") if maps.is_file() else None,
    )


if __name__ == "__main__":
    run(main, note_cost=True)
