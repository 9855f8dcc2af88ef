"""The contract of all models: what a model is, how it is fitted, and what a fit may use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from anomaly_detection.parameters import GradientParameters, Parameters
from anomaly_detection.trainer import (
    BaseTrainer,
    Callback,
    EarlyStopping,
    Loader,
    Metrics,
    dtype_name,
)


class AnomalyModel(nn.Module):
    """A detector of anomalous images.

    In eval mode `forward` takes uint8 images (N, 3, H, W) and returns a dict with `pred_score`
    (N,), higher for more anomalous images, and optionally `anomaly_map` (N, 1, H, W); both may
    be negative. Normalisation is part of the model.
    """

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments for a model that can load this one's state dict.

        Plain values; they include the shapes of fitted tensors, and name no source of weights.
        """
        raise NotImplementedError

    def simplify(self) -> None:
        """Turn into a faster model with the same scores that can no longer be trained."""


@dataclass(frozen=True)
class FitContext:
    """What a fit may use besides the model and its parameters.

    Attributes:
        fit: Batches of normal images, reshuffled every epoch.
        validation: Batches of other normal images, for choosing settings and scaling maps.
        auxiliary: Batches of unrelated images, for models that learn from them; or None. They come
            in the same order each time, unless `set_epoch` is called.
        state: Folder that outlives a kill, for the state of an interrupted fit. It belongs to
            this exact fit: other parameters, data or code get another folder.
        device: Where to compute.
        feature_cache: Disk space in GB that may be used in `state`; must not affect the result.
        callbacks: For the trainer, if the model has one.
    """

    fit: Loader
    validation: Loader
    state: Path
    device: torch.device
    auxiliary: Loader | None = None
    feature_cache: float = 0.0
    callbacks: Sequence[Callback] = ()

    def trainer_options(self, parameters: GradientParameters) -> dict[str, Any]:
        """The options of a `BaseTrainer` for this fit."""
        callbacks = list(self.callbacks)
        if parameters.early_stopping_patience:
            callbacks.insert(0, EarlyStopping(parameters.early_stopping_patience))
        return {
            "device": self.device,
            "checkpoint_dir": self.state,
            "callbacks": callbacks,
            "precision": parameters.precision,
            "accumulate_batches": parameters.accumulate_batches,
        }

    def train(
        self, trainer: BaseTrainer, num_epochs: int, num_steps: int | None = None
    ) -> "FitResult":
        """Train, resuming an interrupted fit; the model ends with its best epoch's weights."""
        trainer.load_latest_checkpoint()
        trainer.fit(self.fit, self.validation, num_epochs, num_steps)
        trainer.load_best_model()
        return FitResult(
            dtype_name(trainer.dtype), trainer.history, trainer.best_epoch, trainer.best_metrics
        )


@dataclass(frozen=True)
class FitResult:
    """How a fit went.

    Attributes:
        precision: What it computed in.
        history: For a model trained in epochs, a dict for each: `epoch`, and whatever else was
            measured.
        best_epoch: The epoch whose weights the model has.
        best_metrics: That epoch's validation metrics.
    """

    precision: str
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    best_metrics: Metrics | None = None


M = TypeVar("M", bound=AnomalyModel)
P = TypeVar("P", bound=Parameters)


@dataclass(frozen=True)
class ModelSpec(Generic[M, P]):
    """Everything that the rest of the library needs from a model's folder.

    Attributes:
        model: The class, rebuilt from `hyperparameters`.
        build: Returns a new, unfitted model for its parameters.
        fit: Fits a model on the context's images. If killed and called again with the same
            `state`, it ends with the same model, byte for byte.
    """

    model: type[M]
    build: Callable[[P], M]
    fit: Callable[[M, P, FitContext], FitResult]
