"""The tasks of `benchmarks.work` and `benchmarks.detection` in anomalib 2.7.

    python benchmarks/peer_anomalib.py NAME FOLDER SETTINGS

Runs in its own environment, not in ours. The second kind of task finds what `benchmarks.detection`
wrote to FOLDER, and uses anomalib's modules without its engine: its scores as they are, not scaled
and clamped.
"""

import contextlib
import csv
import json
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
create_model = timm.create_model
# Timing needs no downloaded weights.
timm.create_model = lambda *a, **options: create_model(*a, **options | {"pretrained": False})

from anomalib.data import Folder  # noqa: E402
from anomalib.data.utils import read_image  # noqa: E402
from anomalib.deploy import OpenVINOInferencer  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.models import Stfpm  # noqa: E402
from anomalib.models.image.padim.torch_model import PadimModel  # noqa: E402
from anomalib.models.image.patchcore.torch_model import PatchcoreModel  # noqa: E402
from anomalib.pre_processing import PreProcessor  # noqa: E402
from lightning.pytorch import Callback  # noqa: E402
from torchvision.transforms import v2  # noqa: E402


class Clock(Callback):
    """Record when epochs began and ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def _note(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    on_train_epoch_start = on_train_epoch_end = on_test_epoch_start = on_test_epoch_end = _note


def main(name: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Do the task; returns seconds and images, or what a task of `DETECTION` returns."""
    torch.manual_seed(0)
    if name in DETECTION:
        return DETECTION[name](folder, **settings)
    side = settings["image_size"]
    transform = v2.Compose([v2.Resize((side, side), antialias=True), v2.ToDtype(torch.float32)])
    model = Stfpm(
        backbone=settings["backbone"],
        layers=settings["layers"],
        pre_processor=PreProcessor(transform=transform),
    )
    if name == "one_image":
        return one_image(model, folder)
    if name == "exported_image":
        return exported_image(model, folder)
    data = Folder(
        "raw",
        root=folder / "raw",
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/spot",
        mask_dir="ground_truth/spot",
        train_batch_size=settings["batch_size"],
        eval_batch_size=settings["batch_size"],
        num_workers=8 if torch.cuda.is_available() else 0,
        val_split_mode="same_as_test",
    )
    clock = Clock()
    engine = Engine(
        max_epochs=1 + settings["epochs"],
        accelerator="auto",
        devices=1,
        callbacks=[clock],
        default_root_dir=folder / "anomalib",
        limit_val_batches=0,
        enable_progress_bar=False,
        logger=False,
    )
    if name == "training":
        engine.fit(model, datamodule=data)
        items = settings["epochs"] * len(data.train_data)
        return {"seconds": clock.times[-1] - clock.times[2], "items": items}
    engine.test(model, datamodule=data)
    return {"seconds": clock.times[-1] - clock.times[-2], "items": len(data.test_data)}


def one_image(model: Stfpm, folder: Path) -> dict[str, float]:
    """From a file to the score, image by image."""
    model.eval()
    paths = sorted((folder / "raw" / "test").rglob("*.png"))[:24]
    for i, path in enumerate(paths):
        if i == 4:
            start = time.perf_counter()
        with torch.inference_mode():
            float(model(read_image(path, as_tensor=True)[None]).pred_score > 1)
    return {"seconds": time.perf_counter() - start, "items": len(paths) - 4}


def exported_image(model: Stfpm, folder: Path) -> dict[str, float]:
    """From a file to the score, image by image, by anomalib's export in its own inferencer."""
    paths = sorted((folder.resolve() / "raw" / "test").rglob("*.png"))[:24]
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):  # it leaves a cache there
        exported = model.eval().to_openvino(name)  # of any size: it resizes by itself
        inferencer = OpenVINOInferencer(exported, device="CPU")
        for i, path in enumerate(paths):
            if i == 4:
                start = time.perf_counter()
            float(inferencer.predict(path).pred_score.item() > 1)
        return {"seconds": time.perf_counter() - start, "items": len(paths) - 4}


