"""The benchmark of detection: how it judges a peer, and what it prints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_category
from ruamel.yaml import YAML
from torch import nn

from anomaly_detection.data.prepare import prepare_category
from benchmarks import detection
from benchmarks.detection_work import Player, Recorder, evaluated

ROOT = Path(__file__).parent.parent


class Brightest(nn.Module):
    """The score is the highest pixel, which misses dark defects."""

    def forward(self, images):
        return {"pred_score": images.float().amax(dim=(1, 2, 3))}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The working directory is a project with the prepared category `widget`."""
    monkeypatch.chdir(tmp_path)
    write_category(tmp_path / "parts" / "widget", size=32)
    splits = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "seed": 0}
    prepare_category(
        tmp_path / "parts",
        "widget",
        tmp_path / "data" / "prepared" / "widget",
        image_size=32,
        bit_depth=16,
        **splits,
    )
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params["evaluation"] |= {"false_reject_rate": 0.25, "synthetic_images": 1}
    yaml.dump(params, tmp_path / "params.yaml")
    return "widget"


def test_recorded_images_and_played_scores_give_the_metrics_of_the_model_itself(prepared):
    model, recorder = Brightest(), Recorder()
    evaluated(recorder, prepared)
    images = np.concatenate(recorder.images)
    player = Player(model(torch.from_numpy(images))["pred_score"].numpy())
    metrics = evaluated(player, prepared)
    assert metrics == evaluated(model, prepared)
    assert len(player.left) == 0
    assert metrics["per_defect_type"]["bright"]["detection_rate"] == 1
    assert metrics["per_defect_type"]["dark"]["detection_rate"] < 1
    assert metrics["synthetic"]["num_images"] == 32


def result(auroc, misses, size, seconds):
    return {
        "metrics": {
            "image_auroc": auroc,
            "intervals": {"image_auroc": [auroc - 0.02, auroc + 0.01]},
            "num_misses": misses,
            "num_anomalous": 20,
            "num_false_rejects": 1,
            "num_normal": 30,
            "synthetic": {"size_detected_in_90_percent": size},
        },
        "fit": {"wall": seconds, "cpu": 2 * seconds, "peak_memory": 1.25e9},
        "seconds_per_image": 0.0123,
        "detector_bytes": 3_450_000,
        "hardware": {"cpu": "some CPU", "instructions": "AVX2"},
        "versions": {"python": "3.11", "torch": "2.9"},
    }


def test_the_table_has_the_detection_of_each_category_and_the_costs_of_the_first():
    results = {
        "nut": {"`a`": result(0.95, 3, 0.091, 7.2), "b": result(0.5, 20, None, 60.0)},
        "bolt": {"`a`": result(0.9, 4, 0.2, 99.0), "b": result(0.6, 19, None, 99.0)},
    }
    rows = [line.strip("| ").split(" | ") for line in detection.table(results).splitlines()]
    assert len({len(row) for row in rows[1:]}) == 1
    assert rows[2] == [
        "`a`",
        *("0.950 (0.930 to 0.960)", "3 of 20", "1 of 30", "9.1 %"),
        *("0.900 (0.880 to 0.910)", "4 of 20", "1 of 30", "20.0 %"),
        *("7 s", "14 s", "1.2 GB", "12 ms", "3.5 MB"),
    ]
    assert rows[3][1:5] == ["0.500 (0.480 to 0.510)", "20 of 20", "1 of 30", "none"]


def test_the_conditions_name_the_hardware_and_the_versions_of_both_sides():
    peer = result(0.5, 20, None, 60.0) | {"versions": {"anomalib": "2.7.0", "torch": "2.9"}}
    del peer["hardware"]
    report = {"image_size": 128, "results": {"nut": {"`a`": result(0.9, 3, 0.1, 7), "b": peer}}}
    text = detection.conditions(report)
    for part in ("some CPU, AVX2", "128 x 128", "python 3.11, torch 2.9", "anomalib 2.7.0"):
        assert part in text
