"""Images as models get them: of 8 or 16 bits, perhaps with a last channel for what is judged."""

import torch
from torch import Tensor

FULL_SCALE = {torch.uint8: 255, torch.uint16: 65535}


def as_floats(images: Tensor, channels: int) -> Tensor:
    """Images (N, channels or more, H, W) without what follows these channels, in [0, 1].

    uint8 and uint16 are divided by their full scale; floats stay as they are.
    """
    images = images[:, :channels]
    scale = FULL_SCALE.get(images.dtype)
    return images.float() / scale if scale else images


def judged(images: Tensor, channels: int) -> Tensor | None:
    """Where images are judged, bool (N, 1, H, W): where a channel after these is not 0.

    None for everywhere, if there is none.
    """
    if images.shape[1] <= channels:
        return None
    # As floats, since PyTorch compares no uint16; OpenVINO cannot load a bool() of a slice.
    return images[:, channels:].float() > 0
