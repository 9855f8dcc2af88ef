"""What happens to an image and its mask before they become a batch."""

from torchvision.transforms import v2


def get_test_transforms(image_size: int) -> v2.Transform:
    """Resize to a square of `image_size` pixels: images bilinear with antialiasing, masks nearest.

    Values stay uint8: normalisation is a part of the model.
    """
    return v2.Compose([_resize(image_size)])


def get_train_transforms(
    image_size: int, horizontal_flip: float = 0.0, vertical_flip: float = 0.0
) -> v2.Transform:
    """The same resize as in testing, then flips with the given probabilities in [0, 1]."""
    flips = [v2.RandomHorizontalFlip(horizontal_flip), v2.RandomVerticalFlip(vertical_flip)]
    return v2.Compose([_resize(image_size), *(flip for flip in flips if flip.p > 0)])


def _resize(image_size: int) -> v2.Transform:
    return v2.Resize((image_size, image_size), antialias=True)
