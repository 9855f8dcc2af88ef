"""Trainers small enough to work out by hand: they fit y = a x to x = 1/n, ..., 1 and y = 2 x."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from anomaly_detection.trainer import Callback, Hooks, LossTrainer

HOOKS = [name for name in vars(Hooks) if name.startswith("on_")]


class LineTrainer(LossTrainer):
    """The mean squared error, and plain SGD; `losses` take the place of the validation losses."""

    def __init__(self, *args: Any, losses: Iterable[float] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses = iter(losses)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": self.loss_fn(self.model(x), y)}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": (self.model(x) - y).square()}

    def compute_metrics(self, outputs):
        metrics = super().compute_metrics(outputs)
        return {"loss": next(self.losses, metrics["loss"])}

    def configure_optimizers(self):
        return {"optimizer": sgd(self.model)}


class MomentumTrainer(LineTrainer):
    """SGD with momentum, and with a rate that is halved after every other epoch."""

    def configure_optimizers(self):
        optimizer = sgd(self.model, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "scheduler": scheduler}


class OneCycleTrainer(LineTrainer):
    """SGD with momentum, and with a rate that changes at every step."""

    def configure_optimizers(self):
        optimizer = sgd(self.model, momentum=0.9)
        num_steps = self.num_steps or self.num_epochs * len(self.train_loader)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, num_steps)
        return {"optimizer": optimizer, "scheduler": scheduler, "interval": "step"}


class Recorder(Callback):
    """Notes the hooks that are called, with their arguments that are integers."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def count(self, hook: str) -> int:
        return [call[0] for call in self.calls].count(hook)


for hook in HOOKS:

    def record(self, *args, hook=hook):
        self.calls.append((hook, *(arg for arg in args if isinstance(arg, int))))

    setattr(Recorder, hook, record)


def sgd(model: nn.Module, rate: float = 0.1, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), rate, **options)


def line_model() -> nn.Linear:
    """y = 0 x."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def loader(num: int = 4, batch_size: int = 2) -> DataLoader:
    x = torch.arange(1.0, num + 1)[:, None] / num
    return DataLoader(TensorDataset(x, 2 * x), batch_size=batch_size)


def make(cls: type[LineTrainer] = LineTrainer, **options: Any) -> Any:
    return cls(line_model(), nn.MSELoss(), **{"device": "cpu", "checkpoint_dir": None} | options)


def fitted(cls: type[LineTrainer] = LineTrainer, num_epochs: int = 1, **options: Any) -> Any:
    """A trainer that has been trained and validated for so many epochs of two batches."""
    trainer = make(cls, **options)
    trainer.fit(loader(), loader(), num_epochs)
    return trainer


def resumed(path: Path, cls: type[LineTrainer] = LineTrainer, **options: Any) -> Any:
    """A new trainer in the state of a checkpoint."""
    trainer = make(cls, **options)
    trainer.resume(path)
    return trainer
