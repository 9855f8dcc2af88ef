"""The tasks of `benchmarks.detection` that need PyTorch; each prints its result as a line of JSON.

    python -m benchmarks.detection_work NAME ARGUMENT ...

Runs in a copy of the project, and finds there what its stages have written. A peer gets the images
that `stages.evaluate` scores, and gives their scores back: whoever gave them, our own evaluation
turns them into metrics.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages import run  # isort: skip, before PyTorch: it makes idle threads sleep

import numpy as np
import torch
from torch import Tensor, nn

from anomaly_detection.config import load_config
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.evaluation.prepared import calibrate, evaluate_prepared
from anomaly_detection.features.pyramid import FeaturePyramid, available_levels
from anomaly_detection.features.weights import BUNDLED, source
from anomaly_detection.inference.pytorch import read_detector, verdict_model
from anomaly_detection.trainer import choose_device


class Recorder(nn.Module):
    """In a model's place, notes the images that it is to score; the scores mean nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[np.ndarray] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Note the images (N, 3, S, S)."""
        self.images.append(images.numpy())
        return {"pred_score": images.float().mean(dim=(1, 2, 3))}


class Player(nn.Module):
    """In a model's place, returns scores that are known already, in the order of the images.

    Args:
        scores: Shape (N,), for the images that a `Recorder` has noted.
    """

    def __init__(self, scores: np.ndarray) -> None:
        super().__init__()
        self.left = torch.from_numpy(scores)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The next scores."""
        scores, self.left = self.left[: len(images)], self.left[len(images) :]
        return {"pred_score": scores}


def evaluated(model: nn.Module, category: str) -> dict[str, Any]:
    """The metrics that `stages.evaluate` finds for a model, on the CPU."""
    options = load_config().evaluation
    prepared = Path("data/prepared") / category
    common: dict[str, Any] = {"device": "cpu", "batch_size": options.batch_size}
    _, threshold = calibrate(
        [(model, PreparedDataset(prepared, "calibration"))],
        options.threshold_method,
        false_reject_rate=options.false_reject_rate,
        quantile=options.quantile,
        manual=options.threshold,
        **common,
    )
    results = evaluate_prepared(
        model,
        PreparedDataset(prepared, "test"),
        threshold,
        aupro_limit=options.aupro_limit,
        synthetic_images=options.synthetic_images,
        maps_path=Path("no_maps.npy"),
        **common,
    )
    return results.metrics


def collect(category: str, folder: str) -> dict[str, Any]:
    """Write what a peer needs: images to score as images.npy, the bundled teacher as teacher.pt."""
    evaluated(recorder := Recorder(), category)
    np.save(Path(folder) / "images.npy", np.concatenate(recorder.images))
    teacher = {
        "backbone": BUNDLED,
        "levels": available_levels(BUNDLED),
        "state_dict": source(BUNDLED, "bundled")["pretrained_cfg_overlay"]["state_dict"],
        "normalisation": FeaturePyramid(BUNDLED).normalisation.state_dict(),
    }
    torch.save(teacher, Path(folder) / "teacher.pt")
    return {}


def measure(category: str, scores: str) -> dict[str, Any]:
    """The metrics of a peer's scores."""
    return {"metrics": evaluated(Player(np.load(scores)), category)}


@torch.inference_mode()
def time_images(folder: str, num_images: str, *files: str) -> dict[str, Any]:
    """Seconds from an image in memory to its score, for each detector; the detectors take turns."""
    device = choose_device(load_config().hardware.device)
    images = np.load(Path(folder) / "images.npy", mmap_mode="r")[: int(num_images)]
    models = {Path(x).stem: verdict_model(read_detector(Path(x)), device) for x in files}
    seconds = defaultdict(list)
    for image in images:
        for name, model in models.items():
            start = time.perf_counter()
            float(model(torch.tensor(image)[None].to(device))["score"])
            seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds}


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    work.__name__: work for work in (collect, measure, time_images)
}


def main(name: str, *arguments: str) -> None:
    """Do the task, and print its result."""
    print(json.dumps(WORK[name](*arguments)))


if __name__ == "__main__":
    run(main)
