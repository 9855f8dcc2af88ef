"""Detectors of more than 8 bits, and of a fourth channel: from the files to the verdicts."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from builders.images import prepare, random_pixels, write_tiff

from anomaly_detection import Detector, models
from anomaly_detection.data import PreparedDataset, create_dataloader
from anomaly_detection.data.decode import decode_image
from anomaly_detection.errors import DataError, UserError
from anomaly_detection.evaluator import predict_scores
from anomaly_detection.export import export_detector
from anomaly_detection.features.images import as_floats, judged
from anomaly_detection.inference import save_detector
from anomaly_detection.inference.runtimes import Outputs
from anomaly_detection.models import FitContext, snapshot

STEP = 1000  # a difference of one part in so many
GREY, COLOUR, FOUR = (48, 48), (48, 48, 3), (48, 48, 4)
CONTENT = {"threshold": 0.0, "calibration_scores": [0.0], "parameters": {}, "provenance": {}}


class Fitted:
    """A small Gaussian model of deep TIFFs, and its detector, which rejects the unlike."""

    def __init__(self, folder: Path, images: list[np.ndarray], bits: int = 16) -> None:
        for i, values in enumerate(images):
            write_tiff(folder / "part" / f"{i}.tif", values)
        self.shape, self.bits, self.path = images[0].shape, bits, folder / "part.pt"
        self.prepared = prepare(folder, "part", image_size=32, bit_depth=bits)
        self.arrays = PreparedDataset(self.prepared, "fit")
        validation = self.loader("validation")
        spec = models.spec("gaussian")
        parameters = models.parameters("gaussian")(backbone="test_resnet", weights="random")
        torch.manual_seed(0)
        self.model = spec.build(parameters, self.arrays.channels)
        cpu = torch.device("cpu")
        spec.fit(self.model, parameters, FitContext(self.loader("fit"), validation, folder, cpu))
        scores = predict_scores(self.model.eval(), self.loader("calibration"))
        scores = 1.01 * scores  # else the image among them would tie with itself, or just not
        self.content = CONTENT | {
            "model": snapshot("gaussian", self.model),
            "threshold": float(scores.max()),
            "calibration_scores": scores.tolist(),
            "preprocessing": self.arrays.preprocessing(bits),
            "precision": "float32",
        }
        save_detector(self.path, **self.content)
        self.detector = Detector.load(self.path)
        # Two files that differ by a thousandth in a square.
        changed = images[-1].copy()
        changed[10:30, 10:30, ...] += round((2**bits - 1) / STEP)
        self.files = [
            write_tiff(folder / "plain.tif", images[-1]),
            write_tiff(folder / "changed.tif", changed),
        ]

    def loader(self, split: str):
        return create_dataloader(PreparedDataset(self.prepared, split))

    def exported(self, folder: Path, **preprocessing) -> list[Detector]:
        """The detector, and its exports for both runtimes, with another preprocessing."""
        content = self.content | {"preprocessing": self.content["preprocessing"] | preprocessing}
        save_detector(folder / "part.pt", **content)
        export_detector(
            folder / "part.pt", ["onnx", "openvino"], folder / "export", self.arrays.pictures()
        )
        names = ("part.pt", "export/model.onnx", "export/model.xml")
        return [Detector.load(folder / name) for name in names]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """By the shape of the images and their bits: whole levels of 8 bits as so many."""

    @functools.cache
    def fit(shape, bits):
        rng = np.random.default_rng(1)
        levels = rng.normal(128, 8, (24, *shape)).round()
        values = np.rint(levels * (2**bits - 1) / 255).astype(np.uint16)
        return Fitted(tmp_path_factory.mktemp("deep"), list(values), bits)

    return fit


def inputs(content: dict, files: list[Path]) -> list[np.ndarray]:
    """What a detector's model gets of files."""
    seen: list[np.ndarray] = []

    def note(images):
        seen.extend(images)
        return Outputs(*np.zeros((3, 1)))

    list(Detector(content, note).predict_many(files))
    return seen


