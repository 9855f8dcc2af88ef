"""From a picture's bytes to its verdict: what all ways to ask have in common."""

import asyncio
import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from starlette.exceptions import HTTPException

from anomaly_detection.data.decode import content_hash, decode_image
from anomaly_detection.inference.detector import Prediction
from anomaly_detection.line.journal import Row
from anomaly_detection.line.patience import say
from anomaly_detection.line.serving.detectors import Current, Served
from anomaly_detection.line.serving.metrics import Metrics
from anomaly_detection.line.serving.pictures import as_jpeg, check_header, for_people, overlaid
from anomaly_detection.line.serving.store import Store

R = TypeVar("R")


class Service:
    """Detectors by category, and the threads that judge with them.

    Args:
        served: By category.
        store: Gets rows and pictures.
        metrics: Count.
        workers: Threads that judge.
        max_waiting: Requests that wait for a verdict, or get one.
        max_pixels: Of a picture.

    Attributes:
        is_ready: Whether further requests are welcome.
    """

    def __init__(
        self,
        served: dict[str, Served],
        store: Store,
        metrics: Metrics,
        *,
        workers: int,
        max_waiting: int,
        max_pixels: int,
    ) -> None:
        self.served, self.store, self.metrics = served, store, metrics
        self.max_waiting, self.max_pixels = max_waiting, max_pixels
        self.pool = ThreadPoolExecutor(workers, "judge")
        self.num_waiting = 0
        self.is_ready = True
        for one in served.values():
            self._describe(one)

    def named(self, category: str | None) -> Served:
        """A category's detector; None for the only one.

        Raises:
            HTTPException: There is none, or more than one.
        """
        if category is None and len(self.served) == 1:
            return next(iter(self.served.values()))
        names = ", ".join(self.served)
        if category is None:
            raise HTTPException(400, f"category must be one of {names}, but is left out.")
        if category not in self.served:
            raise HTTPException(404, f"category must be one of {names}, got {category[:100]!r}.")
        return self.served[category]

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place among those who wait, from before a body is read until its answer.

        Raises:
            HTTPException: All are taken.
        """
        if self.num_waiting >= self.max_waiting:
            raise HTTPException(
                503, f"{self.max_waiting} requests wait already; try again.", {"Retry-After": "1"}
            )
        self.num_waiting += 1
        self.metrics.waiting.inc()
        try:
            yield
        finally:
            self.num_waiting -= 1
            self.metrics.waiting.dec()

    async def work(self, function: Callable[..., R], *arguments: object) -> R:
        """What a function returns that runs in a thread of those that judge."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    def judge(self, current: Current, content: bytes, name: str) -> tuple[Row, Prediction]:
        """Judge a picture and record the verdict.

        Raises:
            HTTPException: As in `check_header`.
            DataError: As in `Detector.predict`.
        """
        check_header(content, self.max_pixels)
        found = current.detector.predict(content)
        row = current.station.record(found, name, content_hash(content))
        if row["id"]:
            self.store.keep(row, content)
        self.metrics.judged(row["category"], row["verdict"], row["score"])
        self.metrics.recorded(row)
        return row, found

    def answer(self, one: Served, content: bytes, name: str, overlay: bool) -> Row:
        """A picture's row, with the overlay as a data URI if it is asked for."""
        current = one.current
        row, found = self.judge(current, content, name)
        if overlay:
            picture = as_jpeg(overlaid(current.detector, content, found))
            row = row | {"overlay": f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"}
        return row

    def picture(self, row: Row, overlay: bool) -> bytes:
        """A kept picture as a JPEG file for people, on request with the present detector's map.

        Raises:
            HTTPException: It is no longer kept, or its category no longer served.
        """
        content = self.store.picture(row)
        detector = self.named(row["category"]).current.detector
        if overlay:
            return as_jpeg(overlaid(detector, content, detector.predict(content)))
        return as_jpeg(for_people(decode_image(content, "image", detector.bit_depth)))

    async def tend(self) -> None:
        """Every second, take detectors whose files were replaced, and forget old rows."""
        while True:
            await asyncio.sleep(1)
            for one in self.served.values():
                taken = await asyncio.to_thread(one.refresh)
                if taken:
                    self.metrics.reloads.labels(one.category).inc()
                    self._describe(one)
                elif taken is not None:
                    self.metrics.failed_reloads.labels(one.category).inc()
                    say(f"{one.category} stays as it is: {one.reload_error}")
            await asyncio.to_thread(self.store.tidy)

    def close(self) -> None:
        """Finish what is being judged."""
        self.pool.shutdown()
        self.store.close()

    def _describe(self, one: Served) -> None:
        station = one.current.station
        self.metrics.detector.labels(one.category).info(
            {"fingerprint": station.fingerprint, "model": one.current.model, "path": str(one.path)}
        )
