"""The contract of all models: what one is, how it is fitted, and what a fit may use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from anomaly_detection.parameters import GradientParameters, Parameters
from anomaly_detection.trainer import BaseTrainer, Callback, EarlyStopping, Loader, Metrics


class AnomalyModel(nn.Module):
    """A detector of anomalous images.

    In eval mode `forward` takes uint8 images (N, 3, H, W) and returns a dict with `pred_score`
    (N,), higher for more anomalous images, and optionally `anomaly_map` (N, 1, H, W); either may be
    negative. Normalisation is a part of the model.
    """

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments for a model that can load this one's state dict.

        Plain values; they include the shapes of what was fitted, and no source of weights.
        """
        raise NotImplementedError

    def simplify(self) -> None:
        """Change into what gives the same scores sooner, and can no longer be trained."""


@dataclass(frozen=True)
class FitContext:
    """What a fit may use beside the model and its parameters.

    Attributes:
        fit: Batches of normal images, in another order in each epoch.
        validation: Batches of other normal images, for choices and for the scale of maps.
        auxiliary: Batches of images of anything else, for models that learn from such; or None.
        state: Folder that outlives a kill, for the states of an interrupted fit. It belongs to
            this very fit: other parameters, data or code have another one.
        device: Where to compute.
        feature_cache: GB of disk that may be used in `state`; the result must not depend on it.
        callbacks: To be called by a trainer.
    """

    fit: Loader
    validation: Loader
    state: Path
    device: torch.device
    auxiliary: Loader | None = None
    feature_cache: float = 0.0
    callbacks: Sequence[Callback] = ()

    def trainer_options(self, parameters: GradientParameters) -> dict[str, Any]:
        """What a `BaseTrainer` for this fit is told."""
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
        """Train, from where an interrupted fit was; the model has its best epoch's weights then."""
        trainer.load_latest_checkpoint()
        trainer.fit(self.fit, self.validation, num_epochs, num_steps)
        trainer.load_best_model()
        precision = str(trainer.dtype).removeprefix("torch.")
        return FitResult(precision, trainer.history, trainer.best_epoch, trainer.best_metrics)


@dataclass(frozen=True)
class FitResult:
    """How a fit went.

    Attributes:
        precision: What it computed in.
        history: For a model that is trained in epochs, a dict for each: `epoch`, and what else was
            measured.
        best_epoch: The one whose weights the model has.
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
    """All that the rest of the library asks of a model's folder.

    Attributes:
        model: The class, which `hyperparameters` rebuild.
        build: A new model from its parameters, before the fit.
        fit: Fits a model on the context's images. Killed and called again with the same `state` it
            ends with the same model, byte by byte.
    """

    model: type[M]
    build: Callable[[P], M]
    fit: Callable[[M, P, FitContext], FitResult]
