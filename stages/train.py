"""Fit a model to normal images: data/prepared/<category>/train -> checkpoints/<category>.

With `evaluation.calibration` cross, calibration images are fitted to as well, and each fold of all
these images gets a model that has not seen it: checkpoints/<category>/folds. If interrupted, the
same fit resumes where it stopped.
"""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from anomaly_detection import models
from anomaly_detection.config import Config, load_config
from anomaly_detection.data.arrays import TRAIN, read_index
from anomaly_detection.data.splits import draw_folds
from anomaly_detection.models import AnomalyModel, FitContext, FitResult, snapshot
from anomaly_detection.parameters import Parameters
from anomaly_detection.progress import part
from anomaly_detection.trainer import (
    TrainingError,
    choose_device,
    describe_hardware,
    rank,
    resumable,
    save_atomically,
    seconds_before,
    seed_everything,
    world_size,
)
from stages import run, write_json
from stages.fitting import VERSIONS, context, fitted_splits, training_key
from stages.live import DVCLiveLogger


def main(category: str) -> float:
    """Fit the model of `category`, in as many processes as its parameters ask for.

    Returns the seconds that an interrupted attempt took for what this one has resumed.
    """
    config = load_config()
    name, parameters = config.for_category(category)
    if parameters.processes > 1 and "WORLD_SIZE" not in os.environ:
        launch(category, parameters.processes)
    if world_size() != parameters.processes:
        raise TrainingError(
            f"training.num_processes must be the number of processes started, {world_size()}, "
            f"got {parameters.processes}."
        )
    device = choose_device(config.hardware.device)
    root, output = Path(os.environ.get("DVC_ROOT", ".")), Path("checkpoints") / category
    splits = fitted_splits(config)
    key = training_key(name, parameters, config, category, device)
    with resumable(category, key, root) as state:
        for number, held_out in enumerate(folds(config, category)):
            own = state / str(number)
            images = context(config, parameters, category, device, own, splits, held_out)
            with part(f"fold {number + 1}/{config.evaluation.folds}"):
                model, _ = fitted(name, parameters, images)
            if rank() == 0:
                fold = snapshot(name, model) | {"held_out": sorted(held_out)}
                save_atomically(fold, output / "folds" / f"{number}.pth")
        live = Path("dvclive") / category
        (live / "plots/metrics").mkdir(parents=True, exist_ok=True)  # even for a fit without epochs
        callbacks = [DVCLiveLogger(live)] if rank() == 0 else []
        whole = context(config, parameters, category, device, state, splits, callbacks=callbacks)
        model, result = fitted(name, parameters, whole)
        if rank() == 0:
            facts = summary(name, parameters, device, result)
            content = snapshot(name, model) | {"image_size": config.data.image_size}
            save_atomically(facts | content, output / "best_model.pth")
            write_json(Path("metrics") / category / "train.json", facts)
        return seconds_before(state)


def fitted(
    name: str, parameters: Parameters, context: FitContext
) -> tuple[AnomalyModel, FitResult]:
    """A new model, fitted, and how its fit went."""
    seed_everything(parameters.seed)
    spec = models.spec(name)
    model = spec.build(parameters, context.in_channels)
    return model, spec.fit(model, parameters, context)


def folds(config: Config, category: str) -> list[set[str]]:
    """For each further fit that the calibration asks for, the hashes of images not to fit to."""
    if config.evaluation.calibration == "split":
        return []
    index = read_index(Path("data/prepared") / category, [TRAIN])
    rows = [row for row in index if row["split"] in ("fit", "calibration")]
    fold_of = draw_folds([row["part"] for row in rows], config.evaluation.folds, config.data.seed)
    drawn = [(row["sha256"], fold) for row, fold in zip(rows, fold_of, strict=True)]
    return [{name for name, fold in drawn if fold == i} for i in range(config.evaluation.folds)]


def summary(
    name: str, parameters: Parameters, device: torch.device, result: FitResult
) -> dict[str, Any]:
    """The content of metrics/<category>/train.json."""
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


def launch(category: str, processes: int) -> NoReturn:
    """Fit one model in several processes of this stage, then exit; the first notes the cost."""
    arguments = [f"--nproc-per-node={processes}", "--standalone", "-m", "stages.train", category]
    try:
        torchrun(arguments)
    except ChildFailedError:
        sys.exit(1)  # the child has said why
    sys.exit()


if __name__ == "__main__":
    run(main, note_cost=True)
