"""Exports: their files, and the gate that holds their verdicts against the evaluation's."""

import contextlib
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_image
from builders.projects import Project, read_json

from anomaly_detection import Detector, models
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
from anomaly_detection.models import snapshot

SIZE = 64


def textures(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(128, 30, (count, 3, SIZE, SIZE)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """A small PatchCore, of which half of the calibration images are above the threshold."""
    parameters = models.parameters("patchcore")(backbone="test_resnet", weights="random")
    torch.manual_seed(0)
    model = models.spec("patchcore").build(parameters).eval()
    with torch.no_grad():
        patches = model.extract(torch.from_numpy(textures(4)))
        model.bank = patches.permute(0, 2, 3, 1).flatten(0, 2)[::5]
        model.standardise([{"image": torch.from_numpy(textures(8, 1))}], torch.device("cpu"))
        scores = model(torch.from_numpy(textures(9, 2)))["pred_score"]
    path = tmp_path_factory.mktemp("detectors") / "part.pt"
    save_detector(
        path,
        model=snapshot("patchcore", model),
        threshold=float(scores.median()),
        calibration_scores=scores.tolist(),
        preprocessing={"bit_depth": 16, "image_size": SIZE},
        precision="float32",
        parameters={"model": {"top_fraction": 0.01}},
        provenance={"category": "part"},
    )
    return path


@pytest.fixture(scope="module")
def folder(detector, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "part"
    export_detector(detector, ["onnx", "openvino"], folder, textures(0))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Files of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    sizes = [(SIZE, SIZE), (100, 80), (50, 200), (300, 31), (SIZE, SIZE), (10, 10)]
    return [
        write_image(
            folder / f"{i}.png", rng.normal(128, 30, (*size, 3)).clip(0, 255).astype(np.uint8)
        )
        for i, size in enumerate(sizes)
    ]


def evaluated(detector: Path, pictures: list[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = [Detector.load(detector).predict(path) for path in pictures]
    return (
        np.array([x.score for x in found], dtype=np.float32),
        np.array([x.verdict == "anomalous" for x in found]),
        np.stack([x.anomaly_map for x in found]),
    )


def test_the_parameters_formats_are_those_that_can_be_written():
    formats = list(FORMATS)
    assert Export(formats=formats, allow_changed_verdicts=0).formats == formats
    with pytest.raises(ValueError, match="must not name a format twice"):
        Export(formats=["onnx", "onnx"], allow_changed_verdicts=0)


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
        for path in (str(folder.parent), "site-packages", str(Path(__file__).parent.parent)):
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


def test_an_export_takes_the_place_of_the_former_one_as_a_whole(detector, tmp_path):
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "old.onnx").write_text("")
    export_detector(detector, [], folder, textures(0))
    assert [path.name for path in tmp_path.rglob("*")] == ["part", "model.json"]


def test_a_failed_export_leaves_the_former_one(detector, folder, tmp_path, monkeypatch):
    other = tmp_path / "part"
    export_detector(detector, [], other, textures(0))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"export.formats \['openvino'\] needs openvino: pip inst"):
        export_detector(detector, ["openvino"], other, textures(0))
    assert [path.name for path in tmp_path.rglob("*")] == ["part", "model.json"]
    with pytest.raises(DetectorError, match=r"model\.xml needs openvino: pip install openvino"):
        Detector.load(folder / "model.xml")


def test_another_precision_is_not_exported(detector, tmp_path):
    content = torch.load(detector, weights_only=True) | {"precision": "bfloat16"}
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"evaluation.precision must be float32 to export.*bfloat1"):
        export_detector(tmp_path / "part.pt", ["onnx"], tmp_path / "part", textures(0))


def test_openvino_computes_in_float32(folder):
    import openvino

    compiled = openvino_core().compile_model(folder / "model.xml", "CPU")
    detector = Detector.load(folder / "model.xml")
    exact = Detector.load(folder / "model.onnx").runtime(textures(9, 2))
    np.testing.assert_allclose(detector.runtime(textures(9, 2)).score, exact.score, atol=1e-4)
    if compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16:  # as it comes
        got = compiled([textures(9, 2)])["score"]
        assert np.abs(got - exact.score).max() > 1e-3


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


def test_what_this_processor_cannot_compute_is_refused(detector, tmp_path):
    """Or computed in bfloat16: never in something else without a word."""
    export_detector(detector, ["openvino_bfloat16"], tmp_path / "part", textures(0))

    can = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    expected = (
        contextlib.nullcontext()
        if can
        else pytest.raises(DetectorError, match="must be computed in b")
    )
    with expected:
        Detector.load(tmp_path / "part")


@pytest.mark.slow
def test_int8_and_a_resize_in_the_graph_are_near(detector, pictures, tmp_path):
    names = ["openvino_int8", "openvino_resize"]
    export_detector(detector, names, tmp_path / "part", textures(16, 5))
    scores, _, maps = evaluated(detector, pictures)
    for name in names:
        loaded = Detector.load(tmp_path / "part" / FORMATS[name].file)
        found = list(loaded.predict_many(pictures, batch_size=4))
        correlation = np.corrcoef([x.score for x in found], scores)[0, 1]
        assert correlation > (0.9 if name == "openvino_int8" else 0.99)
        assert found[1].anomaly_map.shape == maps[1].shape


# The gate.


def parity_of(detector, folder, pictures, **changes):
    """What is found, and the speeds."""
    scores, verdicts, maps = evaluated(detector, pictures)
    known = {"scores": scores, "verdicts": verdicts, "maps": maps} | changes
    detectors = {
        "predict": Detector.load(detector),
        "onnx": Detector.load(folder / "model.onnx"),
        "openvino": Detector.load(folder / "model.xml"),
    }
    return measure_parity(detectors, pictures, **known)


def test_exports_pass_the_gate(detector, folder, pictures):
    parity, speeds = parity_of(detector, folder, pictures)
    refuse_changes(parity, 0)
    assert parity["num_images"] == len(pictures)
    assert set(parity["formats"]) == {"predict", "onnx", "openvino"}
    for found in parity["formats"].values():
        assert found["largest_score_difference"] < 1e-3
        assert found["largest_map_difference"] < 1e-2
        assert found["verdicts_changed"] == []
    assert list(speeds) == list(parity["formats"])
    for speed in speeds.values():
        assert 0 < speed["p50"] <= speed["p99"]
        assert speed["images_per_second"] > 0
    scores, _, _ = evaluated(detector, pictures)
    threshold = Detector.load(detector).threshold
    assert parity["nearest_score"] == pytest.approx(np.abs(scores - threshold).min(), rel=1e-5)


def test_a_changed_verdict_is_refused_with_the_images_name(detector, folder, pictures):
    _, verdicts, _ = evaluated(detector, pictures)
    verdicts[2] = ~verdicts[2]
    parity, _ = parity_of(detector, folder, pictures, verdicts=verdicts)
    with pytest.raises(ParityError) as error:
        refuse_changes(parity, 6)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["predict", "onnx", "openvino"]
    assert all(str(pictures[2]) in line for line in lines)
    assert str(pictures[1]) not in str(error.value)


def test_differences_are_those_of_the_worst_image(detector, folder, pictures):
    scores, _, maps = evaluated(detector, pictures)
    scores[3] += 0.5
    maps[4, 7, 9] -= 2
    parity, _ = parity_of(detector, folder, pictures, scores=scores, maps=maps)
    for found in parity["formats"].values():
        assert found["largest_score_difference"] == pytest.approx(0.5, abs=1e-3)
        assert found["largest_map_difference"] == pytest.approx(2, abs=1e-2)


def test_only_formats_that_compute_in_other_ways_may_change_verdicts():
    found = {"num_verdicts_changed": 2, "verdicts_changed": ["a.png", "b.png"]}
    refuse_changes({"num_images": 9, "formats": {"openvino_int8": found}}, 2)
    with pytest.raises(ParityError, match=r"all but 1 of 9 images, but 2 are not: a\.png, b"):
        refuse_changes({"num_images": 9, "formats": {"openvino_int8": found}}, 1)
    with pytest.raises(ParityError, match=r"onnx: .* all but 0 of 9"):
        refuse_changes({"num_images": 9, "formats": {"onnx": found}}, 2)


def test_a_score_nearer_to_the_threshold_than_formats_differ_is_a_close_call():
    formats = {"onnx": {"largest_score_difference": 1e-5}}
    formats["openvino"] = {"largest_score_difference": 1e-7}
    formats["openvino_int8"] = {"largest_score_difference": 1.0}
    assert close_calls({"nearest_score": 1e-6, "formats": formats}) == ["onnx"]


@pytest.mark.slow
def test_the_pipeline_fails_where_a_verdict_changes(tmp_path):
    """With the real dvc: exports are written and judged, and gone after a change of a verdict."""
    project = Project(tmp_path / "project")
    project.change("data", categories=["bolt"])
    project.change("model", name="patchcore")
    project.change("training", num_epochs="auto")
    project.change("export", formats=["onnx", "openvino"])
    project.repro("export@bolt")
    parity = read_json(project.folder / "metrics" / "bolt" / "parity.json")
    assert [x["num_verdicts_changed"] for x in parity["formats"].values()] == [0, 0, 0]
    assert parity["num_images"] == 12
    folder = project.folder / "exports" / "bolt"
    assert json.loads((folder / "model.json").read_text())["provenance"]["category"] == "bolt"

    scores = project.folder / "predictions" / "bolt" / "scores.csv"
    rows = scores.read_text().splitlines()
    rows[1] = rows[1][:-1] + str(1 - int(rows[1][-1]))
    scores.chmod(0o644)
    scores.write_text("\n".join(rows) + "\n")
    (project.folder / "metrics" / "bolt" / "parity.json").unlink()  # as DVC does
    done = project._run("python", "-m", "stages.export", "bolt", ok=False)
    message = done.stderr.strip().splitlines()[-3:]
    assert [line.split(":")[0] for line in message] == ["predict", "onnx", "openvino"]
    assert all(rows[1].split(",")[0] in line for line in message)
    assert not folder.exists()
    assert not (project.folder / "metrics" / "bolt" / "parity.json").exists()
