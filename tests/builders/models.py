"""What models are fitted to, small; and the model of docs/adding-a-model.md, as its readers would
write it."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomaly_detection import models
from anomaly_detection.models import FitContext, snapshot, spec

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
CPU = torch.device("cpu")


def write_autoencoder(folder: Path) -> Path:
    """Write the page's files into a folder of models; returns the model's folder."""
    files = re.findall(
        r"^`(autoencoder/\w+\.py)`\n\n```python\n(.*?)```", PAGE.read_text(), re.M | re.S
    )
    for name, code in [*files, ("autoencoder/__init__.py", "")]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    return folder / "autoencoder"


@contextmanager
def toy_model(folder: Path) -> Iterator[None]:
    """The page's model beside the library's."""
    write_autoencoder(folder)
    models.__path__.append(str(folder))
    yield
    models.__path__.remove(str(folder))
    for name in [x for x in sys.modules if x.startswith("anomaly_detection.models.autoencoder")]:
        del sys.modules[name]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, size: int = 64, seed: int = 0, channels: int = 3) -> Tensor:
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator(seed)).byte()


def batches(images: Tensor, size: int = 4) -> list[dict[str, Tensor]]:
    return [{"image": part} for part in images.split(size)]


HELD_OUT = batches(random_images(3, seed=9))


class Killed(BaseException):
    """Stands for a signal: nothing in the library catches it."""


class Watched:
    """A loader that keeps the epochs it was set to and counts the passes over it.

    The given pass is interrupted after its first batch.
    """

    def __init__(self, loader: Any, interrupted: int = 0) -> None:
        self.loader, self.interrupted = loader, interrupted
        self.epochs: list[int] = []
        self.passes = 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)
        if hasattr(self.loader, "sampler"):
            self.loader.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        self.passes += 1
        for number, batch in enumerate(self.loader):
            if number == 1 and self.passes == self.interrupted:
                raise Killed
            yield batch
        if self.passes == self.interrupted:
            raise Killed


def build(name: str, parameters: Any) -> Any:
    """A new model, always with the same random weights; no fit may depend on what follows them."""
    torch.manual_seed(0)
    model = spec(name).build(parameters)
    torch.seed()
    return model


def context(fit: Any, validation: Any = HELD_OUT, state: Path = Path("unused"), **options: Any):
    return FitContext(fit, validation, state, **{"device": CPU} | options)


def saved(name: str, model: Any, path: Path) -> bytes:
    """The bytes of a model's file, written there."""
    torch.save(snapshot(name, model), path)
    return path.read_bytes()


def assert_same_tensors(one: Any, other: Any, **tolerance: float) -> None:
    torch.testing.assert_close(
        dict(other.state_dict()),
        dict(one.state_dict()),
        **tolerance or {"rtol": 0, "atol": 0},
    )