# How the models are created and fitted: PaDiM by the paper's 100 features of three levels, and
# PatchCore by the paper's smallest coreset of two. The rest is anomalib's default.
STRIDES = {"padim": (4, 8, 16), "patchcore": (8, 16)}
CREATE: dict[str, Callable[..., nn.Module]] = {
    "padim": lambda **options: PadimModel(n_features=100, **options),
    "patchcore": PatchcoreModel,
}
FIT: dict[str, Callable[[Any], None]] = {
    "padim": lambda model: model.fit(),
    "patchcore": lambda model: model.subsample_embedding(0.01),
}


class Detector(nn.Module):
    """A model of anomalib behind the teacher's normalisation: uint8 images -> scores.

    Args:
        name: One of `CREATE`.
        teacher: Content of teacher.pt: the backbone with its levels, weights and normalisation.
    """

    def __init__(self, name: str, teacher: dict[str, Any]) -> None:
        super().__init__()
        levels = teacher["levels"].items()
        layers = [layer for layer, stride in levels if stride in STRIDES[name]]
        options = {"backbone": teacher["backbone"], "layers": layers, "pre_trained": False}
        self.model = CREATE[name](**options)
        net = self.model.feature_extractor.feature_extractor
        net.load_state_dict({key: teacher["state_dict"][key] for key in net.state_dict()})
        for key, values in teacher["normalisation"].items():
            self.register_buffer(key, values)  # mean and std, (1, 3, 1, 1)

    def forward(self, images: Tensor) -> Any:
        """What anomalib's model returns: scores and maps, but features in training."""
        return self.model((images.float() / 255 - self.mean) / self.std)


def fit(folder: Path, name: str, prepared: str, batch_size: int) -> dict[str, Any]:
    """Fit a model to the splits `fit` and `validation`, and save it as FOLDER/NAME.pt."""
    arrays = Path(prepared) / "train"
    with (arrays / "index.csv").open(newline="", encoding="utf-8") as file:
        rows = enumerate(csv.DictReader(file))
        chosen = [i for i, row in rows if row["split"] in ("fit", "validation")]
    images = np.load(arrays / "images.npy", mmap_mode="r")
    detector = Detector(name, torch.load(folder / "teacher.pt")).to(device()).train()
    for batch in batches(images, chosen, batch_size):
        detector(batch)
    FIT[name](detector.model)
    torch.save(detector.state_dict(), folder / f"{name}.pt")
    packages = {package: version(package) for package in ("anomalib", "torch", "timm")}
    return {
        "num_images": len(chosen),
        "versions": {"python": platform.python_version(), **packages},
    }


@torch.inference_mode()
def score(folder: Path, name: str, batch_size: int) -> dict[str, Any]:
    """Scores of the images in FOLDER/images.npy -> FOLDER/NAME.npy."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    detector = load(folder, name)
    scores = [
        detector(batch).pred_score.flatten()
        for batch in batches(images, range(len(images)), batch_size)
    ]
    np.save(folder / f"{name}.npy", torch.cat(scores).cpu().numpy())
    return {}


@torch.inference_mode()
def time_images(folder: Path, names: list[str], num_images: int) -> dict[str, Any]:
    """Seconds from an image in memory to its score, for each model; the models take turns."""
    images = np.load(folder / "images.npy", mmap_mode="r")[:num_images]
    detectors = {name: load(folder, name) for name in names}
    seconds = defaultdict(list)
    for image in images:
        for name, detector in detectors.items():
            start = time.perf_counter()
            float(detector(torch.tensor(image)[None].to(device())).pred_score)
            seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds}


def load(folder: Path, name: str) -> nn.Module:
    """A detector that `fit` has saved."""
    detector = Detector(name, torch.load(folder / "teacher.pt"))
    detector.load_state_dict(torch.load(folder / f"{name}.pt"))
    return detector.to(device()).eval()


def batches(images: np.ndarray, chosen: Any, batch_size: int) -> Iterator[Tensor]:
    """The images at these indices, uint8 (N, 3, S, S) each time."""
    for start in range(0, len(chosen), batch_size):
        yield torch.from_numpy(images[list(chosen[start : start + batch_size])]).to(device())


def device() -> str:
    """Where the tasks of `DETECTION` run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


DETECTION: dict[str, Callable[..., dict[str, Any]]] = {
    "fit": fit,
    "score": score,
    "time_images": time_images,
}

if __name__ == "__main__":
    result = main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
    print()
    print(json.dumps(result))
