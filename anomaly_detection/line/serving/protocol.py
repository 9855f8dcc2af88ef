"""The Open Inference Protocol v2, as KServe and Triton speak it.

`image` is either whole picture files, judged and recorded as anywhere else, or pixels exactly as
the model takes them, which are neither recorded nor watched for drift.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from anomaly_detection.inference.detector import Detector
from anomaly_detection.inference.runtimes import Outputs, split
from anomaly_detection.line.serving.detectors import Current, Served
from anomaly_detection.line.serving.service import Service
from anomaly_detection.line.serving.tensors import BYTES, MAP, OUTPUTS, parse, require, written


def metadata(one: Served) -> dict[str, Any]:
    """What a client can know of a model."""
    datatype, shape = pixels_of(one.current.detector)
    pixels = {"pixels_datatype": datatype, "pixels_shape": shape}
    outputs = [{"name": name, "datatype": x, "shape": [-1]} for name, x in OUTPUTS.items()]
    return {
        "name": one.category,
        "versions": [one.current.station.fingerprint],
        "platform": f"anomaly_detection_{one.current.model}",
        "inputs": [{"name": "image", "datatype": BYTES, "shape": [-1], "parameters": pixels}],
        "outputs": [*outputs, {"name": MAP, "datatype": "FP32", "shape": [-1, 1, -1, -1]}],
    }


def pixels_of(detector: Detector) -> tuple[str, list[int]]:
    """Datatype and shape of the pixels that a model takes, -1 for any size."""
    sides = [-1] * 2 if detector.resizes_itself else [detector.image_size] * 2
    return detector.frame.format.dtype.upper(), [-1, detector.frame.num_channels, *sides]


def infer(
    service: Service, one: Served, body: bytes, length: str | None
) -> tuple[bytes, int | None]:
    """Answer a request.

    Args:
        service: Judges.
        one: The model.
        body: Of the request.
        length: As in `parse`.

    Returns:
        As `written`.

    Raises:
        HTTPException: The request does not follow the protocol, or cannot be judged.
        DataError: As in `Detector.predict`.
    """
    current = one.current
    request, tensors = parse(body, length)
    names = list(OUTPUTS) if request.outputs is None else [x.name for x in request.outputs]
    for name in names:
        require(name in (*OUTPUTS, MAP), f"outputs must be of {', '.join(OUTPUTS)}, {MAP}.")
    require("image" in tensors, "inputs must have image.")
    is_files = tensors["image"].dtype == object
    judged = _of_files(service, current, tensors) if is_files else _of_pixels(current, tensors)
    found = [x if MAP in names else x._replace(anomaly_map=None) for x in judged]
    if not is_files:
        for x in found:
            verdict = "anomalous" if x.is_anomalous else "normal"
            service.metrics.judged(one.category, verdict, float(x.score))
    rank = np.array([x.rank for x in found], np.int64)
    values: dict[str, np.ndarray] = {
        "score": np.array([x.score for x in found], np.float32),
        "rank": rank,
        "is_anomalous": np.array([x.is_anomalous for x in found], bool),
        "p_value": (1 + rank) / (1 + len(current.detector.calibration_scores)),
    }
    if MAP in names:
        values[MAP] = _together([x.anomaly_map for x in found])
    answer = {"model_name": one.category, "model_version": current.station.fingerprint}
    return written(request, answer, {name: values[name] for name in names})


def _of_files(
    service: Service, current: Current, tensors: dict[str, np.ndarray]
) -> Iterator[Outputs]:
    require(list(tensors) == ["image"], "picture files must come without other inputs.")
    num_scores = len(current.detector.calibration_scores)
    for content in tensors["image"].ravel():
        _, found = service.judge(current, content, "")
        rank = round(found.p_value * (num_scores + 1)) - 1
        is_anomalous = found.verdict == "anomalous"
        yield Outputs(found.score, rank, is_anomalous, found.anomaly_map)  # type: ignore[arg-type]


def _of_pixels(current: Current, tensors: dict[str, np.ndarray]) -> Iterator[Outputs]:
    """One image after the other, so that memory does not grow with their number."""
    detector, image = current.detector, tensors["image"]
    datatype, shape = pixels_of(detector)
    got = image.dtype.name.upper()
    require(
        got == datatype
        and image.ndim == 4
        and all(own in (-1, x) for own, x in zip(shape, image.shape, strict=True))
        and image.size > 0,
        f"image must be BYTES of shape [N], or {datatype} of shape {shape}, got {got} of "
        f"{list(image.shape)}.",
    )
    columns = {"image": image}
    if detector.frame.size:
        columns["position"] = tensors.get("position", np.empty(0))
        is_right = columns["position"].dtype == np.int64
        is_right &= columns["position"].shape == image.shape[:1]
        require(is_right, f"position must be INT64 of shape [{len(image)}].")
    require(
        set(tensors) == set(columns), f"inputs must be {', '.join(columns)}, got {list(tensors)}."
    )
    for i in range(len(image)):
        yield from split(detector.runtime(*(x[i : i + 1] for x in columns.values())))


def _together(maps: list[np.ndarray | None]) -> np.ndarray:
    """Maps as (N, 1, h, w)."""
    found = [x for x in maps if x is not None]
    is_same = len(found) == len(maps) and len({x.shape for x in found}) == 1
    require(is_same, f"{MAP} must be of one size for all images; this model has none, or others.")
    return np.stack(found).reshape(len(found), 1, *found[0].shape[-2:])