@pytest.mark.parametrize(
    ("shape", "bits"),
    [(GREY, 10), (GREY, 12), (GREY, 16), (COLOUR, 16), (FOUR, 12), (FOUR, 16)],
    ids=str,
)
def test_a_difference_of_a_thousandth_reaches_the_model(fitted, shape, bits):
    own = fitted(shape, bits)
    plain, changed = inputs(own.content, own.files)
    assert (plain.dtype, plain.shape) == (np.uint16, own.arrays.images.shape[1:])
    difference = changed.astype(int) - plain
    inside = difference[:, 8:18, 8:18]  # at 32 pixels instead of 48
    step = round((2**bits - 1) / STEP) * 65535 / (2**bits - 1)
    assert np.abs(inside - step).max() <= 2
    assert step == pytest.approx(65535 / STEP, rel=0.05)
    assert not difference[:, 24:, 24:].any()
    eight = own.content["preprocessing"] | {"dtype": "uint8"}
    plain, changed = inputs(own.content | {"preprocessing": eight}, own.files)
    assert plain.dtype == np.uint8
    np.testing.assert_array_equal(plain, changed)  # with a step of 8 bits on the way, it is lost
    with torch.inference_mode():
        expected = own.model(own.arrays.__getitems__([0])["image"])["pred_score"].item()
    found = own.detector.predict(own.path.with_name("part") / own.arrays.rows[0]["path"]).score
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)  # as in the evaluation


@pytest.mark.parametrize(
    ("shape", "bits"),
    [
        (GREY, 12),
        (FOUR, 16),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [(GREY, 10), (GREY, 16), (COLOUR, 16), (FOUR, 12)]
        ),
    ],
    ids=str,
)
def test_a_difference_of_a_thousandth_changes_the_score_in_every_runtime(
    fitted, shape, bits, tmp_path
):
    own = fitted(shape, bits)
    found = []
    for detector in own.exported(tmp_path):
        plain, changed = predictions = [detector.predict(file) for file in own.files]
        assert abs(changed.score - plain.score) > 1e-4
        found.append([(x.score, x.verdict, x.p_value) for x in predictions])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
            assert ours[1:] == theirs[1:]
    description = json.loads((tmp_path / "export/model.json").read_text())
    assert description["input"]["dtype"] == "uint16"
    assert description["input"]["shape"] == ["batch", 4 if shape == FOUR else 3, 32, 32]
    assert description["preprocessing"]["bit_depth"] == bits


