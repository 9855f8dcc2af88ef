"""A small detector: random features, a bank of four patches, 32 x 32 pixels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomaly_detection import Detector, models
from anomaly_detection.data.frame import Frame
from anomaly_detection.export import export_detector
from anomaly_detection.inference import encoded_example, save_detector
from anomaly_detection.inference.pytorch import verdict_model
from anomaly_detection.inference.runtimes import Outputs
from anomaly_detection.inference.statistics import Statistics, statistics_of
from anomaly_detection.models import snapshot

SIZE = 32


def pictures(count: int, seed: int = 0, level: float = 128) -> np.ndarray:
    """Noise around a level, uint8 (count, 3, S, S)."""
    rng = np.random.default_rng(seed)
    values = rng.normal(level, 30, (count, 3, SIZE, SIZE))
    return np.asarray(values.clip(0, 255), dtype=np.uint8)


def small_detector(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The content of a detector's file, fitted to `pictures(8)`, that rejects about a fifth."""
    torch.manual_seed(seed)
    options = {"backbone": "test_resnet", "weights": "random", "max_patches": 64, "bank_size": 4}
    model = models.spec("patchcore").build(models.parameters("patchcore")(**options)).eval()
    images = torch.from_numpy(pictures(8))
    with torch.no_grad():
        model.bank = model.extract(images).permute(0, 2, 3, 1).flatten(0, 2)[:4].clone()
        model.standardise([{"image": images}], torch.device("cpu"))
        scores = model(torch.from_numpy(pictures(71, seed=1)))["pred_score"].sort().values
    statistics = [statistics_of([picture], Frame()) for picture in pictures(71, seed=2)]
    content = {
        "model": snapshot("patchcore", model),
        "threshold": scores[57].item(),
        "calibration_scores": scores.tolist(),
        "preprocessing": {"bit_depth": 16, "image_size": SIZE},
        "fit_statistics": dict(
            zip(Statistics._fields, map(list, zip(*statistics, strict=True)), strict=True)
        ),
        "precision": "float32",
        "parameters": {},
        "provenance": {"category": "part"},
    } | changes
    (tile,) = pictures(1, seed=1)
    with torch.no_grad():
        score = verdict_model(content)(torch.from_numpy(tile[None]))["score"].item()
    return {"example": encoded_example(tile, 0, score), **content}


def write_detector(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Write one to a file."""
    save_detector(path, **small_detector(seed, **changes))
    return path


def write_export(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write one as ONNX, without PyTorch and quick to start."""
    source = write_detector(folder.with_suffix(".pt"), seed, **changes)
    export_detector(source, ["onnx"], folder, pictures(1))
    return folder


def detector_around(
    runtime: Callable,
    preprocessing: dict[str, Any],
    threshold: float = 1.0,
    scores: Sequence[float] = (0.0,),
) -> Detector:
    """A detector with a model of any kind."""
    content = {
        "threshold": threshold,
        "calibration_scores": list(scores),
        "preprocessing": preprocessing,
        "parameters": {},
        "provenance": {},
    }
    return Detector(content, runtime)


def seen_by_the_model(preprocessing: dict[str, Any], path: Path) -> np.ndarray:
    """What a detector gives its model of an image file, (C, S, S)."""
    seen: list[np.ndarray] = []

    def runtime(images: np.ndarray) -> Outputs:
        seen.extend(images)
        return Outputs(np.zeros(1, np.float32), np.zeros(1, int), np.zeros(1, bool))

    detector_around(runtime, preprocessing).predict(path)
    (image,) = seen
    return image
