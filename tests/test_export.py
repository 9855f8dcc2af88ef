"""Exports: their files, and the gate that holds their verdicts against the evaluation's."""

import contextlib
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from builders.detectors import SIZE, pictures, small_detector
from builders.images import write_category, write_image
from builders.projects import ROOT, read_json, write_params

from anomaly_detection import Detector
from anomaly_detection.config.sections import Export
from anomaly_detection.errors import UserError
from anomaly_detection.export import (
    FORMATS,
    ParityError,
    close_calls,
    export_detector,
    measure_parity,
    refuse_changes,
)
from anomaly_detection.inference import DetectorError, save_detector
from anomaly_detection.inference.runtimes import openvino_core
from stages import check, evaluate, export, prepare, train

INEXACT = ["openvino_bfloat16", "openvino_int8", "openvino_resize"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """A small PatchCore, of which half of the calibration images are above the threshold."""
    path, content = tmp_path_factory.mktemp("detectors") / "part.pt", small_detector()
    save_detector(path, **content | {"threshold": float(np.median(content["calibration_scores"]))})
    return path


@pytest.fixture(scope="module")
def folder(detector, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "part"
    export_detector(detector, ["onnx", "openvino"], folder, pictures(0))
    return folder


@pytest.fixture(scope="module")
def inexact(detector, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "part"
    export_detector(detector, INEXACT, folder, pictures(16, seed=5))
    return folder


class Evaluated(NamedTuple):
    paths: list[Path]
    scores: np.ndarray
    verdicts: np.ndarray
    maps: np.ndarray


@pytest.fixture
def evaluated(detector, tmp_path) -> Evaluated:
    """Files of several sizes, and what an evaluation has found of them."""
    rng = np.random.default_rng(3)
    sizes = [(SIZE, SIZE), (100, 80), (50, 200), (300, 31), (SIZE, SIZE), (10, 10)]
    images = [rng.normal(128, 30, (*size, 3)).clip(0, 255).astype(np.uint8) for size in sizes]
    paths = [write_image(tmp_path / f"{i}.png", image) for i, image in enumerate(images)]
    found = [Detector.load(detector).predict(path) for path in paths]
    scores = np.array([x.score for x in found], dtype=np.float32)
    verdicts = np.array([x.verdict == "anomalous" for x in found])
    assert set(verdicts) == {False, True}
    return Evaluated(paths, scores, verdicts, np.stack([x.anomaly_map for x in found]))


def test_the_parameters_formats_are_those_that_can_be_written():
    formats = list(FORMATS)
    assert Export(formats=formats, allow_changed_verdicts=0).formats == formats


def test_the_same_detector_gives_the_same_bytes_in_another_process(detector, folder, tmp_path):
    """And none of this machine's paths: a file's name would end up in every cache and export."""
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from anomaly_detection.export import export_detector\n"
        "export_detector(Path(sys.argv[1]), ['onnx', 'openvino'], Path(sys.argv[2]), None)"
    )
    again = tmp_path / "elsewhere" / "other"
    subprocess.run([sys.executable, "-c", code, detector, again], check=True)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["model.bin", "model.json", "model.onnx", "model.xml"]
    for name in names:
        content = (folder / name).read_bytes()
        assert (again / name).read_bytes() == content, name
        for path in (str(folder.parent), "site-packages", str(ROOT)):
            assert path.encode() not in content, name


def test_the_description_has_all_but_the_weights(detector, folder):
    content = torch.load(detector, weights_only=True)
    description = read_json(folder / "model.json")
    for key in ("threshold", "calibration_scores", "preprocessing", "parameters", "provenance"):
        assert description[key] == content[key]
    assert description["model"] == "patchcore"
    assert description["detector_md5"] == hashlib.md5(detector.read_bytes()).hexdigest()
    assert description["input"]["shape"] == ["batch", 3, SIZE, SIZE]
    assert list(description["files"]) == ["model.onnx", "model.xml"]
    assert description["files"]["model.onnx"]["bytes"] == (folder / "model.onnx").stat().st_size


def test_an_export_takes_the_place_of_the_former_one_as_a_whole_or_not_at_all(
    detector, folder, tmp_path, monkeypatch
):
    other = tmp_path / "part"
    other.mkdir()
    (other / "old.onnx").write_text("")
    export_detector(detector, [], other, pictures(0))
    assert [path.name for path in tmp_path.rglob("*")] == ["part", "model.json"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"export.formats \['openvino'\] needs openvino: pip inst"):
        export_detector(detector, ["openvino"], other, pictures(0))
    assert [path.name for path in tmp_path.rglob("*")] == ["part", "model.json"]
    with pytest.raises(DetectorError, match=r"model\.xml needs openvino: pip install openvino"):
        Detector.load(folder / "model.xml")


def test_another_precision_is_not_exported(detector, tmp_path):
    content = torch.load(detector, weights_only=True) | {"precision": "bfloat16"}
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"evaluation.precision must be float32 to export.*bfloat1"):
        export_detector(tmp_path / "part.pt", ["onnx"], tmp_path / "part", pictures(0))


def test_openvino_computes_in_float32(folder):
    import openvino

    images = pictures(9, seed=2)
    exact = Detector.load(folder / "model.onnx").runtime(images).score
    found = Detector.load(folder / "model.xml").runtime(images).score
    np.testing.assert_allclose(found, exact, atol=1e-4)
    compiled = openvino_core().compile_model(folder / "model.xml", "CPU")
    if compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16:  # as it comes
        assert np.abs(compiled([images])["score"] - exact).max() > 1e-3


SIGNAL_STACKS = """
import ctypes, gc, sys
from anomaly_detection import Detector

class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

def stack():
    found = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.start

detectors = [Detector.load(sys.argv[1])]
stacks = [stack()]
detectors.append(Detector.load(sys.argv[1]))
while detectors:
    stacks.append(stack())
    del detectors[0]
    gc.collect()
assert len({*stacks, stack()}) == 1, stacks
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's sigaltstack")
def test_detectors_that_come_and_go_leave_no_freed_stack_for_signals(folder):
    """OpenVINO's plugin would: the next signal, such as a child's end, killed the process."""
    run = [sys.executable, "-c", SIGNAL_STACKS, str(folder / "model.xml")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_this_processor_cannot_compute_is_refused(inexact):
    """Or computed in bfloat16: never in something else without a word."""
    can = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    refused = pytest.raises(DetectorError, match="must be computed in b")
    with contextlib.nullcontext() if can else refused:
        Detector.load(inexact / "model_bfloat16.xml")


def test_int8_and_a_resize_in_the_graph_are_near(inexact, evaluated):
    for name, least in (("openvino_int8", 0.9), ("openvino_resize", 0.99)):
        loaded = Detector.load(inexact / FORMATS[name].file)
        found = list(loaded.predict_many(evaluated.paths, batch_size=4))
        assert np.corrcoef([x.score for x in found], evaluated.scores)[0, 1] > least
        assert found[1].anomaly_map.shape == evaluated.maps[1].shape


@pytest.fixture
def parity_of(detector, folder):
    """Measures the parity of PyTorch and of the exact formats; returns it with the speeds."""
    files = {"predict": detector, "onnx": folder / "model.onnx", "openvino": folder / "model.xml"}

    def measured(evaluated: Evaluated):
        detectors = {name: Detector.load(path) for name, path in files.items()}
        return measure_parity(detectors, *evaluated)

    return measured


def test_exports_pass_the_gate(detector, parity_of, evaluated):
    parity, speeds = parity_of(evaluated)
    refuse_changes(parity, 0)
    assert parity["num_images"] == len(evaluated.paths)
    assert list(parity["formats"]) == list(speeds) == ["predict", "onnx", "openvino"]
    for found in parity["formats"].values():
        assert found["largest_score_difference"] < 1e-3
        assert found["largest_map_difference"] < 1e-2
        assert found["verdicts_changed"] == []
    for speed in speeds.values():
        assert 0 < speed["p50"] <= speed["p99"]
        assert speed["images_per_second"] > 0
    nearest = np.abs(evaluated.scores - Detector.load(detector).threshold).min()
    assert parity["nearest_score"] == pytest.approx(nearest, rel=1e-5)


@pytest.mark.parametrize("place", [0, 2, -1])
def test_a_changed_verdict_is_refused_with_the_images_name(parity_of, evaluated, place):
    """As are differences of scores and maps, which are those of the worst image."""
    evaluated.verdicts[place] = ~evaluated.verdicts[place]
    evaluated.scores[place - 1] += 0.5
    evaluated.maps[place - 2, 7, 9] -= 2
    parity, _ = parity_of(evaluated)
    for found in parity["formats"].values():
        assert found["largest_score_difference"] == pytest.approx(0.5, abs=1e-3)
        assert found["largest_map_difference"] == pytest.approx(2, abs=1e-2)
    with pytest.raises(ParityError) as error:
        refuse_changes(parity, 6)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["predict", "onnx", "openvino"]
    assert all(str(evaluated.paths[place]) in line for line in lines)
    assert str(evaluated.paths[1]) not in str(error.value)


def test_only_formats_that_compute_in_other_ways_may_change_verdicts():
    found = {"num_verdicts_changed": 2, "verdicts_changed": ["a.png", "b.png"]}
    refuse_changes({"num_images": 9, "formats": {"openvino_int8": found}}, 2)
    with pytest.raises(ParityError, match=r"all but 1 of 9 images, but 2 are not: a\.png, b"):
        refuse_changes({"num_images": 9, "formats": {"openvino_int8": found}}, 1)
    with pytest.raises(ParityError, match=r"onnx: .* all but 0 of 9"):
        refuse_changes({"num_images": 9, "formats": {"onnx": found}}, 2)


def test_a_score_nearer_to_the_threshold_than_formats_differ_is_a_close_call():
    differences = {"onnx": 1e-5, "openvino": 1e-7, "openvino_int8": 1.0}
    formats = {name: {"largest_score_difference": x} for name, x in differences.items()}
    assert close_calls({"nearest_score": 1e-6, "formats": formats}) == ["onnx"]


def test_the_stage_fails_where_a_verdict_changes_and_leaves_no_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_category(Path("parts/bolt"), size=SIZE + 1)
    model = {"model.name": "patchcore", "model.backbone": "test_resnet", "model.weights": "random"}
    data = {"data.root": "parts", "data.categories": ["bolt"], "data.image_size": SIZE}
    write_params(model | data | {"evaluation.false_reject_rate": 0.25})
    check.main()
    for stage in (prepare, train, evaluate, export):
        stage.main("bolt")
    exported, metrics = Path("exports/bolt"), Path("metrics/bolt/parity.json")
    parity = read_json(metrics)
    assert {x["num_verdicts_changed"] for x in parity["formats"].values()} == {0}
    assert parity["num_images"] == 12
    assert read_json(exported / "model.json")["provenance"]["category"] == "bolt"

    scores = Path("predictions/bolt/scores.csv")
    rows = scores.read_text().splitlines()
    rows[1] = rows[1][:-1] + str(1 - int(rows[1][-1]))
    scores.write_text("\n".join(rows) + "\n")
    metrics.unlink()  # as DVC does
    with pytest.raises(ParityError) as error:
        export.main("bolt")
    message = str(error.value).splitlines()
    assert [line.split(":")[0] for line in message] == ["predict", "onnx", "openvino"]
    assert all(rows[1].split(",")[0] in line for line in message)
    assert not exported.exists()
    assert not metrics.exists()
