"""More than 8 bits, and a fourth channel: from the files to the verdicts."""

import io
import json
import re
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from builders.images import write_image
from PIL import Image

from anomaly_detection import Detector, models
from anomaly_detection.data import (
    AuxiliaryDataset,
    PreparedDataset,
    create_dataloader,
    prepare_category,
)
from anomaly_detection.data.audit import residuals, small_images
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

RNG = np.random.default_rng(0)
SPLIT = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "seed": 0}


def pixels(*shape: int, dtype="uint16") -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def write_tiff(path: Path, values: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiff(values, **options))
    return path


FOUR = {"photometric": "rgb", "extrasamples": ["unspecified"]}
GREYS = {"photometric": "minisblack", "planarconfig": "contig"}
OPTIONS = {(): {}, (3,): {"photometric": "rgb"}, (4,): FOUR}  # by the shape of a pixel


# What is read.


@pytest.mark.parametrize(
    ("bit_depth", "value", "expected"),
    [
        (16, 129, 129),
        (16, 65535, 65535),
        (12, 1, 16),  # 16.004
        (12, 4095, 65535),
        (10, 1, 64),  # 64.06
        (10, 512, 32800),  # 32799.53
        (9, 511, 65535),
    ],
)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3), (3, 4, 4)], ids=str)
def test_values_are_scaled_to_16_bits(bit_depth, value, expected, shape):
    content = tiff(np.full(shape, value, np.uint16), **OPTIONS[shape[2:]])
    found = decode_image(content, "a", bit_depth, "uint16")
    assert (found.shape, found.dtype) == (shape, np.uint16)
    assert set(found.ravel().tolist()) == {expected}
    eight = decode_image(content, "a", bit_depth)
    assert (eight.dtype, int(eight.max())) == (np.uint8, round(value * 255 / (2**bit_depth - 1)))


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (pixels(5, 7), {}),
        (pixels(5, 7), {"byteorder": ">"}),
        (pixels(5, 7, 3), {"photometric": "rgb"}),
        (pixels(5, 7, 3), {"photometric": "rgb", "byteorder": ">"}),
        (pixels(5, 7, 3), {"photometric": "rgb", "bigtiff": True}),
        (pixels(5, 7, 3), {"photometric": "rgb", "compression": "zlib", "predictor": True}),
        (pixels(1, 7, 3), {"photometric": "rgb"}),
        (pixels(64, 64, 3), {"photometric": "rgb", "tile": (16, 16)}),
        (pixels(5, 7, 3), GREYS),
        (pixels(5, 7, 4), FOUR),
        (pixels(5, 7, 4), GREYS),
        (pixels(5, 7, 4, dtype="uint8"), FOUR),
        (pixels(5, 7, 4, dtype="uint8"), GREYS),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_tiffs_are_read_whole(values, options):
    assert np.array_equal(decode_image(tiff(values, **options), "a", dtype="uint16"), values)
    if values.ndim == 3:
        planar = np.moveaxis(values, -1, 0)
        content = tiff(planar, **options | {"planarconfig": "separate"})
        assert np.array_equal(decode_image(content, "a", dtype="uint16"), values)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_alpha_is_dropped(kind, dtype):
    values = pixels(5, 7, 4, dtype=dtype)
    rgb = tiff(values, photometric="rgb", extrasamples=[kind])
    if (kind, dtype) != ("assocalpha", "uint8"):  # Pillow divides by it
        assert np.array_equal(decode_image(rgb, "a", dtype=dtype), values[..., :3])
    five = tiff(pixels(5, 7, 5, dtype=dtype), photometric="rgb", extrasamples=["unspecified", kind])
    assert decode_image(five, "a", dtype=dtype).shape == (5, 7, 4)
    file = io.BytesIO()
    Image.fromarray(pixels(5, 7, 4, dtype="uint8")).save(file, "PNG")
    assert decode_image(file.getvalue(), "a").shape == (5, 7, 3)


