"""The Open Inference Protocol v2, as KServe and Triton speak it, with its binary tensors.

`image` is either whole picture files, judged and recorded as anywhere else, or pixels exactly as
the model takes them, which are neither recorded nor watched for drift.
"""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from anomaly_detection.inference.detector import Detector
from anomaly_detection.line.serving.detectors import Served
from anomaly_detection.line.serving.service import Service, model_of

LENGTH = "Inference-Header-Content-Length"  # of the JSON, before binary tensors
MOST_IMAGES = 64  # in a request
MOST_NUMBERS = 4_000_000  # in an answer's JSON
BYTES = "BYTES"
DTYPES: dict[str, type[np.integer]] = {"UINT8": np.uint8, "UINT16": np.uint16, "INT64": np.int64}
OUTPUTS = {"score": "FP32", "rank": "INT64", "is_anomalous": "BOOL", "p_value": "FP64"}
MAP = "anomaly_map"  # FP32, only on request


class Input(BaseModel):
    """A tensor that comes in."""

    name: str
    shape: list[int]
    datatype: str
    data: Any = None
    parameters: dict[str, Any] = {}


class Requested(BaseModel):
    """A tensor that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class Inference(BaseModel):
    """What is asked."""

    id: str | None = None
    inputs: list[Input]
    outputs: list[Requested] | None = None
    parameters: dict[str, Any] = {}


SCHEMA = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype", "data"],
                "properties": {
                    "name": {"enum": ["image", "position"]},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "datatype": {"enum": [BYTES, *DTYPES]},
                    "data": {
                        "type": "array",
                        "description": "numbers, or picture files in base64",
                        "items": {},
                    },
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"enum": [*OUTPUTS, MAP]}},
            },
        },
    },
}


def metadata(one: Served) -> dict[str, Any]:
    """What a client can know of a model."""
    detector, station, _ = one.current
    datatype, shape = pixels_of(detector)
    pixels = {"pixels_datatype": datatype, "pixels_shape": shape}
    inputs = [{"name": "image", "datatype": BYTES, "shape": [-1], "parameters": pixels}]
    outputs = [{"name": name, "datatype": x, "shape": [-1]} for name, x in OUTPUTS.items()]
    return {
        "name": one.category,
        "versions": [station.fingerprint],
        "platform": f"anomaly_detection_{model_of(one)}",
        "inputs": inputs,
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
        length: Of its JSON, where binary tensors follow.

    Returns:
        The answer's body, and the length of its JSON if binary tensors follow.

    Raises:
        HTTPException: The request does not follow the protocol, or cannot be judged.
        DataError: As in `Detector.predict`.
    """
    request, tensors = _parse(body, length)
    names = list(OUTPUTS) if request.outputs is None else [x.name for x in request.outputs]
    for name in names:
        _require(name in (*OUTPUTS, MAP), f"outputs must be of {', '.join(OUTPUTS)}, {MAP}.")
    image = _one("image", tensors)
    with_maps = MAP in names
    if image.dtype == object:
        _require(list(tensors) == ["image"], "picture files must come without other inputs.")
        found = [_of_file(service, one, content, with_maps) for content in image.ravel()]
    else:
        found = _of_pixels(service, one, tensors, with_maps)
    values: dict[str, np.ndarray] = {
        "score": np.array([x["score"] for x in found], np.float32),
        "rank": np.array([x["rank"] for x in found], np.int64),
        "is_anomalous": np.array([x["is_anomalous"] for x in found], bool),
        "p_value": np.array([x["p_value"] for x in found], np.float64),
    }
    if with_maps:
        maps = [x[MAP] for x in found]
        _require(
            all(x is not None and x.shape == maps[0].shape for x in maps),
            f"{MAP} must be of one size for all images; this model gives none, or others.",
        )
        values[MAP] = np.stack(maps).reshape(len(maps), 1, *maps[0].shape[-2:])
    return _written(request, one, {name: values[name] for name in names})


def _of_file(service: Service, one: Served, content: bytes, with_map: bool) -> dict[str, Any]:
    _, found = service.judge(one, content, "")
    num_scores = len(one.current.detector.calibration_scores)
    return {
        "score": found.score,
        "rank": round(found.p_value * (num_scores + 1)) - 1,
        "is_anomalous": found.verdict == "anomalous",
        "p_value": found.p_value,
        MAP: found.anomaly_map if with_map else None,
    }


def _of_pixels(
    service: Service, one: Served, tensors: dict[str, np.ndarray], with_maps: bool
) -> list[dict[str, Any]]:
    """One image after the other, so that memory does not grow with their number."""
    detector = one.current.detector
    image = tensors["image"]
    datatype, shape = pixels_of(detector)
    _require(
        image.dtype.name.upper() == datatype
        and image.ndim == 4
        and all(own in (-1, x) for own, x in zip(shape, image.shape, strict=True))
        and image.size > 0,
        f"image must be BYTES of shape [N], or {datatype} of shape {shape}, got "
        f"{image.dtype.name.upper()} of {list(image.shape)}.",
    )
    further = ["position"] if detector.frame.size else []
    _require(
        set(tensors) == {"image", *further},
        f"inputs must be {' and '.join(['image', *further])}, got {', '.join(tensors)}.",
    )
    columns = [image, *(_positions(tensors[name], len(image)) for name in further)]
    found = []
    for i in range(len(image)):
        outputs = detector.runtime(*(column[i : i + 1] for column in columns))
        rank, is_anomalous = int(outputs.rank[0]), bool(outputs.is_anomalous[0])
        score = float(outputs.score[0])
        verdict = "anomalous" if is_anomalous else "normal"
        service.metrics.judged(one.category, verdict, score)
        own_map = outputs.anomaly_map[0] if with_maps and outputs.anomaly_map is not None else None
        found.append(
            {
                "score": score,
                "rank": rank,
                "is_anomalous": is_anomalous,
                "p_value": (1 + rank) / (1 + len(detector.calibration_scores)),
                MAP: own_map,
            }
        )
    return found


