"""Train on normal images: data/prepared/<category> -> checkpoints/<category>."""

from pathlib import Path

import timm
import torch

from anomaly_detection.callbacks import EarlyStopping
from anomaly_detection.config import load_config
from anomaly_detection.data import PreparedDataset, create_dataloader
from anomaly_detection.models import create_model, create_trainer
from anomaly_detection.seed import seed_everything
from stages import run, write_json


def main(category: str) -> None:
    """Train the detector of `category`."""
    config = load_config().for_category(category)
    training = config.training
    seed_everything(training.seed)
    fit, validation = (
        PreparedDataset(Path("data/prepared") / category, split) for split in ("fit", "validation")
    )
    loader = {"batch_size": training.batch_size, "num_workers": training.num_workers}
    patience = training.early_stopping_patience
    trainer = create_trainer(
        config.model.name,
        create_model(**config.model.model_dump()),
        learning_rate=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        device=training.device,
        precision=training.precision,
        checkpoint_dir=Path("checkpoints") / category,
        keep_last=0,
        callbacks=[EarlyStopping(patience)] if patience else [],
        metadata={"image_size": fit.image_size, "params": config.model_dump(exclude={"overrides"})},
    )
    history = trainer.fit(
        create_dataloader(fit, shuffle=True, seed=training.seed, **loader),
        create_dataloader(validation, **loader),
        training.num_epochs,
    )
    best = min(history, key=lambda row: row["val_loss"])
    write_json(
        Path("metrics") / category / "train.json",
        {
            "best_epoch": best["epoch"],
            "val_loss": best["val_loss"],
            "num_fit": len(fit),
            "num_validation": len(validation),
            "device": str(trainer.device),
            "precision": str(trainer.dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
            "history": history,
        },
    )


if __name__ == "__main__":
    run(main)
