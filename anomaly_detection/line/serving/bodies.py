"""Pictures in requests."""

import sys
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from anomaly_detection.data.decode import FORMATS

PICTURE = {"type": "string", "format": "binary"}
RAW = ("application/octet-stream", "image/png", "image/jpeg", "image/bmp", "image/tiff")
MULTIPART = {
    "schema": {"type": "object", "properties": {"file": PICTURE}, "required": ["file"]},
}


class InMemory(MultiPartParser):
    """Writes no file, since the body is limited anyway."""

    spool_max_size = sys.maxsize


def picture_body() -> dict[str, Any]:
    """What `/predict` takes, for the OpenAPI document."""
    raw: dict[str, Any] = {name: {"schema": PICTURE} for name in RAW}
    return {"required": True, "content": {"multipart/form-data": MULTIPART, **raw}}


async def picture_in(request: Request) -> tuple[bytes, str]:
    """The picture that a request has, and its file's name.

    Raises:
        HTTPException: It has none, or several.
    """
    refuse_encoded(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            parser = InMemory(request.headers, request.stream(), max_files=1, max_fields=10)
            form = await parser.parse()
        except MultiPartException as error:
            raise HTTPException(400, f"the form must be whole: {error.message}") from None
        file = next((x for x in form.values() if isinstance(x, UploadFile)), None)
        if file is None:
            raise HTTPException(400, "the form must have a file.")
        return await file.read(), file.filename or ""
    if kind and kind != "application/octet-stream" and not kind.startswith("image/"):
        raise HTTPException(
            415,
            f"Content-Type must be multipart/form-data, image/... or application/octet-stream, "
            f"got {kind[:100]}; send {', '.join(FORMATS)}.",
        )
    return await request.body(), ""


def refuse_encoded(request: Request) -> None:
    """Raise if the body is compressed."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "the body must not be compressed; leave out Content-Encoding.")


def printable(name: str) -> str:
    """A name that can be written anywhere."""
    return name[:1000].encode("utf-8", "replace").decode()
