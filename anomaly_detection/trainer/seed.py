"""One seed for everything random."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices, and choose deterministic algorithms.

    Operations that have no deterministic version on a GPU warn and run all the same.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, the global generator is what other libraries draw from
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
