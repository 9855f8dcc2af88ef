"""`anomaly-detection serve`: what each endpoint answers, in a real process."""

import base64
import csv
import hashlib
import io
import json
import re
import resource
import socket
import subprocess
import sys

import numpy as np
import pytest
import tritonclient.http as triton
from builders.detectors import SIZE
from builders.projects import ROOT, environment, wait_until
from builders.servers import KIND, Server, as_png, form, pictures, textures, write_export
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from anomaly_detection import Detector


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("exports") / "part")


@pytest.fixture(scope="module")
def detector(export):
    return Detector.load(export)


@pytest.fixture(scope="module")
def server(export, tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("server"), export)
    yield running
    assert running.stop() == 0
    assert running.stderr == ""


@pytest.fixture
def serve(tmp_path):
    """Start a server; whatever runs at the end is stopped."""
    running = []

    def start(*arguments, **options):
        running.append(Server(tmp_path, *arguments, **options))
        return running[-1]

    yield start
    for one in running:
        one.stop()


def metric(server, name, **labels):
    text = server.ask("GET", "/metrics").content.decode()
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"anomaly_detection_{name}" and labels.items() <= sample.labels.items()
    ]
    return sum(found) if found else None


# --- a picture's verdict


def test_a_raw_picture_and_a_form_get_the_verdict_of_predict(server, detector):
    for content in pictures(3):
        expected = detector.predict(content)
        raw = server.ask("POST", "/predict?name=7", content, KIND).json
        sent = server.ask("POST", "/predict", *form(content, "part 7.png", "anything")).json
        for row, name in ((raw, "7"), (sent, "part 7.png")):
            assert row["score"] == pytest.approx(expected.score, rel=1e-6)
            assert row["p_value"] == expected.p_value
            assert row["verdict"] == expected.verdict
            assert row["sha256"] == hashlib.sha256(content).hexdigest()
            assert row["path"] == name
            assert row["category"] == "part"
            assert set(row["evidence"]) == {"score", "brightness", "contrast", "sharpness"}
        assert raw["id"] != sent["id"]


@pytest.mark.parametrize("kind", ["image/x-anything", "application/octet-stream", None])
def test_a_raw_body_may_be_of_any_image_type_or_none(server, kind):
    headers = {"Content-Type": kind} if kind else {}
    assert server.ask("POST", "/predict", pictures(1)[0], headers).status == 200


def test_the_overlay_is_a_picture_with_the_anomalous_pixels_in_red(server):
    row = server.predict(defective(), "?overlay=true").json
    assert row["verdict"] == "anomalous"
    kind, _, text = row["overlay"].partition(";base64,")
    assert kind == "data:image/jpeg"
    shown = Image.open(io.BytesIO(base64.b64decode(text)))
    assert shown.size == (1024, 1024)
    assert has_red(shown)


def damaged(content, place):
    return content[:place] + bytes(8) + content[place + 8 :]


def deep(count):
    return b"[" * count


GOOD = pictures(1)[0]
FLOATS = io.BytesIO()
Image.fromarray(np.zeros((8, 8), np.float32)).save(FLOATS, "TIFF")


