import numpy as np
import pytest
import torch
from builders.images import write_image
from PIL import Image
from torchvision import tv_tensors

from anomaly_detection.data import (
    MVTecDataset,
    PreparedDataset,
    get_test_transforms,
    get_train_transforms,
    prepare_category,
)
from anomaly_detection.data.decode import resize_image
from anomaly_detection.inference import Detector
from anomaly_detection.inference.runtimes import Outputs

IMAGE = tv_tensors.Image(torch.tensor([[[10, 20], [30, 40]]], dtype=torch.uint8))
MASK = tv_tensors.Mask(torch.tensor([[[0, 1], [0, 0]]], dtype=torch.uint8))


def noise(height: int, width: int):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    mask = torch.randint(0, 2, (1, height, width), generator=generator, dtype=torch.uint8)
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


@pytest.mark.parametrize(
    ("flips", "image", "mask"),
    [
        ({}, [[10, 20], [30, 40]], [[0, 1], [0, 0]]),
        ({"horizontal_flip": 1.0}, [[20, 10], [40, 30]], [[1, 0], [0, 0]]),
        ({"vertical_flip": 1.0}, [[30, 40], [10, 20]], [[0, 0], [0, 1]]),
        (
            {"horizontal_flip": 1.0, "vertical_flip": 1.0},
            [[40, 30], [20, 10]],
            [[0, 0], [1, 0]],
        ),
    ],
)
def test_flips_turn_image_and_mask_together(flips, image, mask):
    flipped, flipped_mask = get_train_transforms(2, **flips)(IMAGE, MASK)
    assert flipped.tolist() == [image]
    assert flipped_mask.tolist() == [mask]


def test_flips_of_half_probability_never_part_image_and_mask():
    torch.manual_seed(0)
    flip = get_train_transforms(2, horizontal_flip=0.5, vertical_flip=0.5)
    brightest = []
    for _ in range(40):
        _, mask = flip(image := tv_tensors.Image(MASK * 200), MASK)
        flipped, mask = flip(image, MASK)
        assert torch.equal(flipped, mask * 200)
        brightest.append(int(mask.flatten().argmax()))
    assert set(brightest) == {0, 1, 2, 3}


@pytest.mark.parametrize(("height", "width"), [(50, 70), (20, 20), (32, 48)])
def test_training_resizes_as_testing_does(height, width):
    image, mask = noise(height, width)
    tested, tested_mask = get_test_transforms(32)(image, mask)
    trained, trained_mask = get_train_transforms(32)(image, mask)
    assert tested.shape == (3, 32, 32)
    assert tested_mask.shape == (1, 32, 32)
    assert torch.equal(tested, trained)
    assert torch.equal(tested_mask, trained_mask)


def test_shrinking_averages_images_and_picks_from_masks():
    stripes = torch.tensor([0, 200], dtype=torch.uint8).repeat(24).expand(1, 48, 48)
    image, mask = get_test_transforms(16)(tv_tensors.Image(stripes), tv_tensors.Mask(stripes))
    # A triangle over 3 pixels each way weighs one colour 5 / 9; without it, stripes remain.
    assert (image[:, :, 1:-1].float() - 100).abs().max() <= 12
    assert set(mask.unique().tolist()) <= {0, 200}


def test_values_stay_whole_bytes():
    image, mask = get_test_transforms(16)(*noise(30, 30))
    assert image.dtype == mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("shape", [(50, 70, 3), (20, 20, 3), (61, 32), (32, 32), (1, 5)])
def test_resized_pixels_are_pillows_bilinear_ones(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = Image.fromarray(pixels).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    resized = resize_image(pixels, 32)
    assert (resized.dtype, resized.shape) == (np.uint8, (3, 32, 32))
    np.testing.assert_array_equal(np.moveaxis(resized, 0, -1), np.asarray(expected))


def test_resizing_by_hand():
    # Halved, each pixel weighs its own two by 3 / 8 and the two beside them by 1 / 8; at the
    # edges, where one of those is missing, the rest weighs 8 / 7 of that.
    pixels = np.array([[0, 0, 80, 80]], np.uint8).repeat(4, axis=0)
    left, right = resize_image(pixels, 2)[0, 0]
    assert (left, right) == (round(80 / 7), round(80 * 6 / 7))


def noise_of(mode):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 4096, (50, 70), dtype=np.uint16))
    colours = Image.fromarray(rng.integers(0, 256, (50, 70, 4), dtype=np.uint8))
    return colours if mode == "RGBA" else colours.convert("RGB").convert(mode)


def detector(preprocessing):
    """One that notes what its model is given, in `images`."""
    content = {
        "threshold": 0.5,
        "calibration_scores": [0.1],
        "preprocessing": preprocessing,
        "parameters": {},
        "provenance": {},
    }
    images = []

    def note(pixels):
        images.append(torch.tensor(pixels))
        return Outputs(np.zeros(1), np.zeros(1), np.zeros(1))

    detector = Detector(content, note)
    detector.images = images
    return detector


@pytest.mark.parametrize(
    ("mode", "name", "orientation"),
    [
        ("RGB", "a.png", None),
        ("RGB", "a.jpg", 6),  # to be turned by 90 degrees
        ("L", "a.bmp", None),
        ("RGBA", "a.png", None),
        ("P", "a.png", None),
        ("1", "a.tif", None),
        ("I;16", "a.png", None),
    ],
)
def test_pipeline_detector_and_data_set_see_the_same_pixels_of_a_file(
    tmp_path, mode, name, orientation
):
    root, image = tmp_path / "data", noise_of(mode)
    for i in range(4):
        texture = np.full((8, 8), i, np.uint8)
        write_image(root / "part" / "train" / "good" / f"{i}.png", texture)
    path = root / "part" / "test" / "bad" / name
    path.parent.mkdir(parents=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
        image.save(path, exif=exif)
    else:
        image.save(path)
    options = {"validation_fraction": 0.25, "calibration_fraction": 0.25, "seed": 0}
    prepare_category(root, "part", tmp_path / "out", image_size=32, bit_depth=12, **options)
    arrays = PreparedDataset(tmp_path / "out", "test")
    (prepared,) = (item for item in arrays if item["label"])
    (read,) = MVTecDataset(root, "part", "test", get_test_transforms(32), bit_depth=12)
    judging = detector(arrays.preprocessing(bit_depth=12))
    judging.predict(path)
    assert prepared["image"].shape == (3, 32, 32)
    assert prepared["image"].float().std() > 5
    assert torch.equal(read["image"], prepared["image"])
    assert torch.equal(judging.images[0][0], prepared["image"])
