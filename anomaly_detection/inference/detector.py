"""A detector: one file with everything that a verdict depends on.

The file is a dict for `torch.load(weights_only=True)`:

format             FORMAT, then `version`, which grows when older readers would misread it
model              `anomaly_detection.models.snapshot`: weights for inference alone
threshold          an image is anomalous if its score is above this
calibration_scores scores of the normal images that set the threshold
preprocessing      `bit_depth` of deep images, `image_size` in pixels
precision          what the model computes in
parameters         the model's, by section of params.yaml
provenance         category, way of calibration, hashes of the data, git revision, versions
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from anomaly_detection.data.decode import decode_image, pixels_of, read_file, resize_image
from anomaly_detection.errors import UserError, one_line
from anomaly_detection.evaluation.thresholds import p_value
from anomaly_detection.models.files import restore
from anomaly_detection.trainer import choose_device, save_atomically

FORMAT, VERSION = "anomaly_detection.detector", 1


class DetectorError(UserError):
    """The file is not a detector, or not one that this version can use."""


class Prediction(NamedTuple):
    """A detector's verdict on one image.

    Attributes:
        score: Higher for a more anomalous image.
        threshold: The verdict is `anomalous` if the score is above this.
        verdict: `normal` or `anomalous`.
        p_value: The expected share of normal images that score at least as high, from the
            calibration images, in (0, 1].
        anomaly_map: float32 (S, S), S being the detector's image size; None if the model has none.
    """

    score: float
    threshold: float
    verdict: Literal["normal", "anomalous"]
    p_value: float
    anomaly_map: np.ndarray | None


def save_detector(path: Path, **content: Any) -> None:
    """Write a detector; `content` is what the module docstring lists after `version`.

    Raises:
        TrainingError: The file cannot be written; any previous file is intact.
    """
    save_atomically({"format": FORMAT, "version": VERSION, **content}, path)


class Detector:
    """A fitted model with its threshold and preprocessing.

    Args:
        content: What `save_detector` wrote.
        device: As in `choose_device`.
    """

    def __init__(self, content: dict[str, Any], device: str | torch.device = "cpu") -> None:
        self.device = choose_device(device)
        self.model = restore(content["model"], self.device, getattr(torch, content["precision"]))
        self.threshold: float = content["threshold"]
        self.calibration_scores = np.array(content["calibration_scores"], dtype=np.float32)
        self.image_size: int = content["preprocessing"]["image_size"]
        self.bit_depth: int = content["preprocessing"]["bit_depth"]
        self.parameters: dict[str, Any] = content["parameters"]
        self.provenance: dict[str, Any] = content["provenance"]

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Detector":
        """The detector in a file that `save_detector` wrote.

        Raises:
            DetectorError: The file is missing, damaged, not a detector, or from a newer version.
        """
        if not Path(path).is_file():
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
        if content.get("version", 0) > VERSION:
            raise DetectorError(
                f"{path} must be of version {VERSION} or older, got {content['version']}; update "
                "anomaly_detection."
            )
        device = choose_device(device)  # a wrong device is not the file's fault
        try:
            return cls(content, device)
        except (AttributeError, ImportError, KeyError, RuntimeError, TypeError) as error:
            raise DetectorError(
                f"{path} must be a whole detector of a model that is known here, but is not "
                f"({type(error).__name__}: {one_line(error)}); make it again with `dvc repro`."
            ) from None

    def predict(self, image: str | Path | Image.Image | np.ndarray) -> Prediction:
        """Judge one image of any size.

        Args:
            image: A file's path, a Pillow image, or uint8 pixels (H, W) or (H, W, 3), RGB.

        Raises:
            DataError: The file cannot be read, or not decoded, as in `decode_image`.
            ValueError: The pixels have the wrong dtype or shape.
        """
        pixels = resize_image(self._pixels(image), self.image_size)
        with torch.inference_mode():
            outputs = self.model(torch.tensor(pixels)[None].to(self.device))
        score = outputs["pred_score"][0].float().cpu().numpy()
        maps = outputs.get("anomaly_map")
        return Prediction(
            score=float(score),
            threshold=self.threshold,
            verdict="anomalous" if score > np.float32(self.threshold) else "normal",
            p_value=p_value(score, self.calibration_scores),
            anomaly_map=None if maps is None else maps[0, 0].float().cpu().numpy(),
        )

    def _pixels(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        if isinstance(image, str | Path):
            return decode_image(read_file(Path(image)), image, self.bit_depth)
        if isinstance(image, Image.Image):
            return pixels_of(ImageOps.exif_transpose(image), "image", self.bit_depth)
        if not isinstance(image, np.ndarray):
            raise ValueError(
                f"image must be a path, a picture or pixels, got {type(image).__name__}."
            )
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ValueError(
                "image must be uint8 of shape (H, W) or (H, W, 3), got "
                f"{image.dtype} of {image.shape}."
            )
        return image
