"""Answers in JSON, errors among them."""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from anomaly_detection.errors import DataError


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


class Json(Response):
    """An answer in JSON, in ASCII, since a request may have had characters that UTF-8 has not."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None):
        super().__init__(content, status_code, headers)

    def render(self, content: Any) -> bytes:
        """The content as JSON."""
        return json.dumps(content, allow_nan=False).encode()


def tell_errors(app: FastAPI) -> None:
    """Give all errors one form, `Problem`."""

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return Json({"error": error.detail}, error.status_code, dict(error.headers or {}))

    @app.exception_handler(DataError)
    async def unfit(_: Request, error: DataError) -> Response:
        return Json({"error": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        (first, *_others) = error.errors()
        where = ".".join(map(str, first["loc"]))
        text = f"{where} cannot be taken: {first['msg']}, got {first.get('input')!r:.100}."
        return Json({"error": text}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Json({"error": "the body must be whole."}, 400)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return Json({"error": "the server has failed; its standard error says why."}, 500)
