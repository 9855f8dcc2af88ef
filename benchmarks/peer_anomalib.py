"""The tasks of `benchmarks.work` in anomalib 2.7; runs in its own environment, not in ours.

python benchmarks/peer_anomalib.py NAME FOLDER SETTINGS
"""

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
create_model = timm.create_model
# Timing needs no downloaded weights.
timm.create_model = lambda *a, **options: create_model(*a, **options | {"pretrained": False})

from anomalib.data import Folder  # noqa: E402
from anomalib.data.utils import read_image  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.models import Stfpm  # noqa: E402
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


def main(name: str, folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Do the task; returns seconds and images."""
    torch.manual_seed(0)
    side = settings["image_size"]
    transform = v2.Compose([v2.Resize((side, side), antialias=True), v2.ToDtype(torch.float32)])
    model = Stfpm(
        backbone=settings["backbone"],
        layers=settings["layers"],
        pre_processor=PreProcessor(transform=transform),
    )
    if name == "one_image":
        return one_image(model, folder)
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


if __name__ == "__main__":
    result = main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
    print()
    print(json.dumps(result))
