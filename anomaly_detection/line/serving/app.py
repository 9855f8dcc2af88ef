"""The endpoints."""

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from anomaly_detection.line.journal import Row
from anomaly_detection.line.serving import protocol
from anomaly_detection.line.serving.answers import Json, Problem, tell_errors
from anomaly_detection.line.serving.bodies import (
    PICTURE,
    picture_body,
    picture_in,
    printable,
    refuse_encoded,
)
from anomaly_detection.line.serving.detectors import NAME
from anomaly_detection.line.serving.service import Service
from anomaly_detection.line.serving.tensors import LENGTH, SCHEMA

PAGE = Path(__file__).parent.parent / "page"
SCRIPTS = ["nodes.js", "server.js", "judge.js", "drift.js", "verdicts.js", "page.js"]


class Label(BaseModel):
    """What an inspector says of a part; null takes it back."""

    model_config = ConfigDict(extra="forbid")
    label: Literal["normal", "anomalous"] | None
    defect_type: Annotated[str, Field(pattern=NAME, max_length=100)] | None = None


def create_app(service: Service) -> FastAPI:
    """The endpoints of a service."""

    @contextlib.asynccontextmanager
    async def tended(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.tend())
        yield
        task.cancel()
        service.close()

    app = FastAPI(
        title="anomaly_detection",
        lifespan=tended,
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
        responses={"4XX": {"model": Problem}, 503: {"model": Problem}},
    )
    tell_errors(app)
    page, policy = page_and_policy()

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.post("/predict", openapi_extra={"requestBody": picture_body()})
    async def predict(
        request: Request,
        category: str | None = None,
        name: Annotated[str | None, Query(max_length=1000)] = None,
        overlay: bool = False,
    ) -> Json:
        """The verdict on a picture: the body, or the file of a multipart form."""
        one = service.named(category)
        with service.admitted():
            content, filename = await picture_in(request)
            called = printable(filename if name is None else name)
            return Json(await service.work(service.answer, one, content, called, overlay))

    @app.get("/verdicts")
    def verdicts(
        category: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> Json:
        """The last verdicts, or those of a category, the newest first."""
        rows = [entry.row for entry in service.store.journal.latest(limit, category)]
        keeps_labels = service.store.folder is not None
        labelled = [service.store.with_label(row) for row in rows]
        return Json({"verdicts": labelled, "keeps_labels": keeps_labels})

    def row_of(identifier: str) -> Row:
        if row := service.store.row(identifier):
            return row
        raise HTTPException(404, "the verdict must be one that is still in the journal.")

    @app.get(
        "/verdicts/{id}/picture",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {"schema": PICTURE}}}},
    )
    async def picture(id: str, overlay: bool = False) -> Response:
        """A verdict's picture for people, on request with the anomalous pixels in red."""
        row = await asyncio.to_thread(row_of, id)
        with service.admitted():
            content = await service.work(service.picture, row, overlay)
        return Response(content, media_type="image/jpeg")

    @app.post("/verdicts/{id}/label")
    def label(id: str, given: Label) -> Json:
        """Correct or confirm a verdict; returns its row."""
        row = row_of(id)
        if service.store.folder is None:
            raise HTTPException(409, "labels must have a folder; start the server with --store.")
        if given.defect_type and given.label != "anomalous":
            raise HTTPException(422, "defect_type must come with the label `anomalous`.")
        try:
            service.store.label(row, given.label, given.defect_type or "")
        except OSError as error:
            raise HTTPException(507, f"--store must be writable: {error.strerror}.") from None
        return Json(service.store.with_label(row))

    @app.get("/drift")
    def drift(points: Annotated[int, Query(ge=1, le=10_000)] = 500) -> Json:
        """Evidence of drift over the last pictures, the oldest first, by category."""
        return Json({name: drift_of(service, name, points) for name in service.served})

    @app.get("/detectors")
    async def detectors() -> Json:
        """The detectors that serve."""
        return Json(
            [
                {
                    "category": one.category,
                    "fingerprint": one.current.station.fingerprint,
                    "path": str(one.path),
                    "model": one.current.model,
                    "threshold": one.current.detector.threshold,
                    "image_size": one.current.detector.image_size,
                    "loaded_at": one.current.loaded_at,
                    "reload_error": one.reload_error,
                }
                for one in service.served.values()
            ]
        )

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    add_protocol(app, service)
    return app


def add_protocol(app: FastAPI, service: Service) -> None:
    """The endpoints of the Open Inference Protocol."""

    def if_ready(**answer: Any) -> Json:
        if not service.is_ready:
            raise HTTPException(503, "the server is about to stop.")
        return Json(answer)

    @app.get("/v2")
    async def server() -> Json:
        extensions = ["binary_tensor_data"]
        return Json({"name": "anomaly_detection", "version": "2", "extensions": extensions})

    @app.get("/v2/health/live")
    async def live() -> Json:
        return Json({"live": True})

    @app.get("/v2/health/ready")
    async def ready() -> Json:
        return if_ready(ready=True)

    @app.get("/v2/models")
    async def models() -> Json:
        return Json({"models": list(service.served)})

    @app.get("/v2/models/{name}")
    async def model(name: str) -> Json:
        return Json(protocol.metadata(service.named(name)))

    @app.get("/v2/models/{name}/ready")
    async def model_ready(name: str) -> Json:
        return if_ready(name=service.named(name).category, ready=True)

    body = {"required": True, "content": {"application/json": {"schema": SCHEMA}}}

    @app.post("/v2/models/{name}/infer", openapi_extra={"requestBody": body})
    async def infer(request: Request, name: str) -> Response:
        """Verdicts on picture files or on pixels."""
        one = service.named(name)
        with service.admitted():
            refuse_encoded(request)
            content, length = await request.body(), request.headers.get(LENGTH)
            answer, head = await service.work(protocol.infer, service, one, content, length)
        if head is None:
            return Response(answer, media_type="application/json")
        headers = {LENGTH: str(head)}
        return Response(answer, media_type="application/octet-stream", headers=headers)


def drift_of(service: Service, category: str, points: int) -> dict[str, Any]:
    """A category's evidence and alarms over its last pictures."""
    monitor = service.served[category].current.station.monitor
    rows = [entry.row for entry in service.store.journal.latest(points, category)][::-1]
    names = list(dict.fromkeys(name for row in rows for name in row["evidence"]))
    return {
        "limit": monitor.limit,
        "num_images": monitor.num_images,
        "evidence": {name: [row["evidence"].get(name) for row in rows] for name in names},
        "alarms": [
            {"id": row["id"], "time": row["time"], "index": index, "text": text}
            for index, row in enumerate(rows)
            for text in row["alarms"]
        ],
    }


def page_and_policy() -> tuple[str, str]:
    """The page as one file, and what a browser may do with it: run its own script, and nothing
    else."""
    page, policy = (PAGE / "page.html").read_text("utf-8"), []
    for files, tag, link in (
        (["page.css"], "style", '<link rel="stylesheet" href="page.css">'),
        (SCRIPTS, "script", '<script src="page.js"></script>'),
    ):
        text = "\n".join((PAGE / file).read_text("utf-8") for file in files)
        page = page.replace(link, f"<{tag}>{text}</{tag}>")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy.append(f"{tag}-src 'sha256-{digest}'")
    rest = "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'"
    return page, "; ".join([rest, "form-action 'none'; frame-ancestors 'none'", *policy])