def test_alpha_beside_deep_grey_is_dropped():
    values = pixels(5, 7, 2)
    content = tiff(values, **GREYS, extrasamples=["unassalpha"])
    assert np.array_equal(decode_image(content, "a", dtype="uint16"), values[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_colours_are_turned_upright_as_pillow_turns_others(orientation):
    values = pixels(3, 5, 3, dtype="uint8")
    options = {"photometric": "rgb", "extratags": [(274, "H", 1, orientation, True)]}
    expected = decode_image(tiff(values, **options), "a")
    deep = decode_image(tiff(values * np.uint16(257), **options), "a", dtype="uint16")
    assert np.array_equal(deep, expected * np.uint16(257))


def test_the_first_page_counts():
    first, second = pixels(5, 7, 3), pixels(5, 7, 3)
    content = tiff(np.stack([first, second]), photometric="rgb")
    assert np.array_equal(decode_image(content, "a", dtype="uint16"), first)


def with_tags(content: bytes, tags: dict[int, int]) -> bytes:
    """A little-endian TIFF in which single numbers have other values."""
    for tag, value in tags.items():
        entry = re.escape(struct.pack("<H", tag)) + b"[\x03\x04]\x00\x01\x00\x00\x00"
        at = re.search(entry, content, re.DOTALL).end()
        content = content[:at] + struct.pack("<I", value) + content[at + 4 :]
    return content


def compressed(values: np.ndarray, by: str) -> bytes:
    """Four channels in a compression that tifffile does not write by itself."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", compression=by)
    return with_tags(file.getvalue(), {338: 0})


@pytest.mark.parametrize("by", ["packbits", "tiff_deflate", "tiff_adobe_deflate"])
def test_compressed_tiffs_are_read(by):
    values = pixels(5, 7, 4, dtype="uint8")
    assert np.array_equal(decode_image(compressed(values, by), "a"), values)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (tiff(pixels(5, 7, 2), **GREYS), "must have 1, 3 or 4 channels besides alpha, got 2"),
        (tiff(pixels(5, 7, 5), **GREYS), "must have 1, 3 or 4 channels besides alpha, got 5"),
        (tiff(pixels(5, 7, 4), photometric="separated"), "colours of 16 bits must be in a TIFF as"),
        (tiff(np.ones((5, 7, 3), np.float32), photometric="rgb"), "8 or 16 bits, got floating"),
        (tiff(np.full((5, 7, 3), -1, np.int16), photometric="rgb"), "must not be negative, got -1"),
        (tiff(np.full((5, 7, 3), 4096, np.uint16), photometric="rgb"), "at most 4095 .* got 4096"),
        (tiff(pixels(5, 7, 4), **FOUR)[:-9], "must be a whole image, but cannot be decoded"),
        (tiff(pixels(5, 7, 4), **FOUR)[:60], "must be a whole image, but cannot be decoded"),
        (tiff(pixels(5, 7, 4), **FOUR)[:6], "must be a whole image, but cannot be decoded"),
        (
            with_tags(tiff(pixels(5, 7, 4), **FOUR), {256: 65535, 257: 65535}),
            "must have at most 100,000,000 pixels",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_whole_is_refused_in_a_line(content, text):
    with pytest.raises(DataError, match=f"^a.tif: .*{text}") as error:
        decode_image(content, "a.tif", 12, "uint16")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs is there")
def test_a_compression_that_needs_a_package_is_named():
    with pytest.raises(DataError, match=r"^a.tif: its compression needs a package, pip install im"):
        decode_image(compressed(pixels(5, 7, 4, dtype="uint8"), "tiff_lzw"), "a.tif")


def test_grey_is_resized_without_a_step_of_8_bits_by_hand():
    # As in test_transforms: 80 / 7 and 80 * 6 / 7, for a full scale 257 times as large.
    values = np.array([[0, 0, 80 * 257, 80 * 257]], np.uint16).repeat(4, axis=0)
    left, right = resize_image(values, 2)[0, 0]
    assert (left, right) == (round(80 * 257 / 7), round(80 * 257 * 6 / 7))


@pytest.mark.parametrize("size", [9, 32, 80])
@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3), (40, 50, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_each_channel_is_resized_like_floats(shape, size, dtype):
    values = pixels(*shape, dtype=dtype)
    found = resize_image(values, size)
    assert (found.shape, found.dtype) == ((shape[2] if shape[2:] else 3, size, size), dtype)
    for plane, own in zip(found, np.moveaxis(np.atleast_3d(values), -1, 0), strict=False):
        floats = Image.fromarray(own.astype(np.float32))
        expected = np.asarray(floats.resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(plane - expected).max() < 1.01  # it rounds after each of two passes


# The format of a category.


def write_kinds(folder: Path) -> dict[Path, tuple[int, bool]]:
    """Files of each kind, with their channels and whether they are deep."""
    return {
        write_image(folder / "grey.png", pixels(9, 9, dtype="uint8")): (3, False),
        write_image(folder / "alpha.png", pixels(9, 9, 4, dtype="uint8")): (3, False),
        write_image(folder / "colour.jpg", pixels(9, 9, 3, dtype="uint8")): (3, False),
        write_image(folder / "deep.png", pixels(9, 9)): (3, True),
        write_tiff(folder / "deep.tif", pixels(9, 9)): (3, True),
        write_tiff(folder / "rgb.tif", pixels(9, 9, 3), photometric="rgb"): (3, True),
        write_tiff(folder / "four.tif", pixels(9, 9, 4), **FOUR): (4, True),
        write_tiff(folder / "four_8.tif", pixels(9, 9, 4, dtype="uint8"), **FOUR): (4, False),
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
        (["grey.png", "alpha.png", "colour.jpg"], (3, "uint8")),
        (["grey.png", "deep.png"], (3, "uint16")),
        (["four_8.tif"], (4, "uint8")),
        (["four_8.tif", "four.tif", "grey.png"], (4, "uint16")),
        (["four.tif", "grey.png"], (3, "uint16")),
        ([], (3, "uint8")),
    ],
    ids=str,
)
def test_a_category_has_the_channels_of_most_and_the_bits_of_the_deepest(tmp_path, names, expected):
    write_kinds(tmp_path)
    assert common_format([tmp_path / name for name in names]) == expected


def prepare(folder: Path, image_size: int = 32, bit_depth: int = 16, **options) -> Path:
    output = folder.with_name("prepared")
    size = {"image_size": image_size, "bit_depth": bit_depth}
    prepare_category(folder.parent, folder.name, output, **size, **SPLIT | options)
    return output


def test_images_of_8_bits_are_scaled_among_deep_ones(tmp_path):
    values = pixels(32, 32, 3, dtype="uint8")
    for i in range(12):
        write_image(tmp_path / "part" / f"{i:02}.png", np.roll(values, i, axis=0))
    deep = pixels(32, 32)
    write_image(tmp_path / "part" / "deep.png", deep)
    output, images = prepare(tmp_path / "part"), {}
    for splits in (["test"], ["fit", "validation", "calibration"]):
        arrays = PreparedDataset(output, splits)
        images |= {row["path"]: x for row, x in zip(arrays.rows, arrays.images, strict=True)}
        assert arrays.images.dtype == np.uint16
    assert len(images) == 13
    assert np.array_equal(np.moveaxis(images["00.png"], 0, -1), values.astype(int) * 257)
    assert np.array_equal(images["deep.png"], np.stack([deep] * 3))
    assert arrays.channels == 3
    assert arrays.preprocessing(16)["dtype"] == "uint16"
    assert arrays[0]["image"].dtype == torch.uint16


def test_images_of_other_channels_are_all_listed(tmp_path):
    for i in range(9):
        write_tiff(tmp_path / "part" / f"{i}.tif", pixels(9, 9, 4), **FOUR)
    write_image(tmp_path / "part" / "grey.png", pixels(9, 9, dtype="uint8"))
    write_image(tmp_path / "part" / "alpha.png", pixels(9, 9, 4, dtype="uint8"))
    (tmp_path / "part" / "text.png").write_text("no image")
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "part")
    assert not (tmp_path / "prepared").exists()
    lines = sorted(str(error.value).splitlines())
    assert [line.split(": ")[0].split("/")[-1] for line in lines] == [
        "alpha.png",
        "grey.png",
        "text.png",
    ]
    assert "must have 4 channels like the images of its category, got 3 (grey counts as" in lines[0]


def test_what_is_not_judged_is_in_the_last_channel(tmp_path):
    for i in range(12):
        write_tiff(tmp_path / "part" / f"{i}.tif", pixels(32, 16, 4), **FOUR)
    output = prepare(tmp_path / "part", resize="fit")
    arrays = PreparedDataset(output, "test")
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
        write_tiff(tmp_path / "part" / f"{i}.tif", pixels(32, 32, 4, dtype="uint8"), **FOUR)
    arrays = PreparedDataset(prepare(tmp_path / "part"), "test")
    assert (arrays.images.shape[1:], arrays.images.dtype) == ((4, 32, 32), np.uint8)
    assert arrays.region(0) is None
    assert arrays[0]["mask"].unique().tolist() == [0]


def test_a_format_survives_a_file_and_older_files_have_none():
    frame = Frame([0, 0, 4, 4], "fit", format=Format(4, "uint16"))
    copy = Frame.from_options(json.loads(json.dumps(frame.options)))
    assert (copy.format, copy.num_channels) == (frame.format, 5)
    assert Frame.from_options({"crop": None}).format == Format(3, "uint8")


@pytest.mark.parametrize("is_unique", [True, False])
def test_near_duplicates_are_the_same_at_16_bits(tmp_path, is_unique):
    values = RNG.integers(0, 256, (30, 3, 128, 128)).astype(np.uint8)
    if not is_unique:
        values[:] = values[0]
        values[29, 0, 5, 5] ^= 1  # too little
    found = []
    for factor in (np.uint8(1), np.uint16(257)):
        np.save(tmp_path / "images.npy", values * factor)
        found.append(residuals(small_images([tmp_path / "images.npy"]), torch.arange(30) < 20))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert bool(found[0][29].any()) == is_unique


def test_auxiliary_images_get_their_luminance_as_the_fourth_channel(tmp_path):
    write_image(tmp_path / "a.png", np.full((8, 8, 3), (200, 100, 50), np.uint8))
    write_image(tmp_path / "b.png", np.full((8, 8), 70, np.uint8))
    found = [x["image"] for x in map(AuxiliaryDataset(tmp_path, 4, channels=4).__getitem__, (0, 1))]
    assert found[0][:, 0, 0].tolist() == [200, 100, 50, 124]  # 59.8 + 58.7 + 5.7
    assert found[1][:, 0, 0].tolist() == [70] * 4
    assert AuxiliaryDataset(tmp_path, 4)[0]["image"].shape == (3, 4, 4)


# What models make of it.


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
        torch.save(timm.create_model(backbone).state_dict(), tmp_path / "weights.pth")
        weights = str(tmp_path / "weights.pth")
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


@pytest.mark.parametrize("seed", range(8))
def test_a_fourth_channel_is_changed_like_a_grey_image(seed):
    def change(by, images):
        torch.manual_seed(seed)
        return by(images)

    images = torch.rand(2, 4, 16, 16)
    colours, fourth = images[:, :3], images[:, 3:]
    found = change(recoloured, images)
    assert torch.equal(found[:, :3], change(recoloured, colours))
    as_grey = change(recoloured, fourth.repeat(1, 3, 1, 1))
    torch.testing.assert_close(found[:, 3:], as_grey[:, :1], rtol=0, atol=1e-3)
    found = change(varied, images)
    assert torch.equal(found[:, :3], change(varied, colours))
    as_grey = change(varied, fourth.repeat(1, 3, 1, 1))
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


# From files to verdicts.

STEP = 1000  # a difference of one part in so many
SHAPES_AND_BITS = [
    ((48, 48), 10),
    ((48, 48), 12),
    ((48, 48), 16),
    ((48, 48, 3), 16),
    ((48, 48, 4), 12),
    ((48, 48, 4), 16),
]


def write_levels(path: Path, levels: np.ndarray, bits: int, **square) -> Path:
    """Whole levels of 8 bits as so many bits, in a square a thousandth brighter."""
    values = np.rint(levels * (2**bits - 1) / 255).astype(np.uint16)
    if square:
        values[10:30, 10:30, ...] += round((2**bits - 1) / STEP)
    return write_tiff(path, values, **OPTIONS[levels.shape[2:]])


class Fitted:
    """A small Gaussian model of deep TIFFs, its detector and exports.

    `files` are two that differ by a thousandth in a square.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], bits: int) -> None:
        self.shape, self.bits = shape, bits
        rng = np.random.default_rng(1)
        for i in range(24):
            levels = rng.normal(128, 8, shape).round()
            write_levels(folder / "part" / f"{i}.tif", levels, bits)
        self.files = [write_levels(folder / "plain.tif", levels, bits)]
        self.files.append(write_levels(folder / "changed.tif", levels, bits, square=True))
        prepared = prepare(folder / "part", bit_depth=bits)
        self.arrays = PreparedDataset(prepared, "fit")
        validation = create_dataloader(PreparedDataset(prepared, "validation"))
        parameters = models.parameters("gaussian")(backbone="test_resnet", weights="random")
        torch.manual_seed(0)
        spec = models.spec("gaussian")
        self.model = spec.build(parameters, self.arrays.channels)
        context = FitContext(
            create_dataloader(self.arrays), validation, folder, torch.device("cpu")
        )
        spec.fit(self.model, parameters, context)
        scores = predict_scores(self.model.eval(), validation)
        self.path = folder / "part.pt"
        self.content = {
            "model": snapshot("gaussian", self.model),
            "threshold": float(scores.max()),
            "calibration_scores": scores.tolist(),
            "preprocessing": self.arrays.preprocessing(bits),
            "precision": "float32",
            "parameters": {},
            "provenance": {},
        }
        save_detector(self.path, **self.content)
        self.export = folder / "export"


