"""`anomaly-detection predict`, as a user calls it."""

import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_image
from PIL import Image

from anomaly_detection import Detector, models
from anomaly_detection.cli import main
from anomaly_detection.errors import DataError
from anomaly_detection.export import export_detector
from anomaly_detection.inference import save_detector
from anomaly_detection.inference.files import find_images
from anomaly_detection.inference.overlay import FAINTEST, STRONGEST, overlay
from anomaly_detection.inference.runtimes import Outputs
from anomaly_detection.models import snapshot

SIZE = 64


def textures(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(128, 30, (count, 3, SIZE, SIZE)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    parameters = models.parameters("patchcore")(backbone="test_resnet", weights="random")
    torch.manual_seed(0)
    model = models.spec("patchcore").build(parameters).eval()
    with torch.no_grad():
        patches = model.extract(torch.from_numpy(textures(4, 0)))
        model.bank = patches.permute(0, 2, 3, 1).flatten(0, 2)[::5]
        model.standardise([{"image": torch.from_numpy(textures(8, 1))}], torch.device("cpu"))
        scores = model(torch.from_numpy(textures(9, 2)))["pred_score"]
    path = tmp_path_factory.mktemp("detectors") / "part.pt"
    save_detector(
        path,
        model=snapshot("patchcore", model),
        threshold=float(scores.max()),
        calibration_scores=scores.tolist(),
        preprocessing={"bit_depth": 16, "image_size": SIZE},
        precision="float32",
        parameters={},
        provenance={},
    )
    return path


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "part"
    export_detector(detector, ["onnx"], folder, textures(0, 0))
    return folder


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """Two normal images, a defective one and a damaged one, in folders; the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = Path("parts")
    for i, picture in enumerate(textures(2, 5)):
        write_image(folder / "good" / f"{i}.png", np.moveaxis(picture, 0, -1))
    bad = np.moveaxis(textures(1, 6)[0], 0, -1).copy()
    bad[20:40, 20:40] = 255
    write_image(folder / "scratch" / "deep" / "2.PNG", bad)
    (folder / "scratch" / "3.jpg").write_bytes(b"no picture")
    (folder / "scratch" / "notes.txt").write_text("")
    return folder


ORDER = ["good/0.png", "good/1.png", "scratch/3.jpg", "scratch/deep/2.PNG"]


def predict(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["predict", *map(str, arguments)])
    return exit_.value.code


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def started(*arguments, **options) -> subprocess.Popen:
    """As from a terminal: a shell's background jobs ignore Ctrl-C, and so would their children."""
    command = [sys.executable, "-m", "anomaly_detection", "predict", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def test_rows_have_what_the_detector_finds_in_the_order_of_the_images(detector, pictures, capsys):
    assert predict("--detector", detector, pictures) == 1
    captured = capsys.readouterr()
    rows = rows_of(captured.out)
    assert [row["path"] for row in rows] == [f"parts/{name}" for name in ORDER]
    loaded = Detector.load(detector)
    for row in rows:
        if row["path"].endswith("3.jpg"):
            assert row["error"].startswith("parts/scratch/3.jpg: must be a whole image")
            assert row["score"] == row["verdict"] == row["p_value"] == ""
            continue
        expected = loaded.predict(row["path"])
        assert np.float32(row["score"]) == np.float32(expected.score)
        assert np.float32(row["threshold"]) == np.float32(expected.threshold)
        assert row["verdict"] == expected.verdict
        assert float(row["p_value"]) == expected.p_value
        assert row["error"] == ""
    assert rows[3]["verdict"] == "anomalous"
    assert captured.err.splitlines()[-1].startswith("4 images, 1 anomalous, 1 not read, in ")


def test_files_folders_patterns_and_a_list_are_found(pictures):
    found = find_images(["parts/good/1.png", "parts/**/?.png", "-", "gone.png", "no*.png"], ["a\n"])
    expected = ["good/1.png", "good/0.png", "good/1.png"]
    assert list(found) == [*(f"parts/{name}" for name in expected), "a", "gone.png", "no*.png"]


def test_a_list_comes_from_standard_input(detector, pictures):
    process = started("--detector", detector, "-", stdin=subprocess.PIPE)
    out, _ = process.communicate("parts/good/1.png\ngone.png\nparts/good/0.png\n")
    rows = rows_of(out)
    assert [row["path"] for row in rows] == ["parts/good/1.png", "gone.png", "parts/good/0.png"]
    assert rows[1]["error"] == "gone.png: must be readable: No such file or directory."
    assert process.returncode == 1


def test_json_lines_say_the_same_as_csv(detector, pictures, capsys):
    assert predict("--detector", detector, pictures, "--output", "new/found.jsonl") == 1
    lines = [json.loads(line) for line in Path("new/found.jsonl").read_text().splitlines()]
    predict("--detector", detector, pictures)
    for line, row in zip(lines, rows_of(capsys.readouterr().out), strict=True):
        assert {key: "" if x is None else str(x) for key, x in line.items()} == row


@pytest.mark.parametrize(
    ("images", "options", "status"),
    [
        (["parts/good"], [], 0),
        (["parts/good"], ["--fail-on-anomaly"], 0),
        (["parts/scratch/deep"], [], 0),
        (["parts/scratch/deep"], ["--fail-on-anomaly"], 2),
        (["parts/scratch"], ["--fail-on-anomaly"], 1),
    ],
)
def test_the_exit_status_says_what_was_found(detector, pictures, images, options, status):
    assert predict("--detector", detector, *images, *options) == status


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--detector", "gone.pt", "a.png"], "gone.pt must be a detector, but there is no such"),
        (["a.png"], "the following arguments are required: --detector"),
        (["--detector", "a.pt", "a.png", "--batch-size", "0"], "above 0, got '0'"),
        (["--detector", "a.pt", "a.png", "--format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_1(arguments, text):
    process = started(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert text in errors
    assert len(errors.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_one_line(detector, pictures, capsys):
    Path("taken").write_text("")
    for options in (["--output", "taken/a.csv"], ["--overlays", "taken"], ["--maps", "taken"]):
        message = predict("--detector", detector, "parts/good", *options)
        assert message.startswith("taken")
        assert "must be writable: " in message


def test_the_former_file_is_replaced_by_a_whole_one(detector, pictures):
    Path("found.csv").write_text("before")
    predict("--detector", detector, "parts/good", "--output", "found.csv")
    assert len(rows_of(Path("found.csv").read_text())) == 2
    assert not Path("found.csv.partial").exists()


def test_an_interrupted_run_keeps_its_rows_and_the_former_file(detector, pictures):
    Path("found.csv").write_text("before")
    options = ["--threads", 1, "--output", "found.csv", "-"]
    process = started("--detector", detector, *options, stdin=subprocess.PIPE)
    process.stdin.write("parts/good/0.png\n" * 20)
    process.stdin.flush()
    partial = Path("found.csv.partial")
    for _ in range(600):
        if partial.exists() and len(partial.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "found.csv.partial has the rows so far."
    assert Path("found.csv").read_text() == "before"
    assert rows_of(partial.read_text())[-1]["verdict"]


def test_a_reader_who_has_seen_enough_is_no_error(detector, pictures):
    process = started("--detector", detector, *["parts/good"] * 50)
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait()


def test_an_export_is_judged_without_pytorch_and_gives_the_same_rows(detector, exported, pictures):
    heavy = ["torch", "scipy", "sklearn", "matplotlib", "pydantic", "timm"]
    code = (
        "import atexit, sys; from anomaly_detection.cli import main\n"
        f"atexit.register(lambda: print([x for x in {heavy} if x in sys.modules]))\n"
        f"main(['predict', '--detector', {str(exported)!r}, 'parts', '--overlays', 'red'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    process = started("--detector", detector, "parts")
    expected = rows_of(process.communicate()[0])
    for ours, theirs in zip(rows_of("\n".join(lines)), expected, strict=True):
        if ours["score"]:
            assert float(ours["score"]) == pytest.approx(float(theirs["score"]), abs=1e-3)
        for key in ("path", "verdict", "p_value", "error"):
            assert ours[key] == theirs[key]


# Streams.


def with_runtime(run) -> Detector:
    content = {"threshold": 0.5, "calibration_scores": [0.1], "parameters": {}, "provenance": {}}
    return Detector(content | {"preprocessing": {"image_size": 4, "bit_depth": 16}}, run)


def mean_of(pictures: np.ndarray) -> Outputs:
    score = pictures.mean(axis=(1, 2, 3)).astype(np.float32)
    return Outputs(score, (score <= 0.1).astype(np.int64), score > 0.5)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_stream_takes_a_few_images_ahead_and_keeps_none(batch_size):
    taken = 0

    def images():
        nonlocal taken
        for i in range(100_000):
            taken += 1
            yield np.full((4, 4), i % 200, np.uint8)

    found = with_runtime(mean_of).predict_many(images(), batch_size=batch_size, num_threads=2)
    for i in range(1000):
        assert next(found).score == i % 200
        assert taken <= i + 4 + 2 * batch_size
    found.close()


def test_a_damaged_file_does_not_change_its_neighbours(pictures):
    files = [f"parts/{name}" for name in ORDER]
    detector = with_runtime(mean_of)
    for batch_size in (1, 2, 3, 10):
        found = list(detector.predict_many(files * 3, batch_size=batch_size))
        assert [isinstance(x, DataError) for x in found] == [False, False, True, False] * 3
        assert found[3].score == detector.predict(files[3]).score
    assert list(detector.predict_many([])) == []


# Pictures.


def test_maps_and_overlays_are_written_for_each_image(detector, pictures):
    predict("--detector", detector, pictures, "--maps", "maps", "--overlays", "red")
    loaded = Detector.load(detector)
    for name in (ORDER[0], ORDER[3]):
        prediction = loaded.predict(pictures / name)
        found = np.load(f"maps/parts/{name}.npy")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, prediction.anomaly_map)
        pixels = np.asarray(Image.open(pictures / name))
        changed = (np.asarray(Image.open(f"red/parts/{name}.png")) != pixels).any(axis=2)
        np.testing.assert_array_equal(changed, prediction.anomaly_map > prediction.threshold)
    assert len([path for path in Path("red").rglob("*") if path.is_file()]) == 3


def test_files_outside_of_the_folder_stay_apart(detector, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    predict(
        "--detector", detector, "../parts/good/0.png", Path("good/1.png").absolute(), "--maps", "m"
    )
    found = {path.relative_to("m").as_posix() for path in Path("m").rglob("*.npy")}
    assert found == {"parts/good/0.png.npy", f"{str(Path.cwd())[1:]}/good/1.png.npy"}


def test_an_overlay_by_hand():
    """Opacity grows from the threshold to the highest value; the picture keeps its size."""
    anomaly_map = np.array([[0, 1], [2, 3]], dtype=np.float32)
    grey = np.full((2, 2), 100, np.uint8)
    found = np.asarray(overlay(grey, anomaly_map, 1.0))
    middle = (FAINTEST + STRONGEST) / 2

    def red(opacity):
        rest = round(100 * (1 - opacity))
        return [round(100 * (1 - opacity) + 255 * opacity), rest, rest]

    assert found.tolist() == [[[100] * 3, [100] * 3], [red(middle), red(STRONGEST)]]
    assert overlay(np.zeros((30, 50, 3), np.uint8), anomaly_map, 1.0).size == (50, 30)
    np.testing.assert_array_equal(overlay(grey, anomaly_map, 3.0), np.full((2, 2, 3), 100))
