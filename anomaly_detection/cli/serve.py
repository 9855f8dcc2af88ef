"""Judge pictures that are sent over HTTP, until the process is told to stop. Detectors whose files
are replaced are taken without a pause. The exit status is 0."""

import argparse
from pathlib import Path

from anomaly_detection.cli.arguments import add_device, add_limit, positive
from anomaly_detection.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    parser.add_argument(
        "--detector",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help="detectors/<category>.pt, exports/<category>, or a model in it; one for each category",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=port, default=8000, help="default: 8000; 0 for a free one")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="with a secret that requests must bear"
    )
    parser.add_argument(
        "--store", type=Path, metavar="FOLDER", help="keeps verdicts, pictures and corrections"
    )
    add_limit(parser)
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="threads that judge; default: each core"
    )
    parser.add_argument(
        "--max-waiting",
        type=positive,
        default=64,
        metavar="N",
        help="requests at once; further ones are told to come again; default: 64",
    )
    parser.add_argument(
        "--max-bytes",
        type=positive,
        default=32_000_000,
        metavar="N",
        help="of a request; default: 32 million",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=100_000_000,
        metavar="N",
        help="of a picture; default: 100 million, which is also the most",
    )
    add_device(parser)


def port(text: str) -> int:
    """A number that a port may have."""
    if not text.isdecimal() or len(text) > 5 or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"must be a number of at most 65535, got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Serve; returns the exit status."""
    try:
        from anomaly_detection.line.serving.server import serve
    except ImportError as error:
        raise UserError(
            f"serve needs {error.name}: pip install 'anomaly_detection[serve]'."
        ) from None
    return serve(
        options.detector,
        host=options.host,
        port=options.port,
        token=token_in(options.token_file) if options.token_file else None,
        store=options.store,
        limit=options.limit,
        workers=options.workers,
        max_waiting=options.max_waiting,
        max_bytes=options.max_bytes,
        max_pixels=options.max_pixels,
        device=options.device,
    )


def token_in(path: Path) -> str:
    """The secret in a file.

    Raises:
        UserError: It cannot be read, or is none.
    """
    try:
        token = path.read_text("ascii").strip()
    except (OSError, ValueError):
        token = ""
    if not token.isprintable() or len(token.split()) != 1:
        raise UserError(
            f"--token-file must have one word of ASCII, but {path} has not; write one with "
            f"`openssl rand -hex 32 > {path}`."
        )
    return token
