"""More than 8 bits, and a fourth channel: from the files to the verdicts and what people see."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from builders.images import prepare, random_pixels, write_image, write_tiff
from PIL import Image

from anomaly_detection import Detector, models
from anomaly_detection.data import PreparedDataset, create_dataloader
from anomaly_detection.data.decode import channels_and_depth, decode_image, resize_image
from anomaly_detection.data.format import Format, common_format, visible
from anomaly_detection.data.frame import Frame
from anomaly_detection.errors import DataError, UserError
from anomaly_detection.evaluation.run import predict_scores
from anomaly_detection.evaluation.synthetic import FAMILIES, add_defect
from anomaly_detection.export import export_detector
from anomaly_detection.features import BackboneError, FeaturePyramid
from anomaly_detection.features.images import as_floats, judged
from anomaly_detection.features.pyramid import Normalisation
from anomaly_detection.inference import save_detector
from anomaly_detection.inference.overlay import overlay
from anomaly_detection.inference.runtimes import Outputs
from anomaly_detection.models import FitContext, snapshot
from anomaly_detection.models.efficientad.augmentation import recoloured, varied
from anomaly_detection.models.efficientad.teachers import PatchTeacher
from anomaly_detection.report.plots import plot_gallery
from anomaly_detection.report.thumbnails import thumbnails

deep_pixels = functools.partial(random_pixels, dtype="uint16")


def test_deep_grey_is_resized_by_hand_without_a_step_of_8_bits():
    # As in test_transforms: 80 / 7 and 80 * 6 / 7, for a full scale 257 times as large.
    values = np.array([[0, 0, 80 * 257, 80 * 257]], np.uint16).repeat(4, axis=0)
    left, right = resize_image(values, 2)[0, 0]
    assert (left, right) == (round(80 * 257 / 7), round(80 * 257 * 6 / 7))


@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3), (40, 50, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_each_channel_is_resized_like_floats(shape, dtype):
    values = random_pixels(*shape, dtype=dtype)
    for size in (9, 32, 80):
        found = resize_image(values, size)
        assert (found.shape, found.dtype) == ((shape[2] if shape[2:] else 3, size, size), dtype)
        for plane, own in zip(found, np.moveaxis(np.atleast_3d(values), -1, 0), strict=False):
            floats = Image.fromarray(own.astype(np.float32))
            expected = np.asarray(floats.resize((size, size), Image.Resampling.BILINEAR))
            assert np.abs(plane - expected).max() < 1.01  # it rounds after each of two passes


def write_kinds(folder: Path) -> dict[Path, tuple[int, bool]]:
    """Files of each kind, with their channels and whether they are deep."""
    return {
        write_image(folder / "grey.png", random_pixels(9, 9)): (3, False),
        write_image(folder / "alpha.png", random_pixels(9, 9, 4)): (3, False),
        write_image(folder / "colour.jpg", random_pixels(9, 9, 3)): (3, False),
        write_image(folder / "deep.png", deep_pixels(9, 9)): (3, True),
        write_tiff(folder / "deep.tif", deep_pixels(9, 9)): (3, True),
        write_tiff(folder / "rgb.tif", deep_pixels(9, 9, 3)): (3, True),
        write_tiff(folder / "four.tif", deep_pixels(9, 9, 4)): (4, True),
        write_tiff(folder / "four_8.tif", random_pixels(9, 9, 4)): (4, False),
    }


def test_headers_alone_tell_the_format(tmp_path, monkeypatch):
    kinds = write_kinds(tmp_path)
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(tifffile, "TiffFile", None)
    assert {path: channels_and_depth(path) for path in kinds} == kinds
    for path in kinds:
        path.write_bytes(path.read_bytes()[:20])
    assert not any(map(channels_and_depth, kinds))
    assert channels_and_depth(tmp_path / "gone.png") is None
    assert common_format([*kinds, tmp_path / "gone.png"]) == Format(3, "uint8")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("grey.png alpha.png colour.jpg", (3, "uint8")),
        ("grey.png deep.png", (3, "uint16")),
        ("four_8.tif", (4, "uint8")),
        ("four_8.tif four.tif grey.png", (4, "uint16")),
        ("four.tif grey.png", (3, "uint16")),
        ("", (3, "uint8")),
    ],
)
def test_a_category_has_the_channels_of_most_and_the_bits_of_the_deepest(tmp_path, names, expected):
    write_kinds(tmp_path)
    assert common_format([tmp_path / name for name in names.split()]) == expected


def test_a_format_survives_a_file_and_older_files_have_none():
    frame = Frame([0, 0, 4, 4], "fit", format=Format(4, "uint16"))
    copy = Frame.from_options(json.loads(json.dumps(frame.options)))
    assert (copy.format, copy.num_channels) == (frame.format, 5)
    assert Frame.from_options({"crop": None}).format == Format(3, "uint8")


def test_images_of_8_bits_are_scaled_among_deep_ones(tmp_path):
    values, deep = random_pixels(32, 32, 3), deep_pixels(32, 32)
    for i in range(12):
        write_image(tmp_path / "part" / f"{i:02}.png", np.roll(values, i, axis=0))
    write_image(tmp_path / "part" / "deep.png", deep)
    output, images = prepare(tmp_path, "part", image_size=32), {}
    for splits in (["test"], ["fit", "validation", "calibration"]):
        arrays = PreparedDataset(output, splits)
        images |= {row["path"]: x for row, x in zip(arrays.rows, arrays.images, strict=True)}
        assert arrays.images.dtype == np.uint16
    assert len(images) == 13
    np.testing.assert_array_equal(np.moveaxis(images["00.png"], 0, -1), values.astype(int) * 257)
    np.testing.assert_array_equal(images["deep.png"], np.stack([deep] * 3))
    assert arrays.channels == 3
    assert arrays.preprocessing(16)["dtype"] == "uint16"
    assert arrays[0]["image"].dtype == torch.uint16


def test_images_of_other_channels_are_all_listed(tmp_path):
    for i in range(9):
        write_tiff(tmp_path / "part" / f"{i}.tif", deep_pixels(9, 9, 4))
    write_image(tmp_path / "part" / "grey.png", random_pixels(9, 9))
    write_image(tmp_path / "part" / "alpha.png", random_pixels(9, 9, 4))
    (tmp_path / "part" / "text.png").write_text("no image")
    with pytest.raises(DataError) as error:
        prepare(tmp_path, "part")
    assert not (tmp_path / "prepared" / "part").exists()
    lines = sorted(str(error.value).splitlines())
    names = [line.split(": ")[0].split("/")[-1] for line in lines]
    assert names == ["alpha.png", "grey.png", "text.png"]
    assert "must have 4 channels like the images of its category, got 3 (grey counts as" in lines[0]


def test_what_is_not_judged_is_in_the_last_channel(tmp_path):
    for i in range(12):
        write_tiff(tmp_path / "part" / f"{i}.tif", deep_pixels(32, 16, 4, seed=i))
    arrays = PreparedDataset(prepare(tmp_path, "part", image_size=32, resize="fit"), "test")
    assert arrays.images.shape[1:] == (5, 32, 32)
    assert set(arrays.region(0)[:, :8].ravel()) == {0}
    assert set(arrays.region(0)[:, 8:24].ravel()) == {65535}
    mask = arrays[0]["mask"][0]
    assert mask[:, :8].unique().tolist() == [255]
    assert mask[:, 8:24].unique().tolist() == [0]
    batch = judged(arrays.__getitems__([0, 1])["image"], channels=4)
    assert batch.shape == (2, 1, 32, 32)
    assert batch[0, 0, 0].tolist() == [False] * 8 + [True] * 16 + [False] * 8


def test_four_channels_without_a_region_are_judged_everywhere(tmp_path):
    for i in range(12):
        write_tiff(tmp_path / "part" / f"{i}.tif", random_pixels(32, 32, 4, seed=i))
    arrays = PreparedDataset(prepare(tmp_path, "part", image_size=32), "test")
    assert (arrays.images.shape[1:], arrays.images.dtype) == ((4, 32, 32), np.uint8)
    assert arrays.region(0) is None
    assert arrays[0]["mask"].unique().tolist() == [0]


def test_integers_become_shares_of_full_scale():
    deep = torch.tensor([0, 13107, 65535, 9]).to(torch.uint16).view(1, 4, 1, 1)
    assert as_floats(deep, 3).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert as_floats((deep.int() // 257).byte(), 3).flatten().tolist() == pytest.approx([0, 0.2, 1])
    floats = torch.rand(1, 4, 2, 2)
    assert torch.equal(as_floats(floats, 4), floats)


def test_the_fourth_channel_is_normalised_by_the_others_mean():
    normalisation = Normalisation((0.1, 0.2, 0.6), (0.5, 0.25, 0.75), channels=4)
    found = normalisation(torch.full((1, 5, 1, 1), 65535).to(torch.uint16)).flatten().tolist()
    assert found == pytest.approx([1.8, 3.2, 0.4 / 0.75, 0.7 / 0.5])


@pytest.mark.parametrize("weights", ["bundled", "file"])
def test_a_fourth_channel_gets_pretrained_weights(weights, tmp_path):
    backbone = "tf_efficientnet_lite0" if weights == "bundled" else "test_resnet"
    if weights == "file":
        weights = str(tmp_path / "weights.pth")
        torch.save(timm.create_model(backbone).state_dict(), weights)
    three, four = (
        FeaturePyramid(backbone, None, weights, (8,), channels).net.state_dict()
        for channels in (3, 4)
    )
    first = next(iter(three))
    torch.testing.assert_close(four.pop(first), three[first][:, [0, 1, 2, 0]] * 3 / 4)
    assert all(torch.equal(values, three[name]) for name, values in four.items())


def test_random_weights_take_four_channels():
    pyramid = FeaturePyramid("test_resnet", None, "random", (8,), 4).eval()
    images = pyramid.normalisation(torch.rand(1, 4, 64, 64))
    assert images.shape == (1, 4, 64, 64)
    (before,) = pyramid(images).values()
    pyramid.fold_batch_norm()
    (after,) = pyramid(images).values()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", [recoloured, varied])
def test_a_fourth_channel_is_changed_like_a_grey_image(change):
    def changed(seed, images):
        torch.manual_seed(seed)
        return change(images)

    for seed in range(8):
        images = torch.rand(2, 4, 16, 16)
        found, colours = changed(seed, images), changed(seed, images[:, :3])
        as_grey = changed(seed, images[:, 3:].repeat(1, 3, 1, 1))
        assert torch.equal(found[:, :3], colours)
        torch.testing.assert_close(found[:, 3:], as_grey[:, :1], rtol=0, atol=1e-3)


def test_a_teacher_from_a_file_must_be_for_as_many_channels(tmp_path):
    path = tmp_path / "teacher.pth"
    parameters = models.parameters("efficientad")(teacher=str(path))
    build = models.spec("efficientad").build
    for own, other in ((3, 4), (4, 3)):
        torch.save(PatchTeacher("small", 8, own).net.state_dict(), path)
        parameters.check()
        assert build(parameters, own).teacher.in_channels == own
        with pytest.raises(BackboneError, match=f"must be for images of {other} channels, got one"):
            build(parameters, other)


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
        scores = predict_scores(self.model.eval(), validation)
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
    ("preprocessing", "shape", "dtype", "text"),
    [
        ({}, (4, 4), "uint16", r"must be uint8 of shape \(H, W\) or \(H, W, 3\), got uint16"),
        ({}, (4, 4, 4), "uint8", r"or \(H, W, 3\), got uint8 of \(4, 4, 4\)"),
        ({"dtype": "uint16"}, (4, 4), "int32", r"must be uint8 or uint16 of shape"),
        ({"dtype": "uint16"}, (4, 4), ">u2", r"must be uint8 or uint16 of shape"),
        ({"channels": 4}, (4, 4, 3), "uint8", r"must be uint8 of shape \(H, W, 4\), got"),
        ({"channels": 4}, (4, 4), "uint8", r"must be uint8 of shape \(H, W, 4\), got"),
    ],
)
def test_other_arrays_are_refused(preprocessing, shape, dtype, text):
    own = {"image_size": 8, "bit_depth": 16} | preprocessing
    with pytest.raises(ValueError, match=text):
        Detector(CONTENT | {"preprocessing": own}, None).predict(np.ones(shape, dtype))


@pytest.mark.parametrize("bit_depth", [10, 12, 16])
def test_a_detector_of_8_bits_gets_deep_images_as_before(tmp_path, bit_depth):
    values = deep_pixels(16, 16) >> (16 - bit_depth)
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


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("is_grey", [False, True])
def test_a_defect_is_the_same_relative_to_full_scale(kind, is_grey):
    image = random_pixels(3, 40, 50)
    image = np.repeat(image[:1], 3, axis=0) if is_grey else image
    eight, mask = add_defect(image, kind, 0.3, np.random.default_rng(3))
    deep, deep_mask = add_defect(image * np.uint16(257), kind, 0.3, np.random.default_rng(3))
    assert (eight.dtype, deep.dtype) == (np.uint8, np.uint16)
    np.testing.assert_array_equal(mask, deep_mask)
    assert np.abs(deep / 257 - eight).max() < 0.501
    assert (deep % 257 != 0).any()
    assert np.array_equal(deep[:, mask == 0] // 257, eight[:, mask == 0]) or kind != "scratch"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("is_grey", [False, True])
def test_a_defect_is_in_all_four_channels_and_where_it_is_judged(kind, is_grey):
    image = deep_pixels(4, 40, 50)
    image = np.repeat(image[:1], 4, axis=0) if is_grey else image
    changed, mask = add_defect(image, kind, 0.3, np.random.default_rng(3), channels=4)
    assert (changed.shape, changed.dtype) == (image.shape, image.dtype)
    assert (changed != image).reshape(4, -1).any(axis=1).all()
    region = np.zeros((1, 40, 50), np.uint16)
    region[:, :20] = 65535
    whole = np.concatenate([image, region])
    changed, mask = add_defect(whole, kind, 0.3, np.random.default_rng(3), channels=4)
    np.testing.assert_array_equal(changed[:, 20:], whole[:, 20:])
    np.testing.assert_array_equal(changed[4:], region)
    assert (changed[:4, :20] != image[:, :20]).any()
    assert set(mask[20:].ravel()) == {255}


def test_people_see_the_upper_8_bits_of_three_channels():
    planes = np.array([0x1234, 0xFFFF, 0x00FF, 0x8000], np.uint16).reshape(4, 1, 1)
    assert visible(planes).ravel().tolist() == [0x12, 0xFF, 0x00]
    assert visible(planes).dtype == np.uint8
    eight = random_pixels(2, 5, 4, 4)
    np.testing.assert_array_equal(visible(eight * np.uint16(257)), eight[:, :3])
    np.testing.assert_array_equal(visible(eight), eight[:, :3])


def test_thumbnails_gallery_and_overlay_are_those_of_8_bits():
    eight, maps = random_pixels(4, 5, 32, 32), np.random.default_rng(0).random((4, 32, 32), "f4")
    deep, colours = eight * np.uint16(257), eight[:, :3]
    assert thumbnails(deep, maps, [None] * 4) == thumbnails(colours, maps, [None] * 4)
    shown = [
        plot_gallery(images, maps, list("abcd"), {"all": range(4)}).subfigs[0].axes[0].images[0]
        for images in (deep, colours)
    ]
    np.testing.assert_array_equal(shown[0].get_array(), shown[1].get_array())

    def shown_over(planes):
        return overlay(np.moveaxis(planes, 0, -1), maps[0], 0.5).tobytes()

    assert shown_over(deep[0, :4]) == shown_over(deep[0, :3]) == shown_over(colours[0])
    assert (
        overlay(deep[0, 0], maps[0], 0.5).tobytes() == overlay(eight[0, 0], maps[0], 0.5).tobytes()
    )
