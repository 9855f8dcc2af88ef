"""Train on normal images: data/prepared/<category> -> checkpoints/<category>.

Interrupted, the same training goes on after its last finished epoch.
"""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun
from torch.utils.data import DataLoader

from anomaly_detection.callbacks import DVCLiveLogger, EarlyStopping
from anomaly_detection.config import Config, load_config
from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.models import create_model, create_trainer
from anomaly_detection.resume import fingerprint, latest_checkpoint, resumable
from anomaly_detection.seed import seed_everything
from anomaly_detection.trainer import BaseTrainer, choose_device, copy_atomically, has_room, rank
from stages import run, write_json

VERSIONS = {
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    "timm": version("timm"),
}


def main(category: str) -> None:
    """Train the detector of `category`, in `training.num_processes` processes."""
    config = load_config().for_category(category)
    processes = config.training.num_processes
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        launch(category, processes)
        return
    prepared = Path("data/prepared") / category
    code = [Path(__file__), *Path("anomaly_detection").rglob("*.py")]
    values = [config.model.model_dump(), config.training.model_dump(), VERSIONS]
    key = fingerprint(values, sorted([*prepared.iterdir(), *code]))
    with resumable(category, key, Path(os.environ.get("DVC_ROOT", "."))) as state:
        trainer = train(config, category, state)
        if rank() == 0:
            output = Path("checkpoints") / category / "best_model.pth"
            copy_atomically(state / "best_model.pth", output)
            write_json(Path("metrics") / category / "train.json", summary(trainer))


def train(config: Config, category: str, state: Path) -> BaseTrainer:
    """Train with the states in a folder, from the last one there."""
    training = config.training
    seed_everything(training.seed)
    model = create_model(**config.model.model_dump())
    if training.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    callbacks = [DVCLiveLogger(Path("dvclive") / category)] if rank() == 0 else []
    if training.early_stopping_patience:
        callbacks.insert(0, EarlyStopping(training.early_stopping_patience))
    fit, validation = loaders(config, Path("data/prepared") / category)
    trainer = create_trainer(
        config.model.name,
        model,
        learning_rate=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        feature_cache=training.feature_cache,
        device=training.device,
        precision=training.precision,
        accumulate_batches=training.accumulate_batches,
        checkpoint_dir=state,
        callbacks=callbacks,
        metadata={
            "image_size": fit.dataset.image_size,
            "versions": VERSIONS,
            # How many processes load images does not change the result.
            "params": config.model_dump(
                include={"data": True, "model": True, "training": True},
                exclude={"training": {"num_workers"}},
            ),
        },
    )
    if checkpoint := latest_checkpoint(state):
        trainer.load_checkpoint(checkpoint)
        print(f"{category}: going on after epoch {trainer.epoch} of an interrupted training")
    trainer.fit(fit, validation, training.num_epochs)
    return trainer


def loaders(config: Config, prepared: Path) -> tuple[DataLoader, DataLoader]:
    """The batches to train on and to validate with, made on the GPU if it has room for them all."""
    training = config.training
    device = choose_device(training.device)
    stays = training.num_workers or not has_room(device, (prepared / "images.npy").stat().st_size)
    device = "cpu" if stays else device
    options = {"batch_size": training.batch_size, "num_workers": training.num_workers}
    fit, validation = (PreparedDataset(prepared, split, device) for split in ("fit", "validation"))
    return (
        create_dataloader(fit, shuffle=True, seed=training.seed, **options),
        create_dataloader(validation, **options),
    )


def summary(trainer: BaseTrainer) -> dict:
    """What metrics/<category>/train.json holds."""
    best = min(trainer.history, key=lambda row: row["val_loss"])
    return {
        "best_epoch": best["epoch"],
        "val_loss": best["val_loss"],
        "device": trainer.device.type,
        "precision": str(trainer.dtype).removeprefix("torch."),
        "versions": VERSIONS,
        "history": trainer.history,
    }


def launch(category: str, processes: int) -> None:
    """Run this stage in several processes that train one model."""
    arguments = [f"--nproc-per-node={processes}", "--standalone", "-m", "stages.train", category]
    try:
        torchrun(arguments)
    except ChildFailedError:
        sys.exit(1)  # which has said why


if __name__ == "__main__":
    run(main, note_cost=True)
