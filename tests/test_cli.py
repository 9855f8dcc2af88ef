"""`anomaly-detection predict`, as a user calls it."""

import csv
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders.detectors import pictures, small_detector
from builders.images import write_image
from builders.projects import wait_until
from PIL import Image

from anomaly_detection import Detector
from anomaly_detection.cli import main
from anomaly_detection.errors import DataError
from anomaly_detection.export import export_detector
from anomaly_detection.inference import save_detector
from anomaly_detection.inference.files import find_images
from anomaly_detection.inference.overlay import FAINTEST, STRONGEST, overlay
from anomaly_detection.inference.runtimes import Outputs

NAMES = ["good/0.png", "good/1.png", "scratch/3.jpg", "scratch/deep/2.PNG"]
PATHS = [f"parts/{name}" for name in NAMES]


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    path, content = tmp_path_factory.mktemp("detectors") / "part.pt", small_detector()
    save_detector(path, **content | {"threshold": max(content["calibration_scores"])})
    return path


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "part"
    export_detector(detector, ["onnx"], folder, pictures(0))
    return folder


@pytest.fixture(autouse=True)
def parts(tmp_path, monkeypatch) -> None:
    """Two normal images, a defective one and a damaged one, in folders of the working directory."""
    monkeypatch.chdir(tmp_path)
    first, second, bad = np.moveaxis(pictures(3, seed=5), 1, -1)
    bad[10:20, 10:20] = 255
    for path, image in zip((*PATHS[:2], PATHS[3]), (first, second, bad), strict=True):
        write_image(Path(path), image)
    Path(PATHS[2]).write_bytes(b"no picture")
    Path("parts/scratch/notes.txt").write_text("")


