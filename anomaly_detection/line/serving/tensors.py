"""Tensors of the Open Inference Protocol v2: in JSON, or as bytes after it."""

import base64
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

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


def parse(body: bytes, length: str | None) -> tuple[Inference, dict[str, np.ndarray]]:
    """A request, and its inputs by name; those of files have dtype object.

    Args:
        body: JSON, and binary tensors after it.
        length: Of the JSON, in digits; None for all of the body.

    Raises:
        HTTPException: It does not follow the protocol.
    """
    end = len(body)
    if length is not None:
        is_length = length.isdecimal() and len(length) < 12 and int(length) <= end
        require(is_length, f"{LENGTH} must be at most the body's, got {length[:20]!r}.")
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
            require(is_size, f"binary_data_size of {own.name} must be that of what follows.")
            tensors[own.name], rest = _from_binary(own, rest[:size]), rest[size:]
    require(not rest, f"the body must end with its last tensor, got {len(rest)} more bytes.")
    return request, tensors


def _from_json(own: Input) -> np.ndarray:
    try:
        if own.datatype == BYTES:
            files = (base64.b64decode(x, validate=True) for x in own.data)
            return _shaped(own, _objects(files))
        numbers = np.array(own.data)
        limits = np.iinfo(_dtype(own))
        is_whole = numbers.size and numbers.dtype.kind in "iu"
        require(
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
        return _shaped(own, _objects(_elements(data)))
    dtype = np.dtype(_dtype(own)).newbyteorder("<")
    require(len(data) % dtype.itemsize == 0, f"{own.name} must have whole numbers of bytes.")
    return _shaped(own, np.frombuffer(data, dtype).astype(_dtype(own), copy=False))


def _elements(data: memoryview) -> Iterator[bytes]:
    """Of BYTES: each with its length before it, in four bytes."""
    while data:
        length = int.from_bytes(data[:4], "little")
        require(4 + length <= len(data), "an element must be as long as it says.")
        yield bytes(data[4 : 4 + length])
        data = data[4 + length :]


def _objects(elements: Iterator[bytes]) -> np.ndarray:
    files = list(islice(elements, MOST_IMAGES + 1))
    require(len(files) <= MOST_IMAGES, f"image must be of 1 to {MOST_IMAGES} images.")
    array = np.empty(len(files), object)
    array[:] = files
    return array


def _dtype(own: Input) -> type[np.integer]:
    require(own.datatype in DTYPES, f"{own.name} must be {BYTES} or {', '.join(DTYPES)}.")
    return DTYPES[own.datatype]


def _shaped(own: Input, values: np.ndarray) -> np.ndarray:
    count = own.shape[0] if own.shape else 0
    require(0 < count <= MOST_IMAGES, f"{own.name} must be of 1 to {MOST_IMAGES} images.")
    try:
        return values.reshape([max(0, x) for x in own.shape])
    except (ValueError, OverflowError):
        raise HTTPException(
            400, f"{own.name} must have the values of its shape, got {values.size}."
        ) from None


def written(
    request: Inference, answer: Mapping[str, Any], values: Mapping[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """An answer with these outputs, as the request wants them.

    Returns:
        The body, and the length of its JSON if binary tensors follow.

    Raises:
        HTTPException: An output is too large for JSON.
    """
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
            require(
                array.size <= MOST_NUMBERS,
                f"{name} must have at most {MOST_NUMBERS:,} numbers in JSON, got {array.size:,}; "
                "ask for binary_data.",
            )
            own["data"] = array.ravel().tolist()
        outputs.append(own)
    own_id = {} if request.id is None else {"id": request.id}
    head = json.dumps({**answer, **own_id, "outputs": outputs}, allow_nan=False).encode()
    return b"".join([head, *tail]), len(head) if tail else None


def require(condition: object, text: str) -> None:
    """Refuse a request unless it meets a condition."""
    if not condition:
        raise HTTPException(400, text)
