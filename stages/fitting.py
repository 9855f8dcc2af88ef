"""What the stages that fit models share: their images, and the name of an exact fit."""

import platform
import sys
from collections.abc import Container, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from anomaly_detection.config import Config
from anomaly_detection.data.arrays import IMAGES, TRAIN, read_index
from anomaly_detection.data.auxiliary import AuxiliaryDataset
from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.data.sample import pictures_in
from anomaly_detection.files import fingerprint
from anomaly_detection.models import FitContext
from anomaly_detection.parameters import Parameters
from anomaly_detection.trainer import Callback, choose_dtype, has_room

PRETRAINED = "pretrained.pth"
VERSIONS = {
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    "timm": version("timm"),
}


def training_key(
    name: str, parameters: Parameters, config: Config, category: str, device: torch.device
) -> str:
    """A name for this exact fit: parameters, data, folds, arithmetic, and the loaded code."""
    arithmetic = [device.type, str(choose_dtype(parameters.precision, device))]
    folders = (Path("data/prepared") / category / TRAIN, Path("pretrained") / category)
    data = sorted(file for folder in folders for file in folder.glob("*"))
    auxiliary = pictures_in(Path(config.data.auxiliary))
    folds = [config.evaluation.calibration, config.evaluation.folds]
    values = [name, parameters.model_dump(), folds, arithmetic, VERSIONS]
    return fingerprint(values, [*loaded_code(), *data, *auxiliary, *parameters.files()])


def loaded_code() -> list[Path]:
    """The files of the library and of the stages that this process has imported, and its own."""
    packages = ("anomaly_detection", "stages", "__main__")
    loaded = [x for name, x in list(sys.modules.items()) if name.split(".")[0] in packages]
    files = [getattr(module, "__file__", None) for module in loaded]  # `python -c` has none
    return sorted({Path(file).resolve() for file in files if file})


def fitted_splits(config: Config) -> list[str]:
    """The splits whose images the detector is fitted to."""
    return ["fit"] if config.evaluation.calibration == "split" else ["fit", "calibration"]


def context(
    config: Config,
    parameters: Parameters,
    category: str,
    device: torch.device,
    state: Path,
    splits: Sequence[str],
    held_out: Container[str] = (),
    callbacks: Sequence[Callback] = (),
) -> FitContext:
    """What a fit may use; batches are created on the GPU if it has room for all images."""
    hardware, prepared = config.hardware, Path("data/prepared") / category
    num_bytes = (prepared / TRAIN / IMAGES).stat().st_size
    fits = has_room(device, num_bytes) and not hardware.num_workers
    place = device if fits else "cpu"
    index = read_index(prepared, [TRAIN])
    hashes = {row["sha256"] for row in index if row["sha256"] not in held_out}
    fit = PreparedDataset(prepared, list(splits), place, hashes)
    validation = PreparedDataset(prepared, "validation", place)
    size, workers = parameters.batch_size, hardware.num_workers
    auxiliary = AuxiliaryDataset(config.data.auxiliary, config.data.image_size, fit.channels)
    return FitContext(
        fit=create_dataloader(fit, size, shuffle=True, num_workers=workers, seed=parameters.seed),
        validation=create_dataloader(validation, size, num_workers=workers),
        auxiliary=create_dataloader(auxiliary, size, shuffle=True, seed=parameters.seed),
        state=state,
        device=device,
        in_channels=fit.channels,
        pretrained=pretrained(category),
        feature_cache=hardware.feature_cache,
        callbacks=callbacks,
    )


def pretrained(category: str) -> dict[str, Any] | None:
    """What the stage `pretrain` wrote, if it had anything to do."""
    path = Path("pretrained") / category / PRETRAINED
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
