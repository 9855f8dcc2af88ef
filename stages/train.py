"""Fit a model to normal images: data/prepared/<category> -> checkpoints/<category>.

If interrupted, the same fit resumes where it stopped.
"""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from anomaly_detection import models
from anomaly_detection.config import Config, load_config
from anomaly_detection.data.auxiliary import AuxiliaryDataset
from anomaly_detection.data.layout import pictures_in
from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.files import fingerprint
from anomaly_detection.models import FitContext, FitResult, snapshot
from anomaly_detection.parameters import Parameters
from anomaly_detection.trainer import (
    TrainingError,
    choose_device,
    choose_dtype,
    describe_hardware,
    has_room,
    rank,
    resumable,
    save_atomically,
    seed_everything,
    world_size,
)
from stages import run, write_json
from stages.live import DVCLiveLogger

VERSIONS = {
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    "timm": version("timm"),
}


def main(category: str) -> None:
    """Fit the model of `category`, in as many processes as its parameters ask for."""
    config = load_config()
    name, parameters = config.for_category(category)
    if parameters.processes > 1 and "WORLD_SIZE" not in os.environ:
        launch(category, parameters.processes)
        return
    if world_size() != parameters.processes:
        raise TrainingError(
            f"training.num_processes must be the number of processes started, {world_size()}, "
            f"got {parameters.processes}."
        )
    spec = models.spec(name)
    key = training_key(name, parameters, config, category)
    with resumable(category, key, Path(os.environ.get("DVC_ROOT", "."))) as state:
        seed_everything(parameters.seed)
        model = spec.build(parameters)
        result = spec.fit(model, parameters, context(config, parameters, category, state))
        if rank() == 0:
            facts = summary(name, parameters, config, result)
            fitted = {"model": snapshot(name, model), "image_size": config.data.image_size}
            save_atomically(facts | fitted, Path("checkpoints") / category / "best_model.pth")
            write_json(Path("metrics") / category / "train.json", facts)


def training_key(name: str, parameters: Parameters, config: Config, category: str) -> str:
    """A name for this exact fit: parameters, data, arithmetic, and the loaded code."""
    device = choose_device(config.hardware.device)
    arithmetic = [device.type, str(choose_dtype(parameters.precision, device))]
    data = sorted((Path("data/prepared") / category).iterdir())
    auxiliary = pictures_in(Path(config.data.auxiliary))
    values = [name, parameters.model_dump(), arithmetic, VERSIONS]
    return fingerprint(values, [*loaded_code(), *data, *auxiliary, *parameters.files()])


def loaded_code() -> list[Path]:
    """The files of the library and of the stages that this process has imported."""
    packages = ("anomaly_detection", "stages")
    loaded = [x for name, x in list(sys.modules.items()) if name.split(".")[0] in packages]
    files = {Path(module.__file__).resolve() for module in loaded if module.__file__}
    return sorted({*files, Path(__file__).resolve()})


def context(config: Config, parameters: Parameters, category: str, state: Path) -> FitContext:
    """What the fit may use; batches are created on the GPU if it has room for all images."""
    hardware, prepared = config.hardware, Path("data/prepared") / category
    device = choose_device(hardware.device)
    fits = has_room(device, (prepared / "images.npy").stat().st_size) and not hardware.num_workers
    fit, validation = (
        PreparedDataset(prepared, split, device if fits else "cpu")
        for split in ("fit", "validation")
    )
    size, workers = parameters.batch_size, hardware.num_workers
    auxiliary = AuxiliaryDataset(config.data.auxiliary, config.data.image_size)
    live = Path("dvclive") / category
    (live / "plots/metrics").mkdir(parents=True, exist_ok=True)  # even for a fit without epochs
    return FitContext(
        fit=create_dataloader(fit, size, shuffle=True, num_workers=workers, seed=parameters.seed),
        validation=create_dataloader(validation, size, num_workers=workers),
        auxiliary=create_dataloader(auxiliary, size, shuffle=True, seed=parameters.seed),
        state=state,
        device=device,
        feature_cache=hardware.feature_cache,
        callbacks=[DVCLiveLogger(live)] if rank() == 0 else [],
    )


def summary(name: str, parameters: Parameters, config: Config, result: FitResult) -> dict[str, Any]:
    """The content of metrics/<category>/train.json."""
    device = choose_device(config.hardware.device)
    values = parameters.by_section(name)
    values["training"]["precision"] = result.precision  # which the hardware decides if it is auto
    return {
        "model": name,
        "parameters": values,
        "best_epoch": result.best_epoch,
        "best_metrics": result.best_metrics,
        "device": device.type,
        "precision": result.precision,
        "hardware": describe_hardware(device),
        "versions": VERSIONS,
        "history": result.history,
    }


def launch(category: str, processes: int) -> None:
    """Run this stage in several processes that fit one model."""
    arguments = [f"--nproc-per-node={processes}", "--standalone", "-m", "stages.train", category]
    try:
        torchrun(arguments)
    except ChildFailedError:
        sys.exit(1)  # the child has said why


if __name__ == "__main__":
    run(main, note_cost=True)
