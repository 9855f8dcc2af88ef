"""Damaged and malicious detectors: each is one clear line, and nothing else happens."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from anomaly_detection import Detector
from anomaly_detection.data.decode import content_hash
from anomaly_detection.inference import DetectorError


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_detector_that_would_run_code_is_refused_and_runs_none(tmp_path, form):
    file, witness = tmp_path / "evil.pt", tmp_path / "witness"
    content = {"format": "anomaly_detection.detector", "model": Malicious(witness)}
    if form == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(DetectorError, match="must be a detector, but cannot be loaded") as error:
        Detector.load(file)
    assert "\n" not in str(error.value)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Malicious(witness)))
    assert witness.exists()  # it would have


def describe(folder: Path, **changes) -> None:
    sha256 = content_hash((folder / "model.onnx").read_bytes())
    file = {"runtime": "onnx", "precision": "float32", "sha256": {"model.onnx": sha256}}
    content = {
        "format": "anomaly_detection.export",
        "version": 1,
        "threshold": 0.5,
        "calibration_scores": [0.1],
        "preprocessing": {"image_size": 8, "bit_depth": 16},
        "parameters": {},
        "provenance": {},
        "files": {"model.onnx": file},
    }
    (folder / "model.json").write_text(json.dumps(content | changes))


def cut(folder: Path) -> None:
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text[:100])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: None, "must be a whole model, but cannot be loaded"),
        (cut, "must describe an exported detector, but cannot be read"),
        (lambda folder: (folder / "model.json").unlink(), "must exist: .* copy the whole folder"),
        (lambda folder: (folder / "model.json").write_text("[]"), "but is another file"),
        (lambda folder: describe(folder, format="other"), "but is another file"),
        (lambda folder: describe(folder, version=99), "must be of version 3 or older, got 99"),
        (lambda folder: describe(folder, files={}), "must be one of the models .* none"),
        (lambda folder: describe(folder, files=None), "must be whole, but is not"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "is missing or another one"),
        (lambda folder: (folder / "model.onnx").unlink(), "is missing or another one"),
    ],
)
def test_a_damaged_export_is_one_clear_line(tmp_path, damage, text):
    from onnx import TensorProto, helper

    image, score = (
        helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n"]) for x in ("image", "score")
    )
    node = helper.make_node("Relu", ["image"], ["score"])
    whole = helper.make_model(helper.make_graph([node], "g", [image], [score])).SerializeToString()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    describe(tmp_path)  # of half a model, with its right hash
    damage(tmp_path)
    for path in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(DetectorError, match=text) as error:
            Detector.load(path)
        assert "\n" not in str(error.value)