@pytest.fixture(scope="module", params=SHAPES_AND_BITS, ids=str)
def fitted(request, tmp_path_factory) -> Fitted:
    return Fitted(tmp_path_factory.mktemp("deep"), *request.param)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Fitted:
    return Fitted(tmp_path_factory.mktemp("four"), (48, 48, 4), 16)


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Fitted:
    return Fitted(tmp_path_factory.mktemp("grey"), (48, 48), 16)


def inputs(content: dict, files: list[Path]) -> list[np.ndarray]:
    """What a detector's model gets of files."""
    seen: list[np.ndarray] = []

    def note(images):
        seen.extend(images)
        return Outputs(*np.zeros((3, 1)))

    list(Detector(content, note).predict_many(files))
    return seen


def test_a_difference_of_a_thousandth_reaches_the_model(fitted):
    plain, changed = inputs(fitted.content, fitted.files)
    assert (plain.dtype, plain.shape) == (np.uint16, fitted.arrays.images.shape[1:])
    difference = changed.astype(int) - plain
    inside = difference[:, 8:18, 8:18]  # at 32 pixels instead of 48
    step = round((2**fitted.bits - 1) / STEP) * 65535 / (2**fitted.bits - 1)
    assert np.abs(inside - step).max() <= 2
    assert step == pytest.approx(65535 / STEP, rel=0.05)
    assert not difference[:, 24:, 24:].any()
    eight = fitted.content["preprocessing"] | {"dtype": "uint8"}
    plain, changed = inputs(fitted.content | {"preprocessing": eight}, fitted.files)
    assert plain.dtype == np.uint8
    assert np.array_equal(plain, changed)  # with a step of 8 bits on the way, it is lost


