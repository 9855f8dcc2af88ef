"""Training for any model: the loop and its hooks, checkpoints, devices, multiple processes."""

from anomaly_detection.errors import TrainingError
from anomaly_detection.trainer.batches import Repeated, means, on_device, set_epoch
from anomaly_detection.trainer.by_loss import LossTrainer
from anomaly_detection.trainer.callbacks import EarlyStopping, GradientClipping, LearningRateLogger
from anomaly_detection.trainer.checkpoints import ModelCheckpoint, save_atomically
from anomaly_detection.trainer.devices import (
    choose_device,
    choose_dtype,
    describe_hardware,
    dtype_name,
    has_room,
)
from anomaly_detection.trainer.hooks import Batch, Callback, Hooks, Loader, Metrics
from anomaly_detection.trainer.loop import BaseTrainer
from anomaly_detection.trainer.numerics import count_batch_norm_once
from anomaly_detection.trainer.processes import gather, rank, world_size
from anomaly_detection.trainer.resume import resumable, seconds_before
from anomaly_detection.trainer.seed import seed_everything

__all__ = [
    "BaseTrainer",
    "Batch",
    "Callback",
    "EarlyStopping",
    "GradientClipping",
    "Hooks",
    "LearningRateLogger",
    "Loader",
    "LossTrainer",
    "Metrics",
    "ModelCheckpoint",
    "Repeated",
    "TrainingError",
    "choose_device",
    "choose_dtype",
    "count_batch_norm_once",
    "describe_hardware",
    "dtype_name",
    "gather",
    "has_room",
    "means",
    "on_device",
    "rank",
    "resumable",
    "save_atomically",
    "seconds_before",
    "seed_everything",
    "set_epoch",
    "world_size",
]
