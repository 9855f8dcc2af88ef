"""The real `dvc repro` on images in tiles, each with a mask of what is judged."""

import csv
from pathlib import Path

import numpy as np
import pytest
from builders.images import write_image
from builders.projects import ALL, EVERY_CATEGORY, Project, read_json, stages

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    parts = project.folder / "parts/bolt"
    for path in [*parts.glob("train/*/*.png"), *parts.glob("test/*/*.png")]:
        judged = np.ones((64, 64), np.uint8)
        judged[:, :4] = 0
        write_image(parts / "judged" / path.relative_to(parts), judged)
    tiles = {"tile_size": 32, "tile_overlap": 4, "image_size": 32, "mask": "judged"}
    project.change("data", categories=["bolt"], pixel_size=0.5, **tiles)
    project.change("model", name="patchcore")
    project.change("training", num_epochs="auto")
    project.change("patchcore", max_patches=1000, bank_size=100)
    project.change("export", formats=["onnx"])
    assert project.repro() == stages(ALL, EVERY_CATEGORY, ["bolt"])
    return project


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_results_are_those_of_whole_images(project):
    metrics = read_json(project.folder / "metrics/bolt/evaluate.json")
    assert (metrics["num_normal"], metrics["num_anomalous"]) == (4, 8)
    assert metrics["image_auroc"] > 0.9
    assert metrics["pixel_auroc"] > 0.8
    assert metrics["size_unit"] == {"name": "mm", "per_side": 16}
    rows = rows_of(project.folder / "predictions/bolt/scores.csv")
    maps = np.load(project.folder / "predictions/bolt/anomaly_maps.npy")
    assert maps.shape == (len(rows), 512, 512) == (12, 512, 512)
    assert not maps[:, :, :28].any()


def test_exports_give_the_same_verdicts(project):
    parity = read_json(project.folder / "metrics/bolt/parity.json")
    for found in parity["formats"].values():
        assert found["num_verdicts_changed"] == 0
        assert found["largest_map_difference"] < 1e-2


def test_new_pictures_are_judged_with_their_masks(project):
    command = ["predict", "--detector", "exports/bolt", "parts/bolt/test/good"]
    masks, maps = ["--masks", "parts/bolt/judged"], ["--maps", "maps", "--overlays", "overlays"]
    output = ["--output", "rows.csv"]
    project._run("anomaly-detection", *command, *masks, *maps, *output)
    known = {
        Path(row["path"]).name: float(row["score"])
        for row in rows_of(project.folder / "predictions/bolt/scores.csv")
        if row["defect_type"] == "good"
    }
    judged = rows_of(project.folder / "rows.csv")
    assert len(judged) == 4
    for row in judged:
        assert float(row["score"]) == pytest.approx(known[Path(row["path"]).name], rel=1e-4)
    (first, *_) = sorted((project.folder / "maps").rglob("*.npy"))
    assert np.load(first).shape == (64, 64)
    assert len(list((project.folder / "overlays").rglob("*.png"))) == 4
    done = project._run("anomaly-detection", *command, ok=False)
    assert done.stdout.count("must have a mask, since the detector was fitted with masks.") == 4
