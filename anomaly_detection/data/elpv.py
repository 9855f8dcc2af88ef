"""ELPV, the built-in data set: electroluminescence images of solar cells, some defective.

2,624 grey images of 300 x 300 pixels, each with a defect probability; data under CC BY-NC-SA 4.0.
S. Deitsch et al., "Automatic classification of defective photovoltaic module cells in
electroluminescence images", Solar Energy 185, 2019.
"""

import random
import shutil
from importlib.util import find_spec
from pathlib import Path

from anomaly_detection.errors import DataError

ROOT = "data/elpv"
PHOTOGRAPHS = "data/photographs"  # the built-in auxiliary images
CATEGORIES = ("mono", "poly")
TEST_SHARE = 5  # one normal cell in five
SEED = 0


def require_elpv() -> None:
    """Check that the data set's package is installed.

    Raises:
        DataError: It is not.
    """
    if find_spec("elpv_dataset") is None:
        raise DataError(
            f"data.root {ROOT} needs the package elpv-dataset (CC BY-NC-SA 4.0), which is not "
            "installed: pip install -e '.[elpv]', or set data.root to a folder of your own."
        )


def write_elpv(folder: Path) -> None:
    """Write the data set in the MVTec AD layout, from the files of the package `elpv-dataset`.

    A category is a cell type. Cells with defect probability 0 are normal and those with 1
    defective; the uncertain ones are left out. A fifth of the normal ones is for testing.

    Raises:
        DataError: The package is not installed.
    """
    require_elpv()
    import elpv_dataset

    source = Path(elpv_dataset.__file__).parent / "data"
    cells = [line.split() for line in (source / "labels.csv").read_text().splitlines()]
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for category in CATEGORIES:
        good = [name for name, defect, kind in cells if kind == category and float(defect) == 0]
        defective = [
            name for name, defect, kind in cells if kind == category and float(defect) == 1
        ]
        random.Random(SEED).shuffle(good)
        num_test = len(good) // TEST_SHARE
        _copy(source, good[num_test:], partial / category / "train" / "good")
        _copy(source, good[:num_test], partial / category / "test" / "good")
        _copy(source, defective, partial / category / "test" / "defective")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _copy(source: Path, names: list[str], target: Path) -> None:
    target.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, target / Path(name).name)