def _positions(position: np.ndarray, count: int) -> np.ndarray:
    is_right = position.dtype == np.int64 and position.shape == (count,)
    _require(is_right, f"position must be INT64 of shape [{count}].")
    return position


def _parse(body: bytes, length: str | None) -> tuple[Inference, dict[str, np.ndarray]]:
    """A request, and its inputs by name; those of files have dtype object."""
    end = len(body)
    if length is not None:
        is_length = length.isdecimal() and len(length) < 12 and int(length) <= end
        _require(is_length, f"{LENGTH} must be at most the body's, got {length[:20]!r}.")
        end = int(length)
    try:
        request = Inference.model_validate_json(body[:end])
    except ValidationError as error:
        (first, *_others) = error.errors(include_url=False, include_input=False)
        where = ".".join(map(str, first["loc"])) or "the body"
        raise HTTPException(400, f"{where} must follow the protocol: {first['msg']}.") from None
    rest, tensors = memoryview(body)[end:], {}
    for own in request.inputs:
        size = own.parameters.get("binary_data_size")
        if size is None:
            tensors[own.name] = _from_json(own)
        else:
            is_size = isinstance(size, int) and 0 <= size <= len(rest)
            _require(is_size, f"binary_data_size of {own.name} must be that of what follows.")
            tensors[own.name], rest = _from_binary(own, rest[:size]), rest[size:]
    _require(not rest, f"the body must end with its last tensor, got {len(rest)} more bytes.")
    return request, tensors


def _from_json(own: Input) -> np.ndarray:
    try:
        if own.datatype == BYTES:
            files = [base64.b64decode(x, validate=True) for x in own.data]
            return _shaped(own, _objects(files))
        numbers = np.array(own.data)
        limits = np.iinfo(_dtype(own))
        is_whole = numbers.size and numbers.dtype.kind in "iu"
        _require(
            is_whole and limits.min <= numbers.min() and numbers.max() <= limits.max,
            f"data of {own.name} must be whole numbers that {own.datatype} has.",
        )
        return _shaped(own, numbers.astype(_dtype(own)))
    except (TypeError, ValueError):
        raise HTTPException(
            400, f"data of {own.name} must be numbers in rows, or files in base64."
        ) from None


def _from_binary(own: Input, data: memoryview) -> np.ndarray:
    if own.datatype == BYTES:
        return _shaped(own, _objects(list(_elements(data))))
    dtype = np.dtype(_dtype(own)).newbyteorder("<")
    _require(len(data) % dtype.itemsize == 0, f"{own.name} must have whole numbers of bytes.")
    return _shaped(own, np.frombuffer(data, dtype).astype(_dtype(own), copy=False))


def _elements(data: memoryview) -> Iterator[bytes]:
    """Of BYTES: each with its length before it, in four bytes."""
    while data:
        length = int.from_bytes(data[:4], "little")
        _require(4 + length <= len(data), "an element must be as long as it says.")
        yield bytes(data[4 : 4 + length])
        data = data[4 + length :]


def _objects(files: list[bytes]) -> np.ndarray:
    array = np.empty(len(files), object)
    array[:] = files
    return array


def _dtype(own: Input) -> type[np.integer]:
    _require(own.datatype in DTYPES, f"{own.name} must be {BYTES} or {', '.join(DTYPES)}.")
    return DTYPES[own.datatype]


def _shaped(own: Input, values: np.ndarray) -> np.ndarray:
    count = own.shape[0] if own.shape else 0
    _require(0 < count <= MOST_IMAGES, f"{own.name} must be of 1 to {MOST_IMAGES} images.")
    try:
        return values.reshape([max(0, x) for x in own.shape])
    except (ValueError, OverflowError):
        raise HTTPException(
            400, f"{own.name} must have the values of its shape, got {values.size}."
        ) from None


def _one(name: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
    _require(name in tensors, f"inputs must have {name}.")
    return tensors[name]


def _written(
    request: Inference, one: Served, values: dict[str, np.ndarray]
) -> tuple[bytes, int | None]:
    all_binary = request.parameters.get("binary_data_output", False)
    requested = {x.name: x.parameters for x in request.outputs or ()}
    outputs, tail = [], []
    for name, array in values.items():
        own: dict[str, Any] = {
            "name": name,
            "datatype": OUTPUTS.get(name, "FP32"),
            "shape": list(array.shape),
        }
        if requested.get(name, {}).get("binary_data", all_binary):
            tail.append(array.tobytes())
            own["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            _require(
                array.size <= MOST_NUMBERS,
                f"{name} must have at most {MOST_NUMBERS:,} numbers in JSON, got {array.size:,}; "
                "ask for binary_data.",
            )
            own["data"] = array.ravel().tolist()
        outputs.append(own)
    answer = {
        "model_name": one.category,
        "model_version": one.current.station.fingerprint,
        **({"id": request.id} if request.id is not None else {}),
        "outputs": outputs,
    }
    head = json.dumps(answer, allow_nan=False).encode()
    return b"".join([head, *tail]), len(head) if tail else None


def _require(condition: object, text: str) -> None:
    if not condition:
        raise HTTPException(400, text)
