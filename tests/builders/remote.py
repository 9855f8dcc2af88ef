"""A DVC remote that fails."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def unreliable_remote(folder: Path) -> Iterator[tuple[str, Counter]]:
    """An HTTP server of files that refuses every third request; its URL, and a count of answers.

    Each method is counted by itself: in DVC's own rhythm, every third request is a PUT.
    """
    answers: Counter[tuple[str, int]] = Counter()
    counts: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, content: bytes = b"") -> None:
            counts[self.command] += 1
            if counts[self.command] % 3 == 0:
                status, content = 503, b""
            answers[self.command, status] += 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            path = folder / self.path.strip("/")
            self.answer(*((200, path.read_bytes()) if path.is_file() else (404,)))

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            content = self.body()
            if (counts["PUT"] + 1) % 3:
                path = folder / self.path.strip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.answer(201)

        def body(self) -> bytes:
            if "Content-Length" in self.headers:
                return self.rfile.read(int(self.headers["Content-Length"]))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", answers
    finally:
        server.shutdown()
        server.server_close()