@pytest.mark.parametrize(
    ("body", "headers", "status", "text"),
    [
        (b"", KIND, 400, "a picture must be sent"),
        (b"no picture", KIND, 415, "must be a whole one of PNG, JPEG, BMP, TIFF"),
        (b"GIF89a" + bytes(40), KIND, 415, "must be a whole one of PNG, JPEG, BMP, TIFF"),
        (GOOD[: len(GOOD) // 2], KIND, 422, "must be a whole image"),
        (damaged(GOOD, 60), KIND, 422, "must be a whole image"),
        (FLOATS.getvalue(), KIND, 422, "must have 8 or 16 bits"),
        (GOOD, {"Content-Type": "text/plain"}, 415, "Content-Type must be"),
        (GOOD, KIND | {"Content-Encoding": "gzip"}, 415, "must not be compressed"),
        (GOOD, {"Content-Type": "multipart/form-data"}, 400, "Missing boundary"),
        (GOOD, {"Content-Type": "multipart/form-data; boundary=x"}, 400, "the form must be"),
        (b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "have a file"),
        (
            form(GOOD)[0].replace(b"--xyz--", b"") + form(GOOD)[0],
            form(GOOD)[1],
            400,
            "the form must be whole: Too many files",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused_with_a_line(server, body, headers, status, text):
    answer = server.ask("POST", "/predict", body, headers)
    assert answer.status == status
    assert text in answer.json["error"]
    assert "\n" not in answer.json["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/nothing", 404, "Not Found"),
        ("GET", "/predict", 405, "Method Not Allowed"),
        ("POST", "/predict?category=other", 404, "category must be one of part, got 'other'"),
        ("POST", "/predict?overlay=perhaps", 422, "query.overlay cannot be taken"),
        ("GET", "/verdicts?limit=0", 422, "query.limit cannot be taken"),
        ("GET", "/verdicts?limit=1e99", 422, "query.limit cannot be taken"),
        ("GET", "/drift?points=none", 422, "query.points cannot be taken"),
        ("GET", "/verdicts/1/picture", 404, "the verdict must be one that is still in the"),
        ("GET", "/v2/models/other", 404, "category must be one of part"),
        ("POST", "/v2/models/other/infer", 404, "category must be one of part"),
    ],
)
def test_every_error_has_the_same_form(server, method, path, status, text):
    answer = server.ask(method, path)
    assert answer.status == status
    assert list(answer.json) == ["error"]
    assert text in answer.json["error"]


def test_an_id_far_beyond_the_journal_s_is_not_found(server):
    own = server.predict(GOOD).json["id"].rpartition("-")[0]
    for number in ("9" * 18, "9" * 19, "9" * 5000, "x", "-1"):
        assert server.ask("GET", f"/verdicts/{own}-{number}/picture").status == 404


def test_several_detectors_are_told_apart_by_their_category(serve, export, tmp_path):
    other = write_export(tmp_path / "other", "nut 2", seed=3)
    server = serve(export, other)
    assert server.line.startswith("Serving part, nut 2 at http://127.0.0.1:")
    answer = server.predict(GOOD)
    assert (answer.status, answer.json["error"]) == (
        400,
        "category must be one of part, nut 2, but is left out.",
    )
    for category, folder in (("part", export), ("nut%202", other)):
        row = server.predict(GOOD, f"?category={category}").json
        assert row["score"] == pytest.approx(Detector.load(folder).predict(GOOD).score, rel=1e-6)
    assert [x["category"] for x in server.get("/detectors")] == ["part", "nut 2"]
    assert {name: x["num_images"] for name, x in server.get("/drift").items()} == {
        "part": 1,
        "nut 2": 1,
    }


# --- the Open Inference Protocol


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


def asked(client, name, values, datatype, binary=True, outputs=None, **options):
    tensor = triton.InferInput(name, values.shape, datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return client.infer("part", [tensor], outputs=outputs, **options)


def test_triton_s_client_finds_the_model(client, server):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("part")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    model = client.get_model_metadata("part")
    assert model["versions"] == [server.get("/detectors")[0]["fingerprint"]]
    assert model["inputs"][0]["parameters"]["pixels_shape"] == [-1, 3, SIZE, SIZE]
    assert server.get("/v2/models") == {"models": ["part"]}


@pytest.mark.parametrize("binary", [True, False])
def test_triton_s_client_gets_the_verdicts_of_predict(client, detector, binary):
    found = textures(3, 5)
    files = np.array([as_png(x) for x in found], object)
    names = ["score", "rank", "is_anomalous", "p_value", "anomaly_map"]
    outputs = [triton.InferRequestedOutput(x, binary_data=binary) for x in names]
    encoded = files if binary else np.array([base64.b64encode(x) for x in files], object)
    of_files = asked(client, "image", encoded, "BYTES", binary, outputs, request_id="7")
    of_pixels = asked(client, "image", found, "UINT8", binary, outputs)
    assert of_files.get_response()["id"] == "7"
    expected = [detector.predict(x) for x in files]
    for result in (of_files, of_pixels):
        values = {name: result.as_numpy(name) for name in names}
        assert values["score"] == pytest.approx([x.score for x in expected], rel=1e-6)
        assert values["p_value"].tolist() == [x.p_value for x in expected]
        assert values["is_anomalous"].tolist() == [x.verdict == "anomalous" for x in expected]
        assert values["rank"].dtype == np.int64
        ranks = [(detector.calibration_scores >= x.score).sum() for x in expected]
        assert values["rank"].tolist() == ranks
        maps = np.stack([x.anomaly_map for x in expected])[:, None]
        assert values["anomaly_map"] == pytest.approx(maps, rel=1e-4, abs=1e-5)


def test_files_are_recorded_and_the_map_comes_only_on_request(client, server):
    before = server.get("/drift")["part"]["num_images"]
    result = asked(client, "image", np.array([GOOD, GOOD], object), "BYTES")
    assert result.as_numpy("anomaly_map") is None
    assert server.get("/drift")["part"]["num_images"] == before + 2
    asked(client, "image", textures(2, 5), "UINT8")
    assert server.get("/drift")["part"]["num_images"] == before + 2


def inputs(**change):
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["eA=="]} | change
    return {"inputs": [tensor]}


PIXELS = {"datatype": "UINT8", "shape": [1, 3, SIZE, SIZE]}


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({}, "inputs must follow the protocol"),
        ({"inputs": []}, "inputs must have image"),
        (inputs(name="other"), "inputs must have image"),
        (inputs(datatype="FP64"), "image must be BYTES or UINT8, UINT16, INT64"),
        (inputs(data=["?"]), "files in base64"),
        (inputs(data=[7]), "files in base64"),
        (inputs(data=None), "files in base64"),
        (inputs(shape=[2]), "image must have the values of its shape, got 1"),
        (inputs(shape=[1, 65], data=["eA=="] * 65), "image must be of 1 to 64 images"),
        (inputs(shape=[]), "image must be of 1 to 64 images"),
        (inputs(shape=[10**30]), "image must be of 1 to 64 images"),
        (inputs(shape=[1, 10**30]), "image must have the values of its shape"),
        (inputs(**PIXELS, data=[0.5] * 3 * SIZE**2), "whole numbers that UINT8 has"),
        (inputs(**PIXELS, data=[256] * 3 * SIZE**2), "whole numbers that UINT8 has"),
        (inputs(**PIXELS, data=[-1] * 3 * SIZE**2), "whole numbers that UINT8 has"),
        (inputs(**PIXELS, data=[10**30]), "whole numbers that UINT8 has"),
        (inputs(**PIXELS, data=[[1], [1, 2]]), "numbers in rows"),
        (inputs(datatype="UINT8", shape=[1, 3, 2, 2], data=[0] * 12), "or UINT8 of shape"),
        (inputs(**PIXELS | {"datatype": "UINT16"}, data=[0] * 3 * SIZE**2), "got UINT16"),
        (inputs() | {"outputs": [{"name": "other"}]}, "outputs must be of score, rank"),
        (inputs(parameters={"binary_data_size": 5}), "must be that of what follows"),
        (inputs(parameters={"binary_data_size": -1}), "must be that of what follows"),
    ],
)
def test_what_does_not_follow_the_protocol_is_refused(server, request_, text):
    body = json.dumps(request_)
    answer = server.ask("POST", "/v2/models/part/infer", body)
    assert answer.status == 400
    assert text in answer.json["error"]


@pytest.mark.parametrize(
    ("body", "length"),
    [(b"{", None), (deep(100_000), None), (b"\xff", None), (b"{}", "9"), (b"{}", "-1"), (b"", "x")],
)
def test_a_body_that_is_no_json_is_refused(server, body, length):
    headers = {"Inference-Header-Content-Length": length} if length else {}
    assert server.ask("POST", "/v2/models/part/infer", body, headers).status == 400
    assert server.ask("POST", "/verdicts/x/label", body, headers).status in (400, 422)


# --- what is known of the line


def defective():
    """The file of a large grey picture with a white spot."""
    grey = textures(1, 6)[0, :1].repeat(3, axis=0)
    pixels = np.kron(grey, np.ones((1, 50, 50), np.uint8))  # 1600 x 1600
    pixels[:, 400:800, 400:800] = 255
    return as_png(pixels)


def has_red(picture):
    pixels = np.asarray(picture).astype(int)
    return bool((pixels[..., 0] - pixels[..., 1] > 100).any())


def test_verdicts_come_newest_first_with_their_pictures(server):
    first, second = (server.predict(x).json for x in (defective(), GOOD))
    rows = server.get("/verdicts?limit=2")["verdicts"]
    assert rows == [second, first]
    for query, is_overlay in (("", False), ("?overlay=true", True)):
        answer = server.ask("GET", f"/verdicts/{first['id']}/picture{query}")
        shown = Image.open(io.BytesIO(answer.content))
        assert (shown.format, shown.size) == ("JPEG", (1024, 1024))
        assert has_red(shown) == is_overlay
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_other_pictures_are_noticed_in_drift_and_metrics(serve, export):
    server = serve(export, "--limit", 50)
    for content in pictures(40, 20):
        server.predict(content)
    for pixels in textures(80, 21):
        server.predict(as_png(pixels // 2))
    found = server.get("/drift?points=100")["part"]
    assert (found["limit"], found["num_images"]) == (50, 120)
    assert {name: len(x) for name, x in found["evidence"].items()} == dict.fromkeys(
        ("score", "brightness", "contrast", "sharpness"), 100
    )
    texts = [x["text"] for x in found["alarms"]]
    assert any(text.startswith("pictures are darker") for text in texts)
    assert metric(server, "drift_alarms_total", quantity="brightness", direction="down") > 0
    assert metric(server, "drift_evidence", quantity="brightness", category="part") is not None
    assert metric(server, "picture_brightness", category="part") == pytest.approx(0.25, abs=0.02)


def test_metrics_count_requests_and_verdicts(server):
    names = {"verdicts_total": {}, "requests_total": {"endpoint": "/predict", "status": "200"}}
    before = [metric(server, name, **labels) or 0 for name, labels in names.items()]
    server.predict(GOOD)
    server.ask("POST", "/predict", b"x", KIND)
    after = [metric(server, name, **labels) for name, labels in names.items()]
    assert np.subtract(after, before).tolist() == [1, 1]
    assert metric(server, "requests_total", endpoint="/predict", status="415") >= 1
    assert metric(server, "waiting") == 0
    fingerprint = server.get("/detectors")[0]["fingerprint"]
    assert metric(server, "detector_info", fingerprint=fingerprint, model="patchcore") == 1
    assert metric(server, "score_count", category="part") >= 1
    assert metric(server, "request_seconds_count", endpoint="/predict") >= 2


def test_a_detector_is_described(server, detector, export):
    (found,) = server.get("/detectors")
    assert found["path"] == str(export)
    assert found["threshold"] == detector.threshold
    assert found["image_size"] == SIZE
    assert found["reload_error"] is None


def test_in_memory_old_verdicts_are_forgotten(server):
    connection = server.connect()
    for _ in range(1100):
        connection.request("POST", "/predict", GOOD, KIND)
        assert connection.getresponse().read()
    oldest = 1000
    wait_until(lambda: len(server.get(f"/verdicts?limit={oldest}")["verdicts"]) == oldest)
    last = server.get("/verdicts?limit=1")["verdicts"][0]["id"]
    name, _, number = last.rpartition("-")
    wait_until(
        lambda: "no longer" not in str(server.ask("GET", f"/verdicts/{name}-1/picture").content)
    )
    assert server.ask("GET", f"/verdicts/{name}-{int(number) - 99}/picture").status == 200
    answer = server.ask("GET", f"/verdicts/{name}-{int(number) - 100}/picture")
    assert answer.json["error"] == "this verdict's picture is no longer kept."


# --- labels


def label(server, row, label, **more):
    body = json.dumps({"label": label, **more})
    headers = {"Content-Type": "application/json"}
    return server.ask("POST", f"/verdicts/{row['id']}/label", body, headers)


def test_labels_need_a_store(server):
    answer = label(server, server.predict(GOOD).json, "normal")
    assert answer.status == 409
    assert "start the server with --store" in answer.json["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"label": "bad"},
        {},
        {"label": "anomalous", "defect_type": "../up"},
        {"label": "anomalous", "defect_type": "a\nb"},
        {"label": "anomalous", "defect_type": "x" * 101},
        {"label": "normal", "defect_type": "scratch"},
        {"label": "normal", "other": 1},
        {"label": "\ud800"},
    ],
)
def test_a_wrong_label_is_refused(serve, export, tmp_path, body):
    server = serve(export, "--store", tmp_path / "store")
    row = server.predict(GOOD).json
    answer = label(server, row, **{"label": None} | body) if body else label(server, row, 5)
    assert answer.status == 422
    assert not (tmp_path / "store" / "corrections.csv").exists()


def test_corrections_are_a_table_with_pictures_that_stay(serve, export, tmp_path):
    store = tmp_path / "store"
    server = serve(export, "--store", store)
    one, two, three = (server.predict(x, f"?name={i}").json for i, x in enumerate(pictures(3)))
    assert label(server, one, "normal").status == 200
    assert label(server, two, "anomalous", defect_type="scratch").json["label"] == "anomalous"
    assert label(server, three, "anomalous").status == 200
    assert label(server, three, None).status == 200
    assert label(server, one, "anomalous", defect_type="dent 2").status == 200
    server.stop()

    server = serve(export, "--store", store)
    shown = {row["id"]: row.get("label") for row in server.get("/verdicts")["verdicts"]}
    assert shown == {one["id"]: "anomalous", two["id"]: "anomalous", three["id"]: None}
    for content in pictures(101, seed=8):
        server.predict(content)
    answer = label(server, three, "normal")
    assert answer.status == 200, "a picture that had a label stays"
    with (store / "corrections.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == "path,label,defect_type,verdict,score,sha256,id,time"
    expected = {(two["id"], "anomalous", "scratch"), (one["id"], "anomalous", "dent 2")}
    assert {(x["id"], x["label"], x["defect_type"]) for x in rows} == expected | {
        (three["id"], "normal", "")
    }
    for row in rows:
        content = (ROOT / row["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
    assert len(list((store / "pictures").iterdir())) == 100
    assert server.ask("GET", f"/verdicts/{one['id']}/picture").status == 200


def test_drift_and_verdicts_go_on_after_a_restart(serve, export, tmp_path):
    server = serve(export, "--store", tmp_path / "store")
    rows = [server.predict(x).json for x in pictures(5)]
    server.stop()
    server = serve(export, "--store", tmp_path / "store")
    assert server.get("/verdicts")["verdicts"] == rows[::-1]
    assert server.predict(GOOD).json["evidence"]["score"] > rows[-1]["evidence"]["score"] / 2
    assert server.get("/drift")["part"]["num_images"] == 6


def test_a_full_disk_costs_no_verdict(serve, export, tmp_path, detector):
    most = 200_000  # bytes of a file

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    server = serve(export, "--store", tmp_path / "store", preexec_fn=limited)
    rows = [server.predict(content).json for content in pictures(60)]
    assert rows[0]["id"]
    assert rows[-1]["id"] is None
    expected = [detector.predict(x).score for x in pictures(60)]
    assert [row["score"] for row in rows] == pytest.approx(expected, rel=1e-6)
    assert metric(server, "failures_total", what="journal") > 0
    assert [x for x in server.stderr.splitlines() if "journal" in x] == server.stderr.splitlines()
    assert len(server.stderr.splitlines()) == 1
    kept = [row["id"] for row in rows if row["id"]]
    assert [row["id"] for row in server.get("/verdicts")["verdicts"]] == kept[::-1]


# --- who may ask


def test_with_a_token_all_but_page_and_health_need_it(serve, export, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    server = serve(export, "--token-file", tmp_path / "token", "--host", "0.0.0.0")
    right = {"Authorization": "Bearer s3cret"}
    for path in ("/", "/v2/health/live", "/v2/health/ready"):
        assert server.ask("GET", path).status == 200
    for path in ("/verdicts", "/metrics", "/openapi.json", "/v2", "/v2/models/part", "/x"):
        for wrong in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
            answer = server.ask("GET", path, headers=wrong)
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert server.ask("GET", path, headers=right).status in (200, 404)
    assert server.predict(GOOD).status == 401
    assert server.ask("POST", "/predict", GOOD, KIND | right).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "127.0.0.1.evil.example:8000"}, 400),
        ({"Host": ""}, 400),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1", "Host": "localhost:1"}, 200),
    ],
)
def test_a_strange_website_cannot_use_a_browser_on_this_machine(server, headers, status):
    assert server.ask("POST", "/predict", GOOD, KIND | headers).status == status


def test_the_page_may_run_its_own_script_and_nothing_else(server):
    answer = server.ask("GET", "/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = answer.content.decode()
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "page.js" not in page


def test_the_openapi_document_names_the_bodies(server):
    paths = server.get("/openapi.json")["paths"]
    predict = paths["/predict"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "image/png", "application/octet-stream"} <= set(predict)
    infer = paths["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]
    assert "inputs" in infer["application/json"]["schema"]["properties"]
    for path in paths.values():
        for operation in path.values():
            assert "4XX" in operation["responses"]


# --- what is refused at the start


def refused(*arguments):
    command = [sys.executable, "-m", "anomaly_detection", "serve", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, cwd=ROOT, env=environment(), **options)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_what_cannot_be_served_is_refused_in_a_line(export, tmp_path):
    own = ("--detector", export)
    assert "one detector for each category" in refused(*own, export, "--port", 0)
    assert "must exist: an exported model" in refused("--detector", tmp_path, "--port", 0)
    assert "add --token-file" in refused(*own, "--host", "0.0.0.0", "--port", 0)
    assert "one word of ASCII" in refused(*own, "--token-file", tmp_path / "none")
    assert "free address of this machine" in refused(*own, "--host", "192.0.2.1")
    assert "free address of this machine" in refused(*own, "--host", "no.such.host.invalid")
    assert "must be a number of at most 65535, got '99999'" in refused(*own, "--port", 99999)
    (tmp_path / "file").write_text("")
    assert "must be" in refused(*own, "--port", 0, "--store", tmp_path / "file")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert "Address already in use" in refused(*own, "--port", port)


def test_a_detector_that_fails_its_own_check_is_not_served(tmp_path):
    folder = write_export(tmp_path / "part")
    description = json.loads((folder / "model.json").read_text())
    description["example"]["score"] += 100
    (folder / "model.json").write_text(json.dumps(description))
    assert "must give its test picture the recorded score" in refused("--detector", folder)
    description["provenance"]["category"] = "../up"
    description["example"]["score"] -= 100
    (folder / "model.json").write_text(json.dumps(description))
    assert "must be a detector of a category" in refused("--detector", folder)


def test_two_servers_cannot_have_one_store(serve, export, tmp_path):
    serve(export, "--store", tmp_path / "store")
    text = refused("--detector", export, "--port", 0, "--store", tmp_path / "store")
    assert "another process has it" in text


def test_without_its_packages_the_command_says_what_to_install(export):
    code = "import sys; sys.modules['fastapi'] = None; from anomaly_detection.cli import main; "
    code += f"main(['serve', '--detector', {str(export)!r}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    expected = "serve needs fastapi: pip install 'anomaly_detection[serve]'.\n"
    assert (done.returncode, done.stderr) == (1, expected)
