"""A detector: verdicts on images, the same ones whatever computes them."""

import base64
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageOps

from anomaly_detection.data.decode import (
    decode_image,
    decode_mask,
    mask_pixels,
    pixels_of,
    read_file,
    resize_image,
)
from anomaly_detection.data.frame import Frame
from anomaly_detection.data.threads import in_threads
from anomaly_detection.data.tiles import Blend, Grid, chunks
from anomaly_detection.errors import DataError
from anomaly_detection.inference.runtimes import (
    DetectorError,
    Outputs,
    Runtime,
    read_export,
    split,
)
from anomaly_detection.inference.statistics import Statistics, statistics_of

Picture = str | Path | bytes | Image.Image | np.ndarray
TOLERANCE = 0.01  # of the test picture's score, in standard deviations of the calibration scores


class Prediction(NamedTuple):
    """A detector's verdict on one image.

    Attributes:
        score: Higher for a more anomalous image.
        threshold: The verdict is `anomalous` if the score is above this.
        verdict: `normal` or `anomalous`.
        p_value: The expected share of normal images that score at least as high, from the
            calibration images, in (0, 1].
        anomaly_map: float32 (S, S), S being the detector's image size; of a tiled image, float32
            (h, w), the image at the scale of its tiles; None if the model has none.
        statistics: Of what was judged.
    """

    score: float
    threshold: float
    verdict: Literal["normal", "anomalous"]
    p_value: float
    anomaly_map: np.ndarray | None
    statistics: Statistics


def p_value(score: float, calibration_scores: ArrayLike) -> float:
    """How likely a normal image is to score at least as high: the conformal p-value.

    Of n + 1 exchangeable scores, (1 + number of calibration scores >= score) / (n + 1); at most a
    share p of normal images has a p-value of p or less (Vovk et al., 2005).
    """
    scores = np.asarray(calibration_scores)
    return _p_value(int((scores >= score).sum()), len(scores))


def _p_value(rank: int, num_scores: int) -> float:
    return (1 + rank) / (num_scores + 1)


class Seen(NamedTuple):
    """What a model sees of a picture: tiles (C, S, S), by their numbers in a grid."""

    grid: Grid
    tiles: dict[int, np.ndarray]
    statistics: Statistics


