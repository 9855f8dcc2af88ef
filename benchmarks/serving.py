"""Images a second of `anomaly-detection serve`, as a share of a bare onnxruntime loop's.

`python -m benchmarks.serving --detector exports/mono data/elpv/mono/test/good` lets both have all
cores, in turns. The loop runs one picture that has been decoded before, with onnxruntime's
defaults. The server decodes, judges and records the files that eight clients of another process
send, which share the cores with it.
"""

import argparse
import http.client
import itertools
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from anomaly_detection.inference.files import images_below

NUM_CLIENTS = 8
WARM_UP = 1.0  # seconds


class Round(NamedTuple):
    """Images a second."""

    bare: float
    served: float


def bare(model: Path, image: Path, seconds: float) -> float:
    """Images a second of onnxruntime alone."""
    import onnxruntime

    from anomaly_detection.data.decode import decode_image, resize_image

    session = onnxruntime.InferenceSession(model)
    (given,) = session.get_inputs()
    pixels = resize_image(decode_image(image.read_bytes(), image), given.shape[-1])[None]
    start = time.monotonic()
    num_images = 0
    while (now := time.monotonic()) < start + WARM_UP + seconds:
        session.run(None, {given.name: pixels})
        num_images += now > start + WARM_UP
    return num_images / (now - start - WARM_UP)


def clients(port: int, images: Sequence[Path], seconds: float) -> float:
    """Images a second that a server answers."""
    files = [path.read_bytes() for path in images]
    start = time.monotonic() + WARM_UP

    def ask(first: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        num_images = 0
        for content in itertools.islice(itertools.cycle(files), first, None):
            connection.request("POST", "/predict", content, {"Content-Type": "image/png"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(text)
            if time.monotonic() > start + seconds:
                return num_images
            num_images += time.monotonic() > start

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        return sum(pool.map(ask, range(NUM_CLIENTS))) / seconds


def compare(
    detector: Path, images: Sequence[Path], rounds: int, seconds: float, options: Sequence[str] = ()
) -> list[Round]:
    """Both, in turns; each run in a process of its own."""
    command = [sys.executable, "-m", "anomaly_detection", "serve", "--port", "0"]
    command += ["--detector", str(detector), *options]
    context = multiprocessing.get_context("spawn")
    found = []
    for _ in range(rounds):
        with context.Pool(1) as pool:
            alone = pool.apply(bare, (detector / "model.onnx", images[0], seconds))
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rpartition(":")[2])
            with context.Pool(1) as pool:
                served = pool.apply(clients, (port, images, seconds))
        finally:
            server.terminate()
            server.wait()
        found.append(Round(alone, served))
    return found


def main() -> None:
    """Print a line for each round, and the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="a folder")
    parser.add_argument("--detector", type=Path, required=True, help="exports/<category>")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    arguments, options = parser.parse_known_args()  # the others are the server's
    images = list(map(Path, images_below(arguments.images)))
    print("images/s  bare  served  ratio")
    found = compare(arguments.detector, images, arguments.rounds, arguments.seconds, options)
    for one in found:
        print(f"{one.bare:14.1f}{one.served:8.1f}{one.served / one.bare:7.2f}")
    print(f"median ratio {statistics.median(x.served / x.bare for x in found):.2f}")


if __name__ == "__main__":
    main()
