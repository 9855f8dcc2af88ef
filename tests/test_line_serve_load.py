"""`serve` under load, attack, kill and reload: nothing is lost, nothing grows."""

import http.client
import io
import itertools
import shutil
import signal
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import schemathesis
from builders.images import encoded
from builders.projects import wait_until
from builders.servers import KIND, Server, ask, form, of_category, pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from anomaly_detection import Detector
from anomaly_detection.line.serving.metrics import Metrics
from anomaly_detection.line.serving.store import Store
from benchmarks import serving as benchmark

PICTURES = pictures(20)
GOOD = PICTURES[0]
BROKEN = (ConnectionError, http.client.HTTPException, TimeoutError)


def counts(quick: int, exhaustive: int) -> pytest.MarkDecorator:
    """A test with few of something, and exhaustively with many."""
    many = pytest.param(exhaustive, marks=pytest.mark.exhaustive)
    return pytest.mark.parametrize("count", [quick, many])


@pytest.fixture(scope="module")
def server(export, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, export, "--max-bytes", 1_000_000) as running:
        yield running
        assert (running.stop(), running.stderr) == (0, "")


def scores_of(detector):
    found = Detector.load(detector)
    return [found.predict(content).score for content in PICTURES]


def memory(server):
    return psutil.Process(server.process.pid).memory_info().rss / 1e6


class Load:
    """Clients that ask for verdicts until `stop`, or until they are cut off."""

    def __init__(self, server, num_clients=8):
        self.server, self.rows, self.refused, self.ends = server, [], [], threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(num_clients)]
        for thread in self.threads:
            thread.start()

    def _ask(self, first):
        connection = self.server.connect()
        for i in itertools.count(first):
            if self.ends.is_set():
                return
            try:
                answer = ask(connection, "POST", f"/predict?name={i}", PICTURES[i % 20], KIND)
            except BROKEN:
                return
            (self.rows if answer.status == 200 else self.refused).append(answer.json)

    def stop(self):
        self.ends.set()
        self.join()

    def join(self):
        for thread in self.threads:
            thread.join()


@counts(1_000, 20_000)
def test_requests_of_32_clients_are_answered_rightly_in_flat_memory(server, export, count):
    expected, numbers, after = scores_of(export), itertools.count(), []
    before = server.get("/drift?points=1")["part"]["num_images"]

    def work(_):
        connection = server.connect()
        while (i := next(numbers)) < count:
            answer = ask(connection, "POST", f"/predict?name={i}", PICTURES[i % 20], KIND)
            assert answer.status == 200, answer.content
            assert answer.json["path"] == str(i)
            assert answer.json["score"] == pytest.approx(expected[i % 20], rel=1e-6)
            if i == count // 4:
                after.append(memory(server))

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))
    assert server.get("/drift?points=1")["part"]["num_images"] == before + count
    assert memory(server) < after[0] + 30


@counts(60, 600)
def test_bytes_of_any_kind_never_break_the_server(server, count):
    kinds = st.sampled_from(
        ["image/png", "", "multipart/form-data; boundary=x", "application/json", "\u00e9/x"]
    )
    parts = st.sampled_from([b"--x\r\n", b"\r\n\r\n", b"--x--", b'{"inputs": [', b"\x89PNG", GOOD])
    bodies = st.lists(st.binary(max_size=200) | parts, max_size=6).map(b"".join)
    paths = st.sampled_from(["/predict", "/v2/models/part/infer", "/verdicts/1/label", "/verdicts"])
    lengths = st.none() | st.integers(0, 300).map(str)

    @settings(max_examples=count, deadline=None, database=None)
    @given(path=paths, body=bodies, kind=kinds, length=lengths)
    def sent(path, body, kind, length):
        headers = {"Content-Type": kind} if kind else {}
        if length:
            headers["Inference-Header-Content-Length"] = length
        assert server.ask("POST", path, body, headers).status < 500

    sent()


@counts(60, 600)
def test_damaged_and_cut_images_never_break_the_server(server, count):
    image = Image.open(io.BytesIO(GOOD))
    files = [encoded(image, kind) for kind in ("PNG", "JPEG", "BMP", "TIFF")]

    @settings(max_examples=count, deadline=None, database=None)
    @given(
        st.sampled_from(files),
        st.floats(0, 1),
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=5),
    )
    def sent(content, share, changes):
        damaged = bytearray(content)
        for place, value in changes:
            damaged[int(place * (len(damaged) - 1))] = value
        answer = server.predict(bytes(damaged[: round(share * len(damaged))]))
        assert answer.status < 500, answer

    sent()


