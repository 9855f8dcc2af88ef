"""What the line stands on: statistics of images, proven detectors, the station, the journal."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from builders.detectors import pictures, small_detector, write_detector
from builders.images import prepare, write_category
from PIL import Image, ImageFilter

from anomaly_detection import Detector
from anomaly_detection.data import PreparedArrays
from anomaly_detection.data.frame import Frame
from anomaly_detection.errors import DataError, UserError
from anomaly_detection.export import export_detector
from anomaly_detection.inference import DetectorError, save_detector, statistics_of_images
from anomaly_detection.inference.statistics import statistics_of
from anomaly_detection.line.journal import Journal
from anomaly_detection.line.station import Station


def test_statistics_by_hand():
    tile = np.zeros((3, 2, 2), np.uint8)
    tile[:, :, 1] = 255  # black on the left, white on the right
    sharpness = np.sqrt(2 / 4) / 0.5  # 2 of 4 steps are 1
    assert statistics_of([tile], Frame()) == pytest.approx((0.5, 0.5, sharpness), abs=1e-6)
    constant = np.full((3, 8, 8), 51, np.uint8)
    assert statistics_of([constant], Frame()) == (0.2, 0, 0)


def test_exposure_leaves_sharpness_and_blur_leaves_brightness():
    (sharp,) = pictures(1, level=100)
    brightness, contrast, sharpness = statistics_of([sharp], Frame())
    half = statistics_of([(sharp // 2).astype(np.uint8)], Frame())
    assert half == pytest.approx((brightness / 2, contrast / 2, sharpness), rel=0.02)
    image = Image.fromarray(np.moveaxis(sharp, 0, -1)).filter(ImageFilter.GaussianBlur(1))
    blurred = statistics_of([np.moveaxis(np.asarray(image), -1, 0)], Frame())
    assert blurred.brightness == pytest.approx(brightness, rel=0.02)
    assert blurred.sharpness < 0.6 * sharpness


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
def test_an_image_has_the_statistics_of_its_prepared_array(tmp_path, options):
    """So that those of the line can be compared with the fit images'."""
    write_category(tmp_path / "widget", num_train=8, num_test=1)
    arrays = PreparedArrays(prepare(tmp_path, image_size=32, **options), "fit")
    known = statistics_of_images(arrays)
    assert {len(values) for values in known.values()} == {len(arrays.rows)}
    content = small_detector(preprocessing=arrays.preprocessing(16))
    save_detector(tmp_path / "part.pt", **content)
    detector = Detector.load(tmp_path / "part.pt")
    for i, row in enumerate(arrays.rows[:3]):
        found = detector.predict(tmp_path / "widget" / row["path"]).statistics
        assert found == tuple(values[i] for values in known.values())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One detector in each format."""
    folder = tmp_path_factory.mktemp("detectors")
    source = write_detector(folder / "part.pt")
    exports = {format: folder / format for format in ("onnx", "openvino")}
    for format, export in exports.items():
        export_detector(source, [format], export, pictures(1))
    return {"pt": source, **exports}


@pytest.mark.parametrize("format", ["pt", "onnx", "openvino"])
def test_a_detector_passes_its_own_check_and_judges_in_several_threads_as_in_one(files, format):
    detector = Detector.load(files[format], num_streams=4)
    detector.check()
    images = [np.moveaxis(x, 0, -1) for x in pictures(64, seed=3)]
    expected = [detector.predict(image).score for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = [x.score for x in pool.map(detector.predict, images)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_bytes_are_judged_like_their_file(files, tmp_path):
    detector = Detector.load(files["onnx"])
    (planes,) = pictures(1, seed=5)
    Image.fromarray(np.moveaxis(planes, 0, -1)).save(tmp_path / "x.png")
    expected = detector.predict(tmp_path / "x.png")
    found = detector.predict((tmp_path / "x.png").read_bytes())
    assert found[:4] == expected[:4]
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)


def test_a_detector_with_other_weights_or_without_a_test_image_does_not_pass(tmp_path):
    content = small_detector() | {"model": small_detector(seed=1)["model"]}
    save_detector(tmp_path / "part.pt", **content)
    with pytest.raises(DetectorError, match="must give its test picture the recorded score"):
        Detector.load(tmp_path / "part.pt").check()
    detector = Detector.load(write_detector(tmp_path / "part.pt", example=None))
    with pytest.raises(DetectorError, match="make it again with `dvc repro`"):
        detector.check()


@pytest.fixture(scope="module")
def detector(files) -> Detector:
    return Detector.load(files["pt"])


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
    other = write_detector(tmp_path / "other.pt", threshold=1.0)
    assert Station(Detector.load(other), journal).monitor.num_images == 0


def test_an_image_that_cannot_be_read_has_a_row_and_no_part_in_drift(detector):
    station = Station(detector, Journal())
    row = station.record(DataError("a.png: must be a whole image"), "a.png", "hash")
    assert row["error"] == "a.png: must be a whole image"
    assert row["score"] is None
    assert row["evidence"] == {}
    assert station.monitor.num_images == 0


def test_what_cannot_be_written_leaves_no_trace_in_the_journal():
    journal = Journal()

    def write(score: float) -> None:
        with journal.transaction():
            journal.note_drift("x", {}, None)
            journal.add({"score": score})

    with pytest.raises(ValueError, match="JSON compliant"):
        write(float("nan"))
    assert journal.latest(5) == []
    assert journal.drift_of("x") is None
    write(1.0)
    assert len(journal.latest(5)) == 1
    assert journal.drift_of("x") == ({}, [])


def test_who_waits_for_entries_gets_them():
    journal, got = Journal(), []
    waiter = threading.Thread(target=lambda: got.extend(journal.after(0, 5, wait=30)))
    waiter.start()
    with journal.transaction():
        row = journal.add({"path": "a.png"})
    waiter.join(10)
    assert [entry.row for entry in got] == [row]


def test_a_journal_is_that_of_one_process_and_of_a_known_version(tmp_path):
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


def test_entries_of_pictures_that_are_gone_are_forgotten_when_all_sinks_have_them(tmp_path):
    journal = Journal(tmp_path / "journal")
    for i in range(10):
        with journal.transaction():
            journal.add({"path": f"{i}.png"}, f"{i}.png", "1")
    journal.start_of("new")
    assert journal.oldest(3, [], 0, 100) == [(i + 1, f"{i}.png") for i in range(7)]
    assert journal.oldest(3, [], 5, 100) == [(6, "5.png"), (7, "6.png")]
    assert journal.oldest(3, ["nobody"], 0, 100) == []
    assert len(journal.oldest(3, ["new"], 0, 5)) == 5
    journal.forget([1, 2])
    assert [entry.number for entry in journal.after(0, 2)] == [3, 4]