def predict(*arguments) -> int | str:
    """The exit status, or the message of status 1."""
    with pytest.raises(SystemExit) as exit_:
        main(["predict", *map(str, arguments)])
    return exit_.value.code


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def started(*arguments) -> subprocess.Popen:
    """As from a terminal: a shell's background jobs ignore Ctrl-C, and so would their children."""
    return subprocess.Popen(
        [sys.executable, "-m", "anomaly_detection", "predict", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_rows_have_what_the_detector_finds_in_the_order_of_the_images(detector, capsys):
    assert predict("--detector", detector, "parts") == 1
    captured = capsys.readouterr()
    rows, loaded = rows_of(captured.out), Detector.load(detector)
    assert [row["path"] for row in rows] == PATHS
    damaged = rows.pop(2)
    assert damaged["error"].startswith("parts/scratch/3.jpg: must be a whole image")
    assert damaged["score"] == damaged["verdict"] == damaged["p_value"] == ""
    for row in rows:
        expected = loaded.predict(row["path"])
        assert np.float32(row["score"]) == np.float32(expected.score)
        assert np.float32(row["threshold"]) == np.float32(expected.threshold)
        assert row["verdict"] == expected.verdict
        assert float(row["p_value"]) == expected.p_value
        assert row["error"] == ""
    assert [row["verdict"] for row in rows] == ["normal", "normal", "anomalous"]
    assert captured.err.splitlines()[-1].startswith("4 images, 1 anomalous, 1 not read, in ")


def test_json_lines_say_the_same_as_csv(detector, capsys):
    assert predict("--detector", detector, "parts", "--output", "new/found.jsonl") == 1
    lines = [json.loads(line) for line in Path("new/found.jsonl").read_text().splitlines()]
    predict("--detector", detector, "parts")
    texts = [{key: "" if x is None else str(x) for key, x in line.items()} for line in lines]
    assert texts == rows_of(capsys.readouterr().out)


def test_files_folders_patterns_and_a_list_are_found():
    found = find_images(["parts/good/1.png", "parts/**/?.png", "-", "gone.png", "no*.png"], ["a\n"])
    expected = ["parts/good/1.png", "parts/good/0.png", "parts/good/1.png"]
    assert list(found) == [*expected, "a", "gone.png", "no*.png"]


@pytest.mark.parametrize(
    ("images", "options", "status"),
    [
        ("parts/good", [], 0),
        ("parts/good", ["--fail-on-anomaly"], 0),
        ("parts/scratch/deep", [], 0),
        ("parts/scratch/deep", ["--fail-on-anomaly"], 2),
        ("parts/scratch", ["--fail-on-anomaly"], 1),
    ],
)
def test_the_exit_status_says_what_was_found(detector, images, options, status):
    assert predict("--detector", detector, images, *options) == status


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--detector", "gone.pt", "a.png"], "gone.pt must be a detector, but there is no such"),
        (["--detector", "a.pt", "a.png", "--batch-size", "0"], "above 0, got '0'"),
        (["--detector", "a.pt", "a.png", "--format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, text):
    message = predict(*arguments)
    assert text in message
    assert "\n" not in message


def test_a_users_mistake_ends_the_process_with_one_line_and_status_1():
    process = started("a.png")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "the following arguments are required: --detector" in errors
    assert errors.count("\n") == 1


def test_a_file_that_cannot_be_written_is_one_line(detector):
    Path("taken").write_text("")
    for options in (["--output", "taken/a.csv"], ["--overlays", "taken"], ["--maps", "taken"]):
        message = predict("--detector", detector, "parts/good", *options)
        assert message.startswith("taken")
        assert "must be writable: " in message


def test_the_former_file_is_replaced_by_a_whole_one(detector):
    Path("found.csv").write_text("before")
    predict("--detector", detector, "parts/good", "--output", "found.csv")
    assert len(rows_of(Path("found.csv").read_text())) == 2
    assert not Path("found.csv.partial").exists()


def test_an_interrupted_run_keeps_its_rows_and_the_former_file(exported):
    Path("found.csv").write_text("before")
    process = started("--detector", exported, "--threads", 1, "--output", "found.csv", "-")
    process.stdin.write("parts/good/0.png\n" * 20)
    process.stdin.flush()
    partial = Path("found.csv.partial")
    wait_until(lambda: partial.exists() and len(partial.read_text().splitlines()) > 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "found.csv.partial has the rows so far."
    assert Path("found.csv").read_text() == "before"
    assert rows_of(partial.read_text())[-1]["verdict"]


def test_a_reader_who_has_seen_enough_is_no_error(exported):
    process = started("--detector", exported, *["parts/good"] * 50)
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stdin.close()
    process.wait()


def test_an_export_judges_a_list_without_pytorch_and_gives_the_same_rows(
    detector, exported, capsys
):
    heavy = ["torch", "scipy", "sklearn", "matplotlib", "pydantic", "timm"]
    code = (
        "import atexit, sys; from anomaly_detection.cli import main\n"
        f"atexit.register(lambda: print([x for x in {heavy} if x in sys.modules]))\n"
        f"main(['predict', '--detector', {str(exported)!r}, '-', '--overlays', 'red'])"
    )
    images = [*reversed(PATHS), "gone.png"]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input="\n".join(images), capture_output=True, text=True)
    assert done.returncode == 1
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    rows = rows_of("\n".join(lines))
    assert [row["path"] for row in rows] == images
    assert rows[-1]["error"] == "gone.png: must be readable: No such file or directory."
    predict("--detector", detector, *images)
    for ours, theirs in zip(rows, rows_of(capsys.readouterr().out), strict=True):
        if ours["score"]:
            assert float(ours["score"]) == pytest.approx(float(theirs["score"]), abs=1e-3)
        for key in ("path", "verdict", "p_value", "error"):
            assert ours[key] == theirs[key]


def with_runtime(run) -> Detector:
    content = {"threshold": 0.5, "calibration_scores": [0.1], "parameters": {}, "provenance": {}}
    return Detector(content | {"preprocessing": {"image_size": 4, "bit_depth": 16}}, run)


def mean_of(images: np.ndarray) -> Outputs:
    score = images.mean(axis=(1, 2, 3)).astype(np.float32)
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


def test_a_damaged_file_does_not_change_its_neighbours():
    detector = with_runtime(mean_of)
    for batch_size in (1, 2, 3, 10):
        found = list(detector.predict_many(PATHS * 3, batch_size=batch_size))
        assert [isinstance(x, DataError) for x in found] == [False, False, True, False] * 3
        assert found[3].score == detector.predict(PATHS[3]).score
    assert list(detector.predict_many([])) == []


def test_maps_and_overlays_are_written_for_each_image(detector):
    predict("--detector", detector, "parts", "--maps", "maps", "--overlays", "red")
    loaded = Detector.load(detector)
    for path in (PATHS[0], PATHS[3]):
        prediction = loaded.predict(path)
        found = np.load(f"maps/{path}.npy")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, prediction.anomaly_map)
        pixels = np.asarray(Image.open(path))
        changed = (np.asarray(Image.open(f"red/{path}.png")) != pixels).any(axis=2)
        np.testing.assert_array_equal(changed, prediction.anomaly_map > prediction.threshold)
        assert changed.any() == (path == PATHS[3])
    assert len([path for path in Path("red").rglob("*") if path.is_file()]) == 3


def test_files_outside_of_the_folder_stay_apart(detector, monkeypatch):
    monkeypatch.chdir("parts")
    outside = ["../parts/good/0.png", Path("good/1.png").absolute()]
    predict("--detector", detector, *outside, "--maps", "m")
    found = {path.relative_to("m").as_posix() for path in Path("m").rglob("*.npy")}
    assert found == {"parts/good/0.png.npy", f"{str(Path.cwd())[1:]}/good/1.png.npy"}


def test_an_overlay_by_hand():
    """Opacity grows from the threshold to the highest value; the picture keeps its size."""
    anomaly_map = np.array([[0, 1], [2, 3]], dtype=np.float32)
    grey = np.full((2, 2), 100, np.uint8)

    def red(opacity):
        rest = round(100 * (1 - opacity))
        return [round(100 * (1 - opacity) + 255 * opacity), rest, rest]

    found = np.asarray(overlay(grey, anomaly_map, 1.0))
    middle = (FAINTEST + STRONGEST) / 2
    assert found.tolist() == [[[100] * 3, [100] * 3], [red(middle), red(STRONGEST)]]
    assert overlay(np.zeros((30, 50, 3), np.uint8), anomaly_map, 1.0).size == (50, 30)
    np.testing.assert_array_equal(overlay(grey, anomaly_map, 3.0), np.full((2, 2, 3), 100))
