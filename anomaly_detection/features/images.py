"""Images as models get them: of 8 or 16 bits, perhaps with a last channel for what is judged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_detection.data.format import IMAGENET, per_channel

FULL_SCALE = {torch.uint8: 255, torch.uint16: 65535}
FAR = 20  # deviations; normalised images are nearer, those of 0 to 255 are not


def check_images(images: Tensor, channels: int, size: Sequence[int] | None) -> None:
    """Refuse images that a model would give meaningless scores.

    Costs nothing where they are integers, and leaves no trace in an exported graph.

    Args:
        images: What the model is given.
        channels: What it takes; there may be one more, for what is judged.
        size: Height and width that it takes; None if that is not known.

    Raises:
        ValueError: Shape or dtype are others, or floats are not normalised.
    """
    height, width = size or ("H", "W")
    is_known = images.dim() == 4 and images.shape[1] in (channels, channels + 1)
    if not is_known or (size and tuple(images.shape[-2:]) != tuple(size)):
        raise ValueError(
            f"images must have the shape (N, {channels}, {height}, {width}) of those that the "
            "model was fitted on, perhaps with a further channel for what is judged, got "
            f"{tuple(images.shape)}; resize them as `Detector.predict` does."
        )
    if images.dtype in FULL_SCALE:
        return
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(f"images must be uint8, uint16 or normalised floats, got {kind}.")
    low, high = images[:, :channels].float().aminmax()
    if not (low >= -FAR and high <= FAR):  # also if one is not a number
        raise ValueError(
            f"images must be normalised if they are floats, got {low:.3g} to {high:.3g}; use "
            "`get_test_transforms`, or keep the file's integers."
        )


def as_floats(images: Tensor, channels: int) -> Tensor:
    """Images (N, channels or more, H, W) without what follows these channels, in [0, 1].

    uint8 and uint16 are divided by their full scale. Floats must be normalised with ImageNet's mean
    and deviation, as `get_test_transforms` does; this is undone.
    """
    images = images[:, :channels]
    if scale := FULL_SCALE.get(images.dtype):
        return images.float() / scale
    mean, deviation = (
        torch.tensor(per_channel(x, channels)).view(1, -1, 1, 1).to(images) for x in IMAGENET
    )
    return images * deviation + mean


def judged(images: Tensor, channels: int) -> Tensor | None:
    """Where images are judged, bool (N, 1, H, W): where a channel after these is not 0.

    None for everywhere, if there is none.
    """
    if images.shape[1] <= channels:
        return None
    # As floats, since PyTorch compares no uint16; OpenVINO cannot load a bool() of a slice.
    return images[:, channels:].float() > 0