def test_what_is_judged_is_the_same_in_every_runtime(fitted, tmp_path):
    own = fitted(FOUR, 16)
    detectors = own.exported(tmp_path, resize="fit")
    description = json.loads((tmp_path / "export/model.json").read_text())["input"]
    assert description["shape"] == ["batch", 5, 32, 32]
    assert description["channels"].startswith("as in the file, without alpha; 65535 where")
    values = tifffile.imread(own.files[1])[:30]
    expected, *found = (detector.predict(values) for detector in detectors)
    assert not expected.anomaly_map[:6].any()
    assert expected.anomaly_map[6:26].any()
    for prediction in found:
        assert prediction.score == pytest.approx(expected.score, rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(prediction.anomaly_map, expected.anomaly_map, atol=1e-4)


def test_a_faint_defect_is_found_where_parts_vary_less(tmp_path):
    """All good images and the defect are one flat level in 8 bits."""
    rng = np.random.default_rng(0)
    images = (30_069 + rng.integers(-8, 9, (24, 48, 48))).astype(np.uint16)
    own = Fitted(tmp_path, list(images))
    defect = own.files[1]
    assert np.ptp(decode_image(defect.read_bytes(), "a")) == 0
    normal = predict_scores(own.model, own.loader("calibration"))
    assert own.detector.predict(defect).score > 2 * normal.max()


def test_a_defect_in_the_fourth_channel_alone_is_found(fitted):
    own = fitted(FOUR, 16)
    values = tifffile.imread(own.files[0])
    values[10:30, 10:30, 3] += 6_000
    assert own.detector.predict(own.files[0]).verdict == "normal"
    assert own.detector.predict(values).verdict == "anomalous"


def test_images_of_other_channels_are_refused_by_name(fitted):
    four, grey = fitted(FOUR, 16), fitted(GREY, 16)
    for own, other, channels in ((four, grey, 4), (grey, four, 3)):
        text = f"plain.tif: must have {channels} channels like the images of its category"
        with pytest.raises(DataError, match=text):
            own.detector.predict(other.files[0])
        good, error = own.detector.predict_many([own.files[0], other.files[0]])
        assert good.score == own.detector.predict(own.files[0]).score
        assert isinstance(error, DataError)


def test_arrays_may_have_16_bits(fitted):
    for own in (fitted(FOUR, 16), fitted(GREY, 16)):
        predict, file = own.detector.predict, own.files[0]
        assert predict(tifffile.imread(file)).score == predict(file).score
    eight = random_pixels(20, 20)
    assert predict(eight).score == predict(eight * np.uint16(257)).score


@pytest.mark.parametrize(
    ("preprocessing", "arrays", "text"),
    [
        ({}, [((4, 4), "uint16")], r"must be uint8 of shape \(H, W\) or \(H, W, 3\), got uint16"),
        ({}, [((4, 4, 4), "uint8")], r"or \(H, W, 3\), got uint8 of \(4, 4, 4\)"),
        ({"dtype": "uint16"}, [((4, 4), "int32"), ((4, 4), ">u2")], "must be uint8 or uint16 of"),
        ({"channels": 4}, [((4, 4, 3), "uint8"), ((4, 4), "uint8")], r"of shape \(H, W, 4\), got"),
    ],
)
def test_other_arrays_are_refused(preprocessing, arrays, text):
    own = {"image_size": 8, "bit_depth": 16} | preprocessing
    for shape, dtype in arrays:
        with pytest.raises(ValueError, match=text):
            Detector(CONTENT | {"preprocessing": own}, None).predict(np.ones(shape, dtype))


@pytest.mark.parametrize("bit_depth", [10, 12, 16])
def test_a_detector_of_8_bits_gets_deep_images_as_before(tmp_path, bit_depth):
    values = random_pixels(16, 16, dtype="uint16") >> (16 - bit_depth)
    path = write_tiff(tmp_path / "a.tif", values)
    own = {"preprocessing": {"image_size": 16, "bit_depth": bit_depth}}
    (seen,) = inputs(CONTENT | own, [path])
    assert seen.dtype == np.uint8
    np.testing.assert_array_equal(
        seen, np.rint(np.stack([values] * 3) * (255 / (2**bit_depth - 1)))
    )


@pytest.mark.parametrize("name", ["openvino_resize", "openvino_int8"])
def test_what_openvino_has_for_8_bits_alone_is_refused_for_16(fitted, tmp_path, name):
    with pytest.raises(UserError, match=f"must be without {name} for a detector of 16 bits"):
        export_detector(fitted(FOUR, 16).path, ["onnx", name], tmp_path / "x", np.zeros(0))
    assert not (tmp_path / "x").exists()


def test_int8_and_a_resize_in_the_graph_take_four_channels_of_8_bits(fitted, tmp_path):
    own = fitted(FOUR, 16)
    preprocessing = own.content["preprocessing"] | {"dtype": "uint8"}
    save_detector(tmp_path / "part.pt", **own.content | {"preprocessing": preprocessing})
    images = (own.arrays.pictures() >> 8).astype(np.uint8)
    names = ["openvino_int8", "openvino_resize"]
    export_detector(tmp_path / "part.pt", names, tmp_path / "x", images)
    square = np.moveaxis(np.tile(images, 2), 1, -1)[:, :, 16:48]
    square[:4, 8:24, 8:24, 3] += np.arange(25, 125, 25, np.uint8)[:, None, None]
    paths = ("part.pt", "x/model_int8.xml", "x/model_resize.xml")
    found = [
        [x.score for x in Detector.load(tmp_path / path).predict_many(square)] for path in paths
    ]
    for scores in found:
        assert min(scores[:4]) > 2 * max(scores[4:])
    assert found[2] == pytest.approx(found[0], rel=0.05, abs=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_of_16_bits_are_made_on_a_gpu(fitted):
    arrays = fitted(FOUR, 16).arrays
    own = PreparedDataset(arrays.folder, "fit", "cuda").__getitems__([2, 0])
    expected = arrays.__getitems__([2, 0])
    assert own["image"].dtype == torch.uint16
    assert torch.equal(own["image"].cpu(), expected["image"])
    assert torch.equal(as_floats(own["image"], 4).cpu(), as_floats(expected["image"], 4))
    assert judged(own["image"], 3).cpu().equal(judged(expected["image"], 3))