@counts(4, 40)
@pytest.mark.parametrize("mode", GenerationMode)
def test_what_the_openapi_document_allows_or_not_never_breaks_the_server(server, mode, count):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode.is_negative and not (operation.body or operation.query):
            continue

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def sent(case):
            case.validate_response(case.call(), checks=[not_a_server_error])

        sent()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


def tiff_that_claims(num_samples: int, width: object = 4000) -> bytes:
    """16 bits a sample, all but one of them alpha; a `width` of bytes is multiplied as such."""
    kind, count, value = (7, 4, width) if isinstance(width, bytes) else (4, 1, width)
    packed = value if isinstance(value, bytes) else struct.pack("<I", value)
    extra = struct.pack(f"<{num_samples - 1}H", *[2] * (num_samples - 1))
    tags = [
        (256, kind, count, packed),
        (257, 4, 1, struct.pack("<I", 4000)),
        (258, 3, 1, struct.pack("<I", 16)),
        (262, 3, 1, struct.pack("<I", 1)),
        (277, 3, 1, struct.pack("<I", num_samples)),
        (338, 3, num_samples - 1, struct.pack("<I", 8 + 2 + 6 * 12 + 4)),
    ]
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, 6) + entries + bytes(4) + extra


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (png_that_claims(60_000, 60_000), 413),
        (png_that_claims(10_001, 10_000), 413),
        (tiff_that_claims(60_000), 413),
        (tiff_that_claims(5, b"zzzz"), 422),
    ],
    ids=["a huge PNG", "a pixel too many", "a TIFF of 60,000 samples", "a width of bytes"],
)
def test_what_claims_too_many_pixels_is_refused_before_it_is_decoded(server, content, status):
    before = memory(server)
    for body, headers in ((content, KIND), form(content)):
        assert server.ask("POST", "/predict", body, headers).status == status
    assert memory(server) < before + 20


