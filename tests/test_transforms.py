import pytest
import torch
from torchvision import tv_tensors

from anomaly_detection.data import get_test_transforms, get_train_transforms

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
