"""A detector's own file, and what all its exports compute.

The file is a dict for `torch.load(weights_only=True)`:

format             FORMAT, then `version`, which grows when older readers would misread it
model              `anomaly_detection.models.snapshot`: weights for inference alone
threshold          an image is anomalous if its score is above this
calibration_scores scores of the normal images that set the threshold
preprocessing      `bit_depth` of deep images, `image_size` in pixels, and a `Frame`'s options, with
                   `channels` and `dtype` of the images that the model takes
precision          what the model computes in
fit_statistics     `Statistics` of the fit images, a list for each
example            a test picture: `image`, the bytes of a tile that the model takes, compressed by
                   zlib, in base64; `position`, the tile's number; and `score`
parameters         the model's, by section of params.yaml
provenance         category, way of calibration, hashes of the data, versions
"""

import base64
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anomaly_detection.errors import one_line
from anomaly_detection.inference.runtimes import DetectorError, Outputs, Runtime
from anomaly_detection.models.files import restore
from anomaly_detection.trainer import choose_device, save_atomically

FORMAT, VERSION = "anomaly_detection.detector", 4


class VerdictModel(nn.Module):
    """From pixels to verdicts: a model with its threshold and calibration scores.

    Args:
        model: As in `AnomalyModel`, in eval mode.
        threshold: An image is anomalous if its score is above this.
        calibration_scores: Shape (n,).
    """

    threshold: Tensor
    calibration_scores: Tensor

    def __init__(
        self, model: nn.Module, threshold: float, calibration_scores: Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))
        scores = torch.tensor(calibration_scores, dtype=torch.float32)
        self.register_buffer("calibration_scores", scores)

    @property
    def inputs(self) -> Sequence[str]:
        """The model's."""
        return getattr(self.model, "inputs", ("image",))

    def forward(self, image: Tensor, *further: Tensor) -> dict[str, Tensor]:
        """What `Outputs` lists, of images as preprocessing says, (N, C, S, S), and `inputs`."""
        outputs = self.model(image, *further)
        score = outputs["pred_score"].float()
        found = {
            "score": score,
            "rank": (self.calibration_scores >= score[:, None]).sum(dim=1),
            "is_anomalous": score > self.threshold,
        }
        if "anomaly_map" in outputs:
            found["anomaly_map"] = outputs["anomaly_map"].float()
        return found


def save_detector(path: Path, **content: Any) -> None:
    """Write a detector; `content` is what the module docstring lists after `version`.

    Raises:
        TrainingError: The file cannot be written; any previous file is intact.
    """
    save_atomically({"format": FORMAT, "version": VERSION, **content}, path)


def read_detector(path: Path) -> dict[str, Any]:
    """The content of a file that `save_detector` wrote.

    Raises:
        DetectorError: The file is missing, damaged, not a detector, or of another version.
    """
    if not path.is_file():
        raise DetectorError(f"{path} must be a detector, but there is no such file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind can raise anything
        raise DetectorError(
            f"{path} must be a detector, but cannot be loaded ({one_line(error)}); `dvc repro` "
            "writes detectors/<category>.pt."
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DetectorError(
            f"{path} must be a detector, such as detectors/<category>.pt, but is another kind "
            "of file."
        )
    if (version := content.get("version", 0)) != VERSION:
        fix = (
            "update anomaly_detection"
            if version > VERSION
            else "its model would give other scores; run `dvc repro`, or use an export of it"
        )
        raise DetectorError(f"{path} must be of version {VERSION}, got {version}; {fix}.")
    return content


def verdict_model(content: dict[str, Any], device: str | torch.device = "cpu") -> VerdictModel:
    """The model in what `read_detector` returns."""
    model = restore(content["model"], device, getattr(torch, content["precision"]))
    verdicts = VerdictModel(model, content["threshold"], content["calibration_scores"])
    return verdicts.to(device).eval()


def encoded_example(tile: np.ndarray, position: int, score: float) -> dict[str, Any]:
    """The `example` of a detector: a tile (C, S, S), its number in the grid, and its score."""
    pixels = base64.b64encode(zlib.compress(tile.tobytes(), 9)).decode()
    return {"image": pixels, "position": position, "score": score}


def load_detector(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any], Runtime]:
    """A detector's content, and what runs it.

    Raises:
        DetectorError: As in `read_detector`, or its model is incomplete or not known here.
    """
    content = read_detector(path)
    device = choose_device(device)  # a wrong device is not the file's fault
    try:
        return content, run_pytorch(verdict_model(content, device), device)
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError) as error:
        raise DetectorError(
            f"{path} must be a whole detector of a model that is known here, but is not "
            f"({type(error).__name__}: {one_line(error)}); make it again with `dvc repro`."
        ) from None


def run_pytorch(model: VerdictModel, device: torch.device) -> Runtime:
    """A model in PyTorch."""

    @torch.inference_mode()
    def run(*inputs: np.ndarray) -> Outputs:
        found = model(*(torch.tensor(values).to(device) for values in inputs))
        return Outputs(**{name: value.cpu().numpy() for name, value in found.items()})

    return run