def raw(server, *parts: bytes) -> bytes:
    """What a server answers to these bytes, after which nothing else comes."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        for part in parts:
            connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Content-Length: 1000001\r\n", b"413"),
        (b"Content-Length: 99999999999999999999999999\r\n", b"400"),
        (b"Content-Length: -5\r\n", b"400"),
        (b"Content-Length: ten\r\n", b"400"),
        (b"Content-Length: 5\r\nContent-Length: 6\r\n", b"400"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n", b"400"),
        (b"No colon\r\n", b"400"),
    ],
)
def test_a_wrong_length_is_refused(server, headers, status):
    assert raw(server, HEAD + headers + b"\r\n").split()[1] == status


def test_a_body_that_stops_early_harms_nobody(server):
    raw(server, HEAD + b"Content-Length: 900000\r\n\r\n" + GOOD)
    raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc")
    assert server.predict(GOOD).status == 200


def test_chunks_are_read_up_to_the_limit_and_no_further(server):
    def chunks(count):
        return (bytes(100_000) for _ in range(count))

    answer = server.ask("POST", "/predict", chunks(10), KIND)
    assert answer.status == 415, "all of it was read"
    before = memory(server)
    answer = server.ask("POST", "/predict", chunks(2000), KIND)  # 200 MB
    assert (answer.status, answer.json["error"]) == (
        413,
        "the body must have at most 1,000,000 bytes.",
    )
    assert memory(server) < before + 20


def test_overload_is_answered_503_and_memory_stays_flat(serve, export):
    server = serve(export, "--max-waiting", 4, "--workers", 1)
    body = GOOD + bytes(5_000_000)  # what follows an image's end is ignored
    server.judge(body)
    before = memory(server)

    def work(_):
        connection, found = server.connect(), []
        for _ in range(4):
            try:
                found.append(ask(connection, "POST", "/predict", body, KIND))
            except BROKEN:  # refused while it was sending
                connection = server.connect()
        return found

    with ThreadPoolExecutor(24) as pool:
        answers = list(itertools.chain.from_iterable(pool.map(work, range(24))))
    refused = [x for x in answers if x.status != 200]
    assert {x.status for x in refused} == {503}
    assert all(x.headers["Retry-After"] == "1" for x in refused)
    assert len(answers) > len(refused)
    assert memory(server) < before + 4 * 3 * 5 + 40
    assert server.predict(GOOD).status == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whatever_ends_the_server_every_verdict_that_was_given_is_kept(
    serve, export, tmp_path, number
):
    """A signal other than `kill -9` ends it when all that it has accepted is answered."""
    server = serve(export, "--store", tmp_path / "store")
    load = Load(server)
    wait_until(lambda: len(load.rows) > 100)
    status = server.stop(number)
    load.join()
    (tmp_path / "store/pictures/.half.png.partial").touch()  # as a kill may leave one
    store = Store(tmp_path / "store", Metrics())
    kept = {entry.row["id"]: entry.row for entry in store.journal.latest(100_000)}
    store.close()
    assert not list((tmp_path / "store" / "pictures").glob(".*"))
    given = {row["id"]: row for row in load.rows}
    if number == signal.SIGKILL:
        assert kept.items() >= given.items()
    else:
        assert (status, server.stderr, load.refused) == (0, "", [])
        assert kept == given


def test_a_server_that_is_about_to_stop_is_not_ready_but_answers(serve, export):
    """Another request holds it up: its body has not come yet."""
    server = serve(export)
    health, slow = server.connect(), server.connect()
    assert ask(health, "GET", "/v2/health/ready").status == 200
    slow.putrequest("POST", "/predict")
    slow.putheader("Content-Length", str(len(GOOD)))
    slow.endheaders(GOOD[:100])
    wait_until(lambda: server.metric("waiting") == 1)
    server.process.send_signal(signal.SIGTERM)
    states = []
    try:
        while True:
            states.append(ask(health, "GET", "/v2/health/ready").status)
    except BROKEN:
        pass
    assert set(states) <= {200, 503}
    assert states[-1] == 503
    slow.send(GOOD[100:])
    assert slow.getresponse().status == 200
    assert server.process.wait() == 0


def take(source: Path, place: Path) -> None:
    """Put another detector in the place of one that serves, as `cp` would."""
    for file in sorted(source.iterdir()):
        shutil.copy(file, place / file.name)


def test_a_new_detector_takes_over_under_load_and_a_bad_one_does_not(
    serve, export, newer_export, tmp_path
):
    place = tmp_path / "part"
    shutil.copytree(export, place)
    server = serve(place, "--store", tmp_path / "store")
    old, new = scores_of(export), scores_of(newer_export)
    first = server.get("/detectors")[0]["fingerprint"]
    load = Load(server, num_clients=2)
    try:
        wait_until(lambda: len(load.rows) > 20)
        take(newer_export, place)
        wait_until(lambda: server.get("/detectors")[0]["fingerprint"] != first)
        count = len(load.rows)
        wait_until(lambda: len(load.rows) > count + 20)

        (place / "model.onnx").write_bytes(b"no model")
        wait_until(lambda: server.get("/detectors")[0]["reload_error"])
        take(of_category(export, tmp_path / "nut", "nut"), place)
        wait_until(lambda: "detector of part" in server.get("/detectors")[0]["reload_error"])
        shutil.rmtree(place)
        count = len(load.rows)
        wait_until(lambda: len(load.rows) > count + 20)
    finally:
        load.stop()
    assert load.refused == []
    detectors = list(dict.fromkeys(row["detector"] for row in load.rows))
    assert detectors == [first, server.get("/detectors")[0]["fingerprint"]]
    for row in load.rows:
        expected = (old if row["detector"] == first else new)[int(row["path"]) % 20]
        assert row["score"] == pytest.approx(expected, rel=1e-6)
    assert server.get("/drift")["part"]["num_images"] == sum(
        row["detector"] != first for row in load.rows
    )
    assert server.metric("reloads_total", category="part") == 1
    assert server.metric("failed_reloads_total", category="part") == 2
    assert len(server.stderr.splitlines()) == 2
    take_back = tmp_path / "back"
    shutil.copytree(export, take_back)
    take_back.rename(place)
    wait_until(lambda: server.get("/detectors")[0]["fingerprint"] == first)
    assert server.get("/detectors")[0]["reload_error"] is None
    before = sum(row["detector"] == first for row in load.rows)
    assert server.get("/drift")["part"]["num_images"] == before, "drift goes on where it was"


def test_the_benchmark_measures_both(export, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, content in zip(paths, PICTURES, strict=False):
        path.write_bytes(content)
    (found,) = benchmark.compare(export, paths, rounds=1, seconds=0.5)
    assert found.bare > 0
    assert found.served > 0