class Detector:
    """A fitted model with its threshold and preprocessing.

    Args:
        content: What a detector's file or an export's description says.
        runtime: Computes the outputs.
    """

    def __init__(self, content: dict[str, Any], runtime: Runtime) -> None:
        self.runtime = runtime
        self.threshold: float = content["threshold"]
        self.calibration_scores = np.array(content["calibration_scores"], dtype=np.float32)
        preprocessing = content["preprocessing"]
        self.image_size: int = preprocessing["image_size"]
        self.bit_depth: int = preprocessing["bit_depth"]
        self.frame = Frame.from_options(preprocessing)
        self.resizes_itself: bool = content.get("resizes_itself", False)
        self.is_exact: bool = content.get("is_exact", True)
        self.fit_statistics: dict[str, list[float]] = content.get("fit_statistics", {})
        self.example: dict[str, Any] | None = content.get("example")
        self.parameters: dict[str, Any] = content["parameters"]
        self.provenance: dict[str, Any] = content["provenance"]

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", num_streams: int = 1) -> "Detector":
        """The detector in a file of the pipeline.

        Args:
            path: `detectors/<category>.pt`, which needs PyTorch; or `exports/<category>`, or a
                model in it (`.onnx`, `.xml`), which needs onnxruntime or OpenVINO.
            device: `cpu`, `cuda`, `cuda:<number>`, `mps` or `auto`; exports run on the CPU.
            num_streams: How many threads will ask for verdicts at once: an export divides the
                cores among them.

        Raises:
            DetectorError: The file is missing, damaged, not a detector, or from a newer version; or
                what runs it is not installed.
        """
        path = Path(path)
        if path.is_dir() or path.suffix in (".onnx", ".xml", ".json"):
            return cls(*read_export(path.parent if path.suffix == ".json" else path, num_streams))
        try:
            from anomaly_detection.inference.pytorch import load_detector
        except ImportError as error:
            raise DetectorError(
                f"{path} needs {error.name}: pip install 'anomaly_detection[train]', or take an "
                "exported detector, such as exports/<category>/model.onnx."
            ) from None
        return cls(*load_detector(path, device))

    def predict(self, image: Picture, mask: Picture | None = None) -> Prediction:
        """Judge one image of any size.

        Args:
            image: A file's path or bytes, a Pillow image, or pixels (H, W) or (H, W, 3), RGB, or
                (H, W, 4) for a detector of four channels; uint8, or uint16 for one of 16 bits,
                whose full scale is 65535 whatever its bit depth.
            mask: Likewise, not 0 where the image is judged, for a detector that was fitted with a
                mask for each image.

        Raises:
            DataError: The file cannot be read, or not decoded, as in `decode_image`; or it has
                another number of channels than the detector's.
            ValueError: The pixels have the wrong dtype or shape.
        """
        return next(self._judge([self._read(image, mask)]))

    def check(self) -> None:
        """Judge the test picture that the detector comes with.

        Raises:
            DetectorError: Its score is not the recorded one, or it comes with none.
        """
        if self.example is None:
            raise DetectorError(
                "a detector must come with a test picture, but this one is of an older version; "
                "make it again with `dvc repro`."
            )
        dtype, channels = self.frame.format.dtype, self.frame.num_channels
        pixels = np.frombuffer(zlib.decompress(base64.b64decode(self.example["image"])), dtype)
        tile = pixels.reshape(channels, self.image_size, self.image_size)
        (found,) = self._outputs([(self.example["position"], tile)])
        recorded = self.example["score"]
        tolerance = TOLERANCE if self.is_exact else 1.0
        if not abs(found.score - recorded) <= tolerance * self.calibration_scores.std():
            raise DetectorError(
                f"a detector must give its test picture the recorded score {recorded:.6g}, but "
                f"here it gives {found.score:.6g}; copy it again, or use another format."
            )

    def predict_many(
        self,
        images: Iterable[Picture],
        *,
        masks: Iterable[Picture | DataError] | None = None,
        batch_size: int = 1,
        num_threads: int | None = None,
    ) -> Iterator[Prediction | DataError]:
        """Judge any number of images, in constant memory.

        Args:
            images: As in `predict`; a few more than have been judged are taken at a time.
            masks: As in `predict`, one for each image, or why it has none.
            batch_size: Images, or tiles of one, that are judged together, which is faster on a GPU.
            num_threads: Threads that decode; by default one for each core.

        Yields:
            In the order of the images, a prediction, or the error of a file that cannot be read.

        Raises:
            ValueError: As in `predict`.
        """
        pairs = zip(images, repeat(None)) if masks is None else zip(images, masks, strict=True)
        together = 1 if self.resizes_itself or self.frame.tile_size else batch_size
        read = in_threads(self._try, pairs, num_threads, ahead=together)
        while batch := list(islice(read, together)):
            seen = [x for x in batch if not isinstance(x, DataError)]
            judged = self._judge(seen, 1 if self.resizes_itself else batch_size)
            yield from (x if isinstance(x, DataError) else next(judged) for x in batch)

    def _judge(self, pictures: Sequence[Seen], batch_size: int = 1) -> Iterator[Prediction]:
        """Predictions of what `_read` returns, from `batch_size` tiles at a time."""
        tiles = (tile for seen in pictures for tile in seen.tiles.items())
        found = (one for part in chunks(tiles, batch_size) for one in self._outputs(part))
        for seen in pictures:
            yield self._prediction(seen, zip(seen.tiles, found, strict=False))

    def _outputs(self, tiles: Sequence[tuple[int, np.ndarray]]) -> Iterator[Outputs]:
        """Of each tile, with its number."""
        numbers, pixels = zip(*tiles, strict=True)
        inputs = [np.stack(pixels)]
        if self.frame.size:
            inputs.append(np.array(numbers, dtype=np.int64))
        return split(self.runtime(*inputs))

    def _prediction(self, seen: Seen, found: Iterable[tuple[int, Outputs]]) -> Prediction:
        """The verdict on an image: that on its highest tile, with all their maps."""
        highest, blend = None, None
        for number, of_tile in found:
            if highest is None or of_tile.score > highest.score:
                highest = of_tile
            if of_tile.anomaly_map is not None:
                blend = blend or Blend(seen.grid)
                blend.add(number, of_tile.anomaly_map[0])
        assert highest is not None, "every picture has a tile"
        return Prediction(
            score=float(highest.score),
            threshold=self.threshold,
            verdict="anomalous" if highest.is_anomalous else "normal",
            p_value=_p_value(int(highest.rank), len(self.calibration_scores)),
            anomaly_map=blend.whole if blend else None,
            statistics=seen.statistics,
        )

    def _try(self, pair: tuple[Picture, Picture | DataError | None]) -> Seen | DataError:
        image, mask = pair
        try:
            return mask if isinstance(mask, DataError) else self._read(image, mask)
        except DataError as error:
            return error

    def _read(self, image: Picture, mask: Picture | None = None) -> Seen:
        """What the runtime takes of a picture."""
        frame, pixels, name = self._frame(image, mask), self._pixels(image), _name(image)
        size = None if self.resizes_itself else self.image_size
        tiles = dict(frame.tiles(pixels, size, name))
        height, width = frame.cut(pixels).shape[:2]
        grid = frame.grid(height, width, self.image_size)
        return Seen(grid, tiles, statistics_of(self._as_fitted(tiles.values()), frame))

    def _as_fitted(self, tiles: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        """Tiles as large as those that the model was fitted to."""
        if not self.resizes_itself:
            return tiles
        return (resize_image(np.moveaxis(tile, 0, -1), self.image_size) for tile in tiles)

    def _frame(self, image: Picture, mask: Picture | None) -> Frame:
        if mask is None:
            return self.frame.with_mask(None, _name(image))
        if isinstance(mask, str | Path | bytes):
            judged = decode_mask(_content(mask), _name(mask))
        else:
            own = Image.fromarray(mask) if isinstance(mask, np.ndarray) else mask
            judged = mask_pixels(ImageOps.exif_transpose(own))
        return self.frame.with_mask(judged, _name(image))

    def seen(self, image: Picture) -> np.ndarray:
        """The part of an image that the model sees, (H, W) or (H, W, C), not resized.

        Raises:
            DataError, ValueError: As in `predict`.
        """
        return self.frame.cut(self._pixels(image), _name(image))

    def _pixels(self, image: Picture) -> np.ndarray:
        """Pixels (H, W) or (H, W, C)."""
        channels, dtype = self.frame.format
        if isinstance(image, str | Path | bytes):
            return decode_image(_content(image), _name(image), self.bit_depth, dtype)
        if isinstance(image, Image.Image):
            return pixels_of(ImageOps.exif_transpose(image), "image", self.bit_depth, dtype)
        if not isinstance(image, np.ndarray):
            raise ValueError(
                f"image must be a path, a picture or pixels, got {type(image).__name__}."
            )
        shapes = {3: ((), (3,)), 4: ((4,),)}[channels]
        dtypes = sorted({"uint8", dtype}, reverse=True)
        if image.dtype not in dtypes or image.shape[2:] not in shapes or not image.size:
            may_be = "(H, W) or (H, W, 3)" if channels == 3 else "(H, W, 4)"
            raise ValueError(
                f"image must be {' or '.join(dtypes)} of shape {may_be}, got "
                f"{image.dtype} of {image.shape}; give pixels as they come from a file, neither "
                "scaled nor normalised."
            )
        return image


def _content(image: str | Path | bytes) -> bytes:
    return image if isinstance(image, bytes) else read_file(Path(image))


def _name(image: Picture) -> str | Path:
    return image if isinstance(image, str | Path) else "image"
