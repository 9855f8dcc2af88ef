"""A small category in each of the layouts that data sets have."""

from pathlib import Path

import numpy as np

from builders.images import random_pixels, write_category, write_image

GREY = np.full((8, 8), 90, np.uint8)


def write_mvtec(root: Path) -> Path:
    return write_category(root / "part", size=32, num_train=1, num_test=1)


def write_btad(root: Path) -> Path:
    folder = root / "01"
    for name in ("train/ok/0", "train/ok/1", "train/ok/2", "test/ok/0", "test/ko/0"):
        write_image(folder / f"{name}.bmp", GREY)
    write_image(folder / "ground_truth" / "ko" / "0.png", GREY)
    return folder


def write_visa(root: Path) -> Path:
    images = "candle/Data/Images"
    rows = [
        ("candle", "train", "normal", f"{images}/Normal/1.JPG", ""),
        ("candle", "train", "normal", f"{images}/Normal/0.JPG", ""),
        ("candle", "test", "normal", f"{images}/Normal/2.JPG", ""),
        ("candle", "test", "anomaly", f"{images}/Anomaly/0.JPG", "candle/Data/Masks/Anomaly/0.png"),
        ("capsules", "train", "normal", "capsules/Data/Images/Normal/0.JPG", ""),
    ]
    for row in rows[:4]:
        for name in filter(None, row[3:]):
            write_image(root / name, GREY)
    write_split(root, rows)
    return root / "candle"


def write_split(root: Path, rows: list[tuple[str, ...]]) -> None:
    """Write VisA's own table of images."""
    lines = [",".join(row) for row in [("object", "split", "label", "image", "mask"), *rows]]
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines))


def write_table(
    root: Path,
    *lines: str,
    heads: str = "path,label,split,mask,defect_type",
    encoding: str = "utf-8",
) -> Path:
    """Images and `samples.csv`, which by default names all but a mask."""
    folder = root / "part"
    for name in ("good one.png", "gut/größe.png", "test/a.png", "b.png", "b mask.png", "c.tif"):
        write_image(folder / name, GREY)
    lines = lines or (
        "good one.png,normal,,,",
        "gut/größe.png,0,train,,good",
        "test/a.png,0,test,,",
        "b.png,anomalous,,b mask.png,scratch",
        "c.tif,1,test,,",
    )
    (folder / "samples.csv").write_text("\n".join([heads, *lines]), encoding=encoding)
    return folder


def write_folder(root: Path, count: int = 3) -> Path:
    for i in range(count):
        write_image(root / "part" / f"{i}.png", random_pixels(8, 8, seed=i))
    return root / "part"
