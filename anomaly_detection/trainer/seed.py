"""One seed for all randomness."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices, and select deterministic algorithms.

    Operations without a deterministic GPU version warn and run anyway.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, other libraries draw from the global generator
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
