"""More than 8 bits, and a fourth channel: what is prepared, what models get, what people see."""

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

from anomaly_detection import models
from anomaly_detection.data import PreparedDataset
from anomaly_detection.data.decode import channels_and_depth, resize_image
from anomaly_detection.data.format import Format, common_format, visible
from anomaly_detection.data.frame import Frame
from anomaly_detection.errors import DataError
from anomaly_detection.evaluation.synthetic import FAMILIES, add_defect
from anomaly_detection.features import BackboneError, FeaturePyramid
from anomaly_detection.features.images import as_floats, judged
from anomaly_detection.features.pyramid import Normalisation
from anomaly_detection.inference.overlay import overlay
from anomaly_detection.models.efficientad.augmentation import recoloured, varied
from anomaly_detection.models.efficientad.teachers import PatchTeacher
from anomaly_detection.report.plots import plot_gallery
from anomaly_detection.report.thumbnails import thumbnails

deep_pixels = functools.partial(random_pixels, dtype="uint16")


def test_deep_grey_is_resized_by_hand_without_a_step_of_8_bits():
    # As in test_data_loader: 80 / 7 and 80 * 6 / 7, for a full scale 257 times as large.
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


def test_a_category_has_the_channels_of_most_and_the_bits_of_the_deepest(tmp_path):
    write_kinds(tmp_path)
    for names, expected in {
        "grey.png alpha.png colour.jpg": (3, "uint8"),
        "grey.png deep.png": (3, "uint16"),
        "four_8.tif": (4, "uint8"),
        "four_8.tif four.tif grey.png": (4, "uint16"),
        "four.tif grey.png": (3, "uint16"),
        "": (3, "uint8"),
    }.items():
        assert common_format([tmp_path / name for name in names.split()]) == expected, names


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


def four_channels(folder: Path, *size: int, dtype: str, **options) -> PreparedDataset:
    for i in range(12):
        write_tiff(folder / "part" / f"{i}.tif", random_pixels(*size, 4, dtype=dtype, seed=i))
    return PreparedDataset(prepare(folder, "part", image_size=32, **options), "test")


def test_what_is_not_judged_is_in_the_last_channel(tmp_path):
    arrays = four_channels(tmp_path, 32, 16, dtype="uint16", resize="fit")
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
    arrays = four_channels(tmp_path, 32, 32, dtype="uint8")
    assert (arrays.images.shape[1:], arrays.images.dtype) == ((4, 32, 32), np.uint8)
    assert arrays.region(0) is None
    assert arrays[0]["mask"].unique().tolist() == [0]


def test_integers_and_normalised_floats_become_shares_of_full_scale():
    deep = torch.tensor([0, 13107, 65535, 9]).to(torch.uint16).view(1, 4, 1, 1)
    assert as_floats(deep, 3).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert as_floats((deep.int() // 257).byte(), 3).flatten().tolist() == pytest.approx([0, 0.2, 1])
    white = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert as_floats(white.view(1, 3, 1, 1), 3).flatten().tolist() == pytest.approx([1, 1, 1])


def test_the_fourth_channel_is_normalised_by_the_others_mean():
    normalisation = Normalisation((0.1, 0.2, 0.6), (0.5, 0.25, 0.75), channels=4)
    found = normalisation(torch.ones(1, 4, 1, 1)).flatten().tolist()
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


def defect_in(image, kind, **options):
    return add_defect(image, kind, 0.3, np.random.default_rng(3), **options)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("is_grey", [False, True])
def test_a_synthetic_defect_is_the_same_in_16_bits_and_four_channels(kind, is_grey):
    image = random_pixels(4, 40, 50)
    image = np.repeat(image[:1], 4, axis=0) if is_grey else image
    eight, mask = defect_in(image[:3], kind)
    deep, deep_mask = defect_in(image[:3] * np.uint16(257), kind)
    assert (eight.dtype, deep.dtype) == (np.uint8, np.uint16)
    np.testing.assert_array_equal(mask, deep_mask)
    assert np.abs(deep / 257 - eight).max() < 0.501
    assert (deep % 257 != 0).any()
    assert np.array_equal(deep[:, mask == 0] // 257, eight[:, mask == 0]) or kind != "scratch"
    image = deep_pixels(4, 40, 50)
    image = np.repeat(image[:1], 4, axis=0) if is_grey else image
    changed, _ = defect_in(image, kind, channels=4)
    assert (changed.shape, changed.dtype) == (image.shape, image.dtype)
    assert (changed != image).reshape(4, -1).any(axis=1).all()
    region = np.zeros((1, 40, 50), np.uint16)
    region[:, :20] = 65535
    whole = np.concatenate([image, region])
    changed, mask = defect_in(whole, kind, channels=4)  # only where it is judged
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

    for own, other in ((deep[0], colours[0]), (deep[0, :3], colours[0])):
        found, expected = (overlay(np.moveaxis(x, 0, -1), maps[0], 0.5) for x in (own, other))
        assert found.tobytes() == expected.tobytes()
    found, expected = (overlay(x[0, 0], maps[0], 0.5) for x in (deep, eight))
    assert found.tobytes() == expected.tobytes()
