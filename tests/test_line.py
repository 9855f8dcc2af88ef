"""What the line stands on: statistics of pictures, test pictures, monitors, the journal."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from builders.detectors import pictures, small_detector, write_detector, write_export
from builders.images import write_category
from PIL import Image, ImageFilter

from anomaly_detection import Detector
from anomaly_detection.data import PreparedArrays
from anomaly_detection.data.frame import Frame
from anomaly_detection.data.prepare import prepare_category
from anomaly_detection.errors import DataError, UserError
from anomaly_detection.inference import DetectorError, save_detector, statistics_of_images
from anomaly_detection.inference.statistics import statistics_of
from anomaly_detection.line.journal import Journal
from anomaly_detection.line.monitor import LineMonitor
from anomaly_detection.line.station import Station

# --- statistics of pictures


def test_statistics_by_hand():
    tile = np.zeros((3, 2, 2), np.uint8)
    tile[:, :, 1] = 255  # black on the left, white on the right
    brightness, contrast, sharpness = statistics_of([tile], Frame())
    assert (brightness, contrast) == (0.5, 0.5)
    assert sharpness == pytest.approx(np.sqrt(2 / 4) / 0.5, abs=1e-6)  # 2 of 4 steps are 1


def test_a_constant_picture_has_no_contrast_and_no_sharpness():
    assert statistics_of([np.full((3, 8, 8), 51, np.uint8)], Frame()) == (0.2, 0, 0)


def test_exposure_leaves_sharpness_and_blur_leaves_brightness():
    (sharp,) = pictures(1, level=100)
    before = statistics_of([sharp], Frame())
    half = statistics_of([(sharp // 2).astype(np.uint8)], Frame())
    assert half.brightness == pytest.approx(before.brightness / 2, rel=0.02)
    assert half.contrast == pytest.approx(before.contrast / 2, rel=0.02)
    assert half.sharpness == pytest.approx(before.sharpness, rel=0.02)
    image = Image.fromarray(np.moveaxis(sharp, 0, -1)).filter(ImageFilter.GaussianBlur(1))
    blurred = statistics_of([np.moveaxis(np.asarray(image), -1, 0)], Frame())
    assert blurred.brightness == pytest.approx(before.brightness, rel=0.02)
    assert blurred.sharpness < 0.6 * before.sharpness


def test_what_is_not_judged_does_not_count():
    (tile,) = pictures(1)
    judged = np.zeros((1, *tile.shape[1:]), np.uint8)
    judged[:, :16] = 255
    other = tile.copy()
    other[:, 16:] = 255
    frame = Frame(mask=np.eye(4))
    found = [statistics_of([np.concatenate([x, judged])], frame) for x in (tile, other)]
    assert found[0] == found[1] == statistics_of([tile[:, :16]], Frame())


def test_16_bits_have_the_statistics_of_8():
    (tile,) = pictures(1)
    deep = Frame(format=Frame().format._replace(dtype="uint16"))
    found = statistics_of([tile.astype(np.uint16) * np.uint16(257)], deep)
    assert found == pytest.approx(statistics_of([tile], Frame()), abs=2e-6)


@pytest.mark.parametrize("options", [{}, {"tile_size": 32, "tile_overlap": 8}])
def test_a_picture_has_the_statistics_of_its_prepared_array(tmp_path, options):
    """So that those of the line can be compared with the fit images'."""
    write_category(tmp_path / "data" / "widget")
    out = tmp_path / "prepared"
    prepare_category(
        *(tmp_path / "data", "widget", out),
        **{"image_size": 32, "bit_depth": 16, "seed": 0, "layout": "auto", **options},
        **{"validation_fraction": 0.2, "calibration_fraction": 0.2, "test_fraction": 0.2},
    )
    arrays = PreparedArrays(out, "fit")
    known = statistics_of_images(arrays)
    assert {len(values) for values in known.values()} == {len(arrays.rows)}
    content = small_detector(preprocessing=arrays.preprocessing(16))
    save_detector(tmp_path / "part.pt", **content)
    detector = Detector.load(tmp_path / "part.pt")
    for i, row in enumerate(arrays.rows[:3]):
        found = detector.predict(tmp_path / "data" / "widget" / row["path"]).statistics
        assert found == tuple(values[i] for values in known.values())


# --- a detector's test picture


def test_a_detector_passes_its_own_check_and_so_does_its_export(tmp_path):
    Detector.load(write_export(tmp_path / "part")).check()
    Detector.load(tmp_path / "part.pt").check()


def test_another_detector_s_weights_do_not_pass(tmp_path):
    content = small_detector() | {"model": small_detector(seed=1)["model"]}
    save_detector(tmp_path / "part.pt", **content)
    with pytest.raises(DetectorError, match="must give its test picture the recorded score"):
        Detector.load(tmp_path / "part.pt").check()


def test_a_detector_without_a_test_picture_does_not_pass(tmp_path):
    detector = Detector.load(write_detector(tmp_path / "part.pt", example=None))
    with pytest.raises(DetectorError, match="make it again with `dvc repro`"):
        detector.check()