def test_a_difference_of_a_thousandth_changes_the_score_in_every_runtime(fitted):
    export_detector(fitted.path, ["onnx", "openvino"], fitted.export, fitted.arrays.pictures())
    found = {}
    for path in (fitted.path, fitted.export / "model.onnx", fitted.export / "model.xml"):
        detector = Detector.load(path)
        plain, changed = predictions = [detector.predict(file) for file in fitted.files]
        assert abs(changed.score - plain.score) > 1e-4
        found[path.suffix] = [(x.score, x.verdict, x.p_value) for x in predictions]
    for other in (found[".onnx"], found[".xml"]):
        for ours, theirs in zip(other, found[".pt"], strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
            assert ours[1:] == theirs[1:]
    description = json.loads((fitted.export / "model.json").read_text())
    channels = 4 if fitted.shape[2:] == (4,) else 3
    assert description["input"]["dtype"] == "uint16"
    assert description["input"]["shape"] == ["batch", channels, 32, 32]
    assert description["preprocessing"]["bit_depth"] == fitted.bits


def test_the_evaluation_and_a_file_give_the_same_score(fitted):
    image = fitted.arrays.__getitems__([0])["image"]
    with torch.inference_mode():
        expected = fitted.model(image)["pred_score"].item()
    file = fitted.path.with_name("part") / fitted.arrays.rows[0]["path"]
    found = Detector.load(fitted.path).predict(file).score
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_faint_defect_is_found_where_parts_vary_less(tmp_path):
    """All good images and the defect are one flat level in 8 bits."""
    rng = np.random.default_rng(0)
    for i in range(24):
        values = 30_069 + rng.integers(-8, 9, (48, 48))
        write_tiff(tmp_path / "part" / f"{i}.tif", values.astype(np.uint16))
    values[10:30, 10:30] += round(65535 / STEP)
    defect = write_tiff(tmp_path / "defect.tif", values.astype(np.uint16))
    assert np.ptp(decode_image(defect.read_bytes(), "a")) == 0
    prepared = prepare(tmp_path / "part")
    loaders = [create_dataloader(PreparedDataset(prepared, x)) for x in ("fit", "validation")]
    parameters = models.parameters("gaussian")(backbone="test_resnet", weights="random")
    spec = models.spec("gaussian")
    torch.manual_seed(0)
    model = spec.build(parameters)
    spec.fit(model, parameters, FitContext(*loaders, tmp_path, torch.device("cpu")))
    arrays = PreparedDataset(prepared, "calibration")
    normal = predict_scores(model.eval(), create_dataloader(arrays))
    seen = inputs({**CONTENT, "preprocessing": arrays.preprocessing(16)}, [defect])
    with torch.inference_mode():
        score = model(torch.from_numpy(np.stack(seen)))["pred_score"].item()
    assert score > 2 * normal.max()


CONTENT = {"threshold": 0.0, "calibration_scores": [0.0], "parameters": {}, "provenance": {}}


def test_a_defect_in_the_fourth_channel_alone_is_found(four):
    detector = Detector.load(four.path)
    values = tifffile.imread(four.files[0])
    values[10:30, 10:30, 3] += 6_000
    assert detector.predict(four.files[0]).verdict == "normal"
    assert detector.predict(values).verdict == "anomalous"


def test_pictures_of_other_channels_are_refused_by_name(four, grey, tmp_path):
    for own, other, channels in ((four, grey, 4), (grey, four, 3)):
        detector = Detector.load(own.path)
        text = f"plain.tif: must have {channels} channels like the images of its category"
        with pytest.raises(DataError, match=text):
            detector.predict(other.files[0])
        good, error = detector.predict_many([own.files[0], other.files[0]])
        assert good.score == detector.predict(own.files[0]).score
        assert isinstance(error, DataError)


def test_arrays_may_have_16_bits(four, grey):
    values = tifffile.imread(four.files[0])
    loaded = Detector.load(four.path)
    assert loaded.predict(values).score == loaded.predict(four.files[0]).score
    loaded = Detector.load(grey.path)
    deep = tifffile.imread(grey.files[0])
    assert loaded.predict(deep).score == loaded.predict(grey.files[0]).score
    eight = pixels(20, 20, dtype="uint8")
    assert loaded.predict(eight).score == loaded.predict(eight * np.uint16(257)).score


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
def test_a_detector_of_8_bits_gets_deep_pictures_as_before(tmp_path, bit_depth):
    values = RNG.integers(0, 2**bit_depth, (16, 16), dtype=np.uint16)
    path = write_tiff(tmp_path / "a.tif", values)
    own = {"preprocessing": {"image_size": 16, "bit_depth": bit_depth}}
    (seen,) = inputs(CONTENT | own, [path])
    expected = np.rint(values * (255 / (2**bit_depth - 1)))
    assert seen.dtype == np.uint8
    assert np.array_equal(seen, np.stack([expected] * 3))


@pytest.mark.parametrize("name", ["openvino_resize", "openvino_int8"])
def test_what_openvino_has_for_8_bits_alone_is_refused_for_16(four, tmp_path, name):
    with pytest.raises(UserError, match=f"must be without {name} for a detector of 16 bits"):
        export_detector(four.path, ["onnx", name], tmp_path / "x", np.zeros(0))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_int8_and_a_resize_in_the_graph_take_four_channels_of_8_bits(four, tmp_path):
    preprocessing = four.content["preprocessing"] | {"dtype": "uint8"}
    save_detector(tmp_path / "part.pt", **four.content | {"preprocessing": preprocessing})
    names = ["openvino_int8", "openvino_resize"]
    pictures = (four.arrays.pictures() >> 8).astype(np.uint8)
    export_detector(tmp_path / "part.pt", names, tmp_path / "x", pictures)
    square = np.moveaxis(np.tile(pictures, 2), 1, -1)[:, :, 16:48]
    square[:4, 8:24, 8:24, 3] += np.arange(25, 125, 25, np.uint8)[:, None, None]
    judge = [Detector.load(x) for x in (tmp_path / "part.pt", tmp_path / "x" / "model_int8.xml")]
    judge.append(Detector.load(tmp_path / "x" / "model_resize.xml"))
    expected, *found = ([x.score for x in own.predict_many(square)] for own in judge)
    for scores in (expected, *found):
        assert min(scores[:4]) > 2 * max(scores[4:])
    assert found[1] == pytest.approx(expected, rel=0.05, abs=0.05)


def test_what_is_judged_is_the_same_in_every_runtime(four, tmp_path):
    preprocessing = four.content["preprocessing"] | {"resize": "fit"}
    save_detector(tmp_path / "part.pt", **four.content | {"preprocessing": preprocessing})
    export_detector(tmp_path / "part.pt", ["onnx", "openvino"], tmp_path / "x", np.zeros(0))
    input_ = json.loads((tmp_path / "x" / "model.json").read_text())["input"]
    assert input_["shape"] == ["batch", 5, 32, 32]
    assert input_["channels"].startswith("as in the file, without alpha; 65535 where")
    values = tifffile.imread(four.files[1])[:30]
    paths = (tmp_path / "part.pt", tmp_path / "x" / "model.onnx", tmp_path / "x" / "model.xml")
    expected, *found = (Detector.load(path).predict(values) for path in paths)
    assert not expected.anomaly_map[:6].any()
    assert expected.anomaly_map[6:26].any()
    for prediction in found:
        assert prediction.score == pytest.approx(expected.score, rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(prediction.anomaly_map, expected.anomaly_map, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_of_16_bits_are_made_on_a_gpu(four):
    own = PreparedDataset(four.arrays.folder, "fit", "cuda").__getitems__([2, 0])
    expected = four.arrays.__getitems__([2, 0])
    assert own["image"].dtype == torch.uint16
    assert torch.equal(own["image"].cpu(), expected["image"])
    assert torch.equal(as_floats(own["image"], 4).cpu(), as_floats(expected["image"], 4))
    assert judged(own["image"], 3).cpu().equal(judged(expected["image"], 3))


# Synthetic defects, and what people look at.


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("is_grey", [False, True])
def test_a_defect_is_the_same_relative_to_full_scale(kind, is_grey):
    image = pixels(3, 40, 50, dtype="uint8")
    image = np.repeat(image[:1], 3, axis=0) if is_grey else image
    eight, mask = add_defect(image, kind, 0.3, np.random.default_rng(3))
    deep, deep_mask = add_defect(image * np.uint16(257), kind, 0.3, np.random.default_rng(3))
    assert (eight.dtype, deep.dtype) == (np.uint8, np.uint16)
    assert np.array_equal(mask, deep_mask)
    assert np.abs(deep / 257 - eight).max() < 0.501
    assert (deep % 257 != 0).any()
    assert np.array_equal(deep[:, mask == 0] // 257, eight[:, mask == 0]) or kind != "scratch"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("is_grey", [False, True])
def test_a_defect_is_in_all_four_channels_and_where_it_is_judged(kind, is_grey):
    image = pixels(4, 40, 50)
    image = np.repeat(image[:1], 4, axis=0) if is_grey else image
    changed, mask = add_defect(image, kind, 0.3, np.random.default_rng(3), channels=4)
    assert (changed.shape, changed.dtype) == (image.shape, image.dtype)
    assert (changed != image).reshape(4, -1).any(axis=1).all()
    region = np.zeros((1, 40, 50), np.uint16)
    region[:, :20] = 65535
    whole = np.concatenate([image, region])
    changed, mask = add_defect(whole, kind, 0.3, np.random.default_rng(3), channels=4)
    assert np.array_equal(changed[:, 20:], whole[:, 20:])
    assert np.array_equal(changed[4:], region)
    assert (changed[:4, :20] != image[:, :20]).any()
    assert set(mask[20:].ravel()) == {255}


def test_people_see_the_upper_8_bits_of_three_channels():
    planes = np.array([0x1234, 0xFFFF, 0x00FF, 0x8000], np.uint16).reshape(4, 1, 1)
    assert visible(planes).ravel().tolist() == [0x12, 0xFF, 0x00]
    assert visible(planes).dtype == np.uint8
    eight = pixels(2, 5, 4, 4, dtype="uint8")
    assert np.array_equal(visible(eight * np.uint16(257)), eight[:, :3])
    assert np.array_equal(visible(eight), eight[:, :3])


def test_thumbnails_gallery_and_overlay_are_those_of_8_bits():
    eight, maps = pixels(4, 5, 32, 32, dtype="uint8"), RNG.random((4, 32, 32), np.float32)
    deep = eight * np.uint16(257)
    assert thumbnails(deep, maps, [None] * 4) == thumbnails(eight[:, :3], maps, [None] * 4)
    shown = [
        plot_gallery(images, maps, list("abcd"), {"all": range(4)}).subfigs[0].axes[0].images[0]
        for images in (deep, eight[:, :3])
    ]
    assert np.array_equal(shown[0].get_array(), shown[1].get_array())
    for own, other in ((deep[0, :4], eight[0, :3]), (deep[0, :3], eight[0, :3])):
        pictures = [overlay(np.moveaxis(x, 0, -1), maps[0], 0.5) for x in (own, other)]
        assert pictures[0].tobytes() == pictures[1].tobytes()
    pictures = [overlay(x[0, 0], maps[0], 0.5) for x in (deep, eight)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
