"""`anomaly-detection serve`: what each endpoint answers, in a real process."""

import base64
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
from builders.images import encoded
from builders.projects import ROOT, read_rows, wait_until
from builders.servers import KIND, Server, as_png, described, form, of_category, pictures, textures
from PIL import Image

from anomaly_detection import Detector
from anomaly_detection.cli import main

QUANTITIES = ("score", "brightness", "contrast", "sharpness")
GOOD = pictures(1)[0]
TWO_FORMS = form(GOOD)[0].replace(b"--xyz--", b"") + form(GOOD)[0]


@pytest.fixture(scope="module")
def detector(export):
    return Detector.load(export)


@pytest.fixture(scope="module")
def server(export, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server"), export) as running:
        yield running
        assert (running.stop(), running.stderr) == (0, "")


@pytest.fixture(scope="module")
def nut(newer_export, tmp_path_factory):
    return of_category(newer_export, tmp_path_factory.mktemp("exports") / "nut", "nut 2")


@pytest.fixture(scope="module")
def store(export, nut, tmp_path_factory):
    """A server of two categories with a store."""
    folder = tmp_path_factory.mktemp("store")
    with Server(folder, export, nut, "--store", folder / "store", "--limit", 50) as running:
        running.store = folder / "store"
        yield running


def defective():
    """The file of a large grey image with a white spot."""
    grey = textures(1, 6)[0, :1].repeat(3, axis=0)
    pixels = np.kron(grey, np.ones((1, 50, 50), np.uint8))  # 1600 x 1600
    pixels[:, 400:800, 400:800] = 255
    return as_png(pixels)


def has_red(image):
    pixels = np.asarray(image).astype(int)
    return bool((pixels[..., 0] - pixels[..., 1] > 100).any())


def test_a_raw_image_and_a_form_get_the_verdict_of_predict(server, detector):
    for content in pictures(3):
        expected = detector.predict(content)
        raw = server.ask("POST", "/predict?name=7", content, KIND).json
        sent = server.ask("POST", "/predict", *form(content, "part 7.png", "anything")).json
        for row, name in ((raw, "7"), (sent, "part 7.png")):
            assert row["score"] == pytest.approx(expected.score, rel=1e-6)
            assert (row["verdict"], row["p_value"]) == (expected.verdict, expected.p_value)
            assert row["sha256"] == hashlib.sha256(content).hexdigest()
            assert (row["path"], row["category"]) == (name, "part")
            assert set(row["evidence"]) == set(QUANTITIES)
        assert raw["id"] != sent["id"]
    for kind in ("image/x-anything", "application/octet-stream"):
        assert server.ask("POST", "/predict", GOOD, {"Content-Type": kind}).status == 200
    assert server.ask("POST", "/predict", GOOD).status == 200


@pytest.mark.parametrize(
    ("body", "headers", "status", "text"),
    [
        (b"", KIND, 400, "a picture must be sent"),
        (b"no image", KIND, 415, "must be a whole one of PNG, JPEG, BMP, TIFF"),
        (b"GIF89a" + bytes(40), KIND, 415, "must be a whole one of PNG, JPEG, BMP, TIFF"),
        (GOOD[: len(GOOD) // 2], KIND, 422, "must be a whole image"),
        (GOOD[:60] + bytes(8) + GOOD[68:], KIND, 422, "must be a whole image"),
        (encoded(np.zeros((8, 8), np.float32), "TIFF"), KIND, 422, "must have 8 or 16 bits"),
        (GOOD, {"Content-Type": "text/plain"}, 415, "Content-Type must be"),
        (GOOD, KIND | {"Content-Encoding": "gzip"}, 415, "must not be compressed"),
        (GOOD, {"Content-Type": "multipart/form-data"}, 400, "Missing boundary"),
        (GOOD, {"Content-Type": "multipart/form-data; boundary=x"}, 400, "the form must be"),
        (b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "have a file"),
        (TWO_FORMS, form(GOOD)[1], 400, "the form must be whole: Too many files"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_a_line(server, body, headers, status, text):
    answer = server.ask("POST", "/predict", body, headers)
    assert answer.status == status
    assert text in answer.json["error"]
    assert "\n" not in answer.json["error"]


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        ("GET /nothing", 404, "Not Found"),
        ("GET /predict", 405, "Method Not Allowed"),
        ("POST /predict?category=other", 404, "category must be one of part, got 'other'"),
        ("POST /predict?overlay=perhaps", 422, "query.overlay cannot be taken"),
        ("GET /verdicts?limit=0", 422, "query.limit cannot be taken"),
        ("GET /verdicts?limit=1e99", 422, "query.limit cannot be taken"),
        ("GET /drift?points=none", 422, "query.points cannot be taken"),
        ("GET /verdicts/1/picture", 404, "the verdict must be one that is still in the"),
        ("GET /v2/models/other", 404, "category must be one of part"),
        ("POST /v2/models/other/infer", 404, "category must be one of part"),
    ],
)
def test_every_error_has_the_same_form(server, request_, status, text):
    answer = server.ask(*request_.split())
    assert answer.status == status
    assert list(answer.json) == ["error"]
    assert text in answer.json["error"]


def test_an_id_far_beyond_those_of_the_journal_is_not_found(server):
    own = server.judge(GOOD)["id"].rpartition("-")[0]
    for number in ("9" * 18, "9" * 19, "9" * 5000, "x", "-1"):
        assert server.ask("GET", f"/verdicts/{own}-{number}/picture").status == 404


def test_several_detectors_are_told_apart_by_their_category(store, export, nut):
    assert store.line.startswith("Serving part, nut 2 at http://127.0.0.1:")
    answer = store.predict(GOOD)
    assert answer.status == 400
    assert answer.json["error"] == "category must be one of part, nut 2, but is left out."
    assert [x["category"] for x in store.get("/detectors")] == ["part", "nut 2"]
    for category, folder in (("part", export), ("nut 2", nut)):
        before = {name: x["num_images"] for name, x in store.get("/drift").items()}
        row = store.judge(GOOD, category=category)
        assert row["score"] == pytest.approx(Detector.load(folder).predict(GOOD).score, rel=1e-6)
        after = {name: x["num_images"] for name, x in store.get("/drift").items()}
        assert after == before | {category: before[category] + 1}


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


def asked(client, values, datatype, binary=True, outputs=None, **options):
    tensor = triton.InferInput("image", values.shape, datatype)
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
    coded = files if binary else np.array([base64.b64encode(x) for x in files], object)
    of_files = asked(client, coded, "BYTES", binary, outputs, request_id="7")
    of_pixels = asked(client, found, "UINT8", binary, outputs)
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
    result = asked(client, np.array([GOOD, GOOD], object), "BYTES")
    assert result.as_numpy("anomaly_map") is None
    assert server.get("/drift")["part"]["num_images"] == before + 2
    asked(client, textures(2, 5), "UINT8")
    assert server.get("/drift")["part"]["num_images"] == before + 2


def inputs(**change):
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["eA=="]} | change
    return {"inputs": [tensor]}


def pixels(*data, **change):
    return inputs(**{"datatype": "UINT8", "shape": [1, 3, SIZE, SIZE], "data": list(data)} | change)


ALL = 3 * SIZE**2


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
        (pixels(*[0.5] * ALL), "whole numbers that UINT8 has"),
        (pixels(*[256] * ALL), "whole numbers that UINT8 has"),
        (pixels(*[-1] * ALL), "whole numbers that UINT8 has"),
        (pixels(10**30), "whole numbers that UINT8 has"),
        (pixels([1], [1, 2]), "numbers in rows"),
        (pixels(*[0] * 12, shape=[1, 3, 2, 2]), "or UINT8 of shape"),
        (pixels(*[0] * ALL, datatype="UINT16"), "got UINT16"),
        (inputs() | {"outputs": [{"name": "other"}]}, "outputs must be of score, rank"),
        (inputs(parameters={"binary_data_size": 5}), "must be that of what follows"),
        (inputs(parameters={"binary_data_size": -1}), "must be that of what follows"),
    ],
)
def test_what_does_not_follow_the_protocol_is_refused(server, request_, text):
    answer = server.ask("POST", "/v2/models/part/infer", json.dumps(request_))
    assert answer.status == 400
    assert text in answer.json["error"]


@pytest.mark.parametrize(
    ("body", "length"),
    [("{", ""), ("[" * 100_000, ""), (b"\xff", ""), ("{}", "9"), ("{}", "-1"), ("", "x")],
)
def test_a_body_that_is_no_json_is_refused(server, body, length):
    headers = {"Inference-Header-Content-Length": length} if length else {}
    assert server.ask("POST", "/v2/models/part/infer", body, headers).status == 400
    assert server.ask("POST", "/verdicts/x/label", body, headers).status in (400, 422)


def test_verdicts_come_newest_first_with_their_images_and_the_anomalous_pixels_in_red(server):
    first = server.judge(defective(), overlay="true")
    second = server.judge(GOOD)
    assert first["verdict"] == "anomalous"
    kind, _, text = first.pop("overlay").partition(";base64,")
    assert kind == "data:image/jpeg"
    sent = Image.open(io.BytesIO(base64.b64decode(text)))
    assert (sent.size, has_red(sent)) == ((1024, 1024), True)
    assert server.get("/verdicts?limit=2")["verdicts"] == [second, first]
    for query, is_overlay in (("", False), ("?overlay=true", True)):
        answer = server.ask("GET", f"/verdicts/{first['id']}/picture{query}")
        shown = Image.open(io.BytesIO(answer.content))
        assert (shown.format, shown.size) == ("JPEG", (1024, 1024))
        assert has_red(shown) == is_overlay
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_other_images_are_noticed_in_drift_and_metrics(store):
    before = store.get("/drift")["part"]["num_images"]
    for content in pictures(40, 20) + [as_png(pixels // 2) for pixels in textures(80, 21)]:
        store.judge(content, category="part")
    found = store.get("/drift?points=100")["part"]
    assert (found["limit"], found["num_images"]) == (50, before + 120)
    assert {name: len(x) for name, x in found["evidence"].items()} == dict.fromkeys(QUANTITIES, 100)
    assert any(x["text"].startswith("pictures are darker") for x in found["alarms"])
    assert store.metric("drift_alarms_total", quantity="brightness", direction="down") > 0
    assert store.metric("drift_evidence", quantity="brightness", category="part") is not None
    assert store.metric("picture_brightness", category="part") == pytest.approx(0.25, abs=0.02)


def test_metrics_count_requests_and_verdicts(server):
    names = {"verdicts_total": {}, "requests_total": {"endpoint": "/predict", "status": "200"}}
    before = [server.metric(name, **labels) or 0 for name, labels in names.items()]
    server.judge(GOOD)
    server.predict(b"x")
    after = [server.metric(name, **labels) for name, labels in names.items()]
    assert np.subtract(after, before).tolist() == [1, 1]
    assert server.metric("requests_total", endpoint="/predict", status="415") >= 1
    assert server.metric("waiting") == 0
    fingerprint = server.get("/detectors")[0]["fingerprint"]
    assert server.metric("detector_info", fingerprint=fingerprint, model="patchcore") == 1
    assert server.metric("score_count", category="part") >= 1
    assert server.metric("request_seconds_count", endpoint="/predict") >= 2


def test_a_detector_is_described(server, detector, export):
    (found,) = server.get("/detectors")
    assert found["path"] == str(export)
    assert found["threshold"] == detector.threshold
    assert found["image_size"] == SIZE
    assert found["reload_error"] is None


def test_in_memory_old_verdicts_and_images_are_forgotten(client, server):
    first = server.judge(GOOD)["id"]
    for _ in range(17):
        asked(client, np.array([GOOD] * 64, object), "BYTES")
    oldest = f"/verdicts/{first}/picture"
    wait_until(lambda: "still in the journal" in server.ask("GET", oldest).json["error"])
    assert len(server.get("/verdicts?limit=1000")["verdicts"]) == 1000
    name, _, last = server.get("/verdicts?limit=1")["verdicts"][0]["id"].rpartition("-")
    assert server.ask("GET", f"/verdicts/{name}-{int(last) - 99}/picture").status == 200
    answer = server.ask("GET", f"/verdicts/{name}-{int(last) - 100}/picture")
    assert answer.json["error"] == "this verdict's picture is no longer kept."


def test_labels_need_a_store(server):
    answer = server.label(server.judge(GOOD), label="normal")
    assert answer.status == 409
    assert "start the server with --store" in answer.json["error"]


def test_a_wrong_label_is_refused(store):
    row = store.judge(GOOD, category="part")
    for values in (
        {},
        {"label": 5},
        {"label": "bad"},
        *({"label": "anomalous", "defect_type": kind} for kind in ("../up", "a\nb", "x" * 101)),
        {"label": "normal", "defect_type": "scratch"},
        {"label": "normal", "other": 1},
        {"label": "\ud800"},
    ):
        assert store.label(row, **values).status == 422, values
    assert not (store.store / "corrections.csv").exists()


def test_corrections_verdicts_and_drift_stay_after_a_restart(serve, export, tmp_path):
    folder = tmp_path / "store"
    server = serve(export, "--store", folder)
    one, two, three = given = [server.judge(x, name=str(i)) for i, x in enumerate(pictures(3))]
    assert server.label(one, label="normal").status == 200
    answer = server.label(two, label="anomalous", defect_type="scratch")
    assert answer.json["label"] == "anomalous"
    assert server.label(three, label="anomalous").status == 200
    assert server.label(three, label=None).status == 200
    assert server.label(one, label="anomalous", defect_type="dent 2").status == 200
    server.stop()

    server = serve(export, "--store", folder)
    rows = server.get("/verdicts")["verdicts"]
    assert [row.get("label") for row in rows] == [None, "anomalous", "anomalous"]
    for row, known in zip(rows, given[::-1], strict=True):
        assert row.items() >= known.items()
    assert server.judge(GOOD)["evidence"]["score"] > three["evidence"]["score"] / 2
    assert server.get("/drift")["part"]["num_images"] == 4
    for content in pictures(101, seed=8):
        server.judge(content)
    assert server.label(three, label="normal").status == 200, "an image that had a label stays"
    kept = read_rows(folder / "corrections.csv")
    assert ",".join(kept[0]) == "path,label,defect_type,verdict,score,sha256,id,time"
    assert {(x["id"], x["label"], x["defect_type"]) for x in kept} == {
        (two["id"], "anomalous", "scratch"),
        (one["id"], "anomalous", "dent 2"),
        (three["id"], "normal", ""),
    }
    for row in kept:
        content = (ROOT / row["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
    assert len(list((folder / "pictures").iterdir())) == 100
    assert server.ask("GET", f"/verdicts/{one['id']}/picture").status == 200


def test_a_full_disk_costs_no_verdict(serve, export, tmp_path, detector):
    most = 200_000  # bytes of a file

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    server = serve(export, "--store", tmp_path / "store", preexec_fn=limited)
    rows = [server.judge(content) for content in pictures(60)]
    assert rows[0]["id"]
    assert rows[-1]["id"] is None
    expected = [detector.predict(x).score for x in pictures(60)]
    assert [row["score"] for row in rows] == pytest.approx(expected, rel=1e-6)
    assert server.metric("failures_total", what="journal") > 0
    (said,) = server.stderr.splitlines()
    assert "journal" in said
    kept = [row["id"] for row in rows if row["id"]]
    assert [row["id"] for row in server.get("/verdicts")["verdicts"]] == kept[::-1]


def test_with_a_token_all_but_page_and_health_need_it(serve, export, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    server = serve(export, "--token-file", tmp_path / "token", "--host", "0.0.0.0")
    open_to_all = ["/", "/v2/health/live", "/v2/health/ready"]
    right = {"Authorization": "Bearer s3cret"}
    names = server.ask("GET", "/openapi.json", headers=right).json["paths"]
    for path in {*names, "/metrics", "/openapi.json", "/x", *open_to_all}:
        for wrong in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
            answer = server.ask("GET", path, headers=wrong)
            assert answer.status == (200 if path in open_to_all else 401), path
            assert answer.headers["WWW-Authenticate"] == (None if path in open_to_all else "Bearer")
        assert server.ask("GET", path, headers=right).status in (200, 404, 405)
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
    for operations in paths.values():
        assert all("4XX" in operation["responses"] for operation in operations.values())


def refused(*arguments):
    """What the command says in place of serving."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, arguments)])
    assert "\n" not in ended.value.code
    return ended.value.code


def test_what_cannot_be_served_is_refused_in_a_line(store, export, tmp_path):
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
    assert "another process has it" in refused(*own, "--port", 0, "--store", store.store)
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "Address already in use" in refused(*own, "--port", other.getsockname()[1])


def test_a_detector_that_fails_its_own_check_is_not_served(export, tmp_path):
    example = json.loads((export / "model.json").read_text())["example"]
    example["score"] += 100
    wrong = described(export, tmp_path / "wrong", example=example)
    text = refused("--detector", wrong, "--port", 0)
    assert "must give its test picture the recorded score" in text
    unnamed = of_category(export, tmp_path / "unnamed", "../up")
    assert "must be a detector of a category" in refused("--detector", unnamed, "--port", 0)


def test_without_its_packages_the_command_says_what_to_install(export):
    code = "import sys; sys.modules['fastapi'] = None; from anomaly_detection.cli import main; "
    code += f"main(['serve', '--detector', {str(export)!r}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    expected = "serve needs fastapi: pip install 'anomaly_detection[serve]'.\n"
    assert (done.returncode, done.stderr) == (1, expected)