def test_bytes_are_judged_like_their_file(tmp_path):
    detector = Detector.load(write_export(tmp_path / "part"))
    (planes,) = pictures(1, seed=5)
    Image.fromarray(np.moveaxis(planes, 0, -1)).save(tmp_path / "x.png")
    expected = detector.predict(tmp_path / "x.png")
    found = detector.predict((tmp_path / "x.png").read_bytes())
    assert found[:4] == expected[:4]
    assert np.array_equal(found.anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize("format", ["onnx", "openvino", "pt"])
def test_several_threads_get_the_verdicts_of_one(tmp_path, format):
    from anomaly_detection.export import export_detector

    path = write_detector(tmp_path / "part.pt")
    if format != "pt":
        export_detector(path, [format], tmp_path / "part", pictures(1))
        path = tmp_path / "part"
    detector = Detector.load(path, num_streams=4)
    images = [np.moveaxis(x, 0, -1) for x in pictures(64, seed=3)]
    expected = [detector.predict(image).score for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = [x.score for x in pool.map(detector.predict, images)]
    assert found == pytest.approx(expected, rel=1e-5)


# --- monitors and stations


@pytest.fixture
def detector(tmp_path) -> Detector:
    return Detector.load(write_detector(tmp_path / "part.pt"))


def values_of(detector: Detector, count: int, seed: int = 0, **shifts: float) -> list[dict]:
    """Drawn from what the detector knows, each quantity moved by its own standard deviations."""
    rng = np.random.default_rng(seed)
    known = {"score": detector.calibration_scores, **detector.fit_statistics}
    drawn = {
        name: rng.normal(np.mean(x), np.std(x), count) + shifts.get(name, 0) * np.std(x)
        for name, x in known.items()
    }
    return [{name: float(x[i]) for name, x in drawn.items()} for i in range(count)]


@pytest.mark.parametrize(
    ("shifts", "texts"),
    [
        ({"score": 3}, ["scores are higher", "look at the parts first"]),
        ({"score": -3}, ["scores are lower", "defects may be missed"]),
        ({"score": 3, "sharpness": -4}, ["scores are higher", "sharpness down", "camera"]),
        ({"brightness": -3}, ["pictures are darker"]),
        ({"contrast": 3}, ["more contrast"]),
        ({"sharpness": -3}, ["less sharp", "focus"]),
    ],
)
def test_an_alarm_says_where_to_look(detector, shifts, texts):
    monitor = LineMonitor(detector, limit=100_000)
    for values in values_of(detector, 200):
        assert monitor.add(values)[1] == []
    alarms = [x for values in values_of(detector, 100, 1, **shifts) for x in monitor.add(values)[1]]
    first = next(alarm for alarm in alarms if alarm.quantity == next(iter(shifts)))
    assert all(text in first.text for text in texts)


def test_a_monitor_goes_on_from_its_state(detector, tmp_path):
    whole = LineMonitor(detector, limit=1000)
    first = values_of(detector, 300) + values_of(detector, 50, 1, brightness=2)
    for values in first:
        whole.add(values)
    other = LineMonitor(detector, limit=1000)
    other.restore(json.loads(json.dumps(whole.state)), first)
    for values in values_of(detector, 50, 2, score=2):
        (found, _), (expected, _) = other.add(values), whole.add(values)
        assert found == pytest.approx(expected, rel=0.02)  # ties are broken at random


def test_a_station_writes_the_verdict_and_goes_on_with_drift_after_a_restart(detector, tmp_path):
    (planes,) = pictures(1, seed=5)
    found = detector.predict(np.moveaxis(planes, 0, -1))
    journal = Journal(tmp_path / "journal")
    rows = [Station(detector, journal).record(found, "a.png", "hash") for _ in range(3)]
    journal.close()
    journal = Journal(tmp_path / "journal")
    assert [entry.row for entry in journal.latest(5)] == rows[::-1]
    assert len({row["id"] for row in rows}) == 3
    assert Station(detector, journal).monitor.num_images == 3
    threshold = write_detector(tmp_path / "other.pt", threshold=1.0)
    assert Station(Detector.load(threshold), journal).monitor.num_images == 0


def test_a_picture_that_cannot_be_read_has_a_row_and_no_part_in_drift(detector, tmp_path):
    station = Station(detector, Journal())
    row = station.record(DataError("a.png: must be a whole image"), "a.png", "hash")
    assert row["error"] == "a.png: must be a whole image"
    assert row["score"] is None
    assert row["evidence"] == {}
    assert station.monitor.num_images == 0


def test_what_cannot_be_written_leaves_no_trace_in_the_journal(detector):
    journal = Journal()

    def write() -> None:
        with journal.transaction():
            journal.note_drift("x", {}, None)
            journal.add({"score": float("nan")})

    with pytest.raises(ValueError, match="JSON compliant"):
        write()
    assert journal.latest(5) == []
    assert journal.drift_of("x") is None
    with journal.transaction():
        journal.add({"score": 1.0})
    assert len(journal.latest(5)) == 1


def test_who_waits_for_entries_gets_them(tmp_path):
    journal, got = Journal(), []
    waiter = threading.Thread(target=lambda: got.extend(journal.after(0, 5, wait=30)))
    waiter.start()
    with journal.transaction():
        journal.add({"path": "a.png"})
    waiter.join(10)
    assert [entry.row["path"] for entry in got] == ["a.png"]


def test_a_journal_is_one_process_s_and_of_a_known_version(tmp_path):
    first = Journal(tmp_path / "journal")
    with pytest.raises(UserError, match="another process has it"):
        Journal(tmp_path / "journal")
    first.database.execute("PRAGMA user_version = 9")
    first.close()
    with pytest.raises(UserError, match="version 9"):
        Journal(tmp_path / "journal")
    with pytest.raises(UserError, match="must be a journal that can be written"):
        Journal(Path("/proc/nowhere/journal"))


def test_only_rows_of_this_journal_have_a_number_in_it():
    journal = Journal()
    with journal.transaction():
        row = journal.add({})
    assert journal.number_of(row["id"]) == 1
    assert journal.number_of("0123456789ab-1") == journal.number_of("nonsense") == 0
