"""Training of any model: the loop and its hooks, checkpoints, devices, several processes."""

from anomaly_detection.errors import TrainingError
from anomaly_detection.trainer.base import BaseTrainer, set_epoch
from anomaly_detection.trainer.checkpoints import ModelCheckpoint, copy_atomically, save_atomically
from anomaly_detection.trainer.devices import (
    choose_device,
    choose_dtype,
    has_room,
    rank,
    world_size,
)
from anomaly_detection.trainer.hooks import Batch, Hooks, Metrics

__all__ = [
    "BaseTrainer",
    "Batch",
    "Hooks",
    "Metrics",
    "ModelCheckpoint",
    "TrainingError",
    "choose_device",
    "choose_dtype",
    "copy_atomically",
    "has_room",
    "rank",
    "save_atomically",
    "set_epoch",
    "world_size",
]
