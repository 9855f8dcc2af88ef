"""The process: a socket, the detectors, and an orderly end."""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from anomaly_detection.errors import UserError
from anomaly_detection.line.serving.app import create_app
from anomaly_detection.line.serving.detectors import Served, ServingStation, by_category
from anomaly_detection.line.serving.gate import Gate
from anomaly_detection.line.serving.metrics import Metrics
from anomaly_detection.line.serving.service import Service
from anomaly_detection.line.serving.store import Store
from anomaly_detection.line.station import proven

GRACE = 0.5  # seconds in which whoever asks learns that the server is not ready
LOCAL = ("localhost", "127.0.0.1", "[::1]")


class Server(uvicorn.Server):
    """Says when it serves, and is not ready from the moment that it is told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service, line: str) -> None:
        super().__init__(config)
        self.service, self.line = service, line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        await super().startup(sockets)
        print(self.line, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and finish what was accepted."""
        await asyncio.sleep(GRACE)
        await super().shutdown(sockets)

    def handle_exit(self, *signal_and_frame: object) -> None:
        """Be no longer ready, and stop soon."""
        self.service.is_ready = False
        super().handle_exit(*signal_and_frame)  # type: ignore[arg-type]


def serve(
    paths: Sequence[Path],
    *,
    host: str,
    port: int,
    token: str | None,
    store: Path | None,
    limit: float,
    workers: int | None,
    max_waiting: int,
    max_bytes: int,
    max_pixels: int,
    device: str,
) -> int:
    """Serve until a signal, and finish what was accepted; returns the exit status.

    Raises:
        UserError: A detector cannot be loaded, or the address or the folder not be used.
    """
    warnings.filterwarnings("ignore", module="PIL")  # a client's mistakes are no news
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    sock = bound(host, port)
    address, port = sock.getsockname()[:2]
    is_local = ipaddress.ip_address(address).is_loopback
    if not is_local and token is None:
        raise UserError(
            f"--host must be of this machine alone without a token, got {host}; add --token-file, "
            "a file with a secret that requests must bear."
        )
    workers = workers or os.cpu_count() or 1
    metrics = Metrics()
    keeping = Store(store, metrics)
    served = by_category(
        Served(
            path,
            lambda own: proven(own, device, workers),
            lambda detector: ServingStation(detector, keeping.journal, limit, metrics),
        )
        for path in paths
    )
    service = Service(
        served,
        keeping,
        metrics,
        workers=workers,
        max_waiting=max_waiting,
        max_pixels=max_pixels,
    )
    written = f"[{address}]" if ":" in address else address
    hosts = dict.fromkeys([*LOCAL, written]) if is_local else None
    app = create_app(service)
    app.add_middleware(Gate, metrics=metrics, token=token, hosts=hosts, max_bytes=max_bytes)
    config = uvicorn.Config(
        app, http="httptools", ws="none", access_log=False, log_config=None, log_level="error"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again at the end
    server = Server(config, service, f"Serving {', '.join(served)} at http://{written}:{port}")
    server.run(sockets=[sock])
    return 0


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        UserError: It is not this machine's, or in use.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(
            f"--host and --port must be a free address of this machine, got {host} and {port} "
            f"({getattr(error, 'strerror', None) or error})."
        ) from None
    return sock
