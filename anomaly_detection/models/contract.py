"""The contract of all models: what a model is, how it is fitted, and what a fit may use."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from anomaly_detection.parameters import GradientParameters, Parameters
from anomaly_detection.trainer import (
    BaseTrainer,
    Callback,
    EarlyStopping,
    Loader,
    Metrics,
    ModelCheckpoint,
    dtype_name,
    set_epoch,
)


class AnomalyModel(nn.Module):
    """A detector of anomalous images.

    In eval mode `forward` takes images (N, C, H, W), of uint8 or uint16, or floats normalised as by
    `get_test_transforms`, and returns a dict with
    `pred_score` (N,), higher for more anomalous images, and optionally `anomaly_map` (N, 1, H, W);
    both may be negative. C is 3, or what `ModelSpec.build` was told. Images may have one more
    channel, 0 where they are not judged. Normalisation is part of the model.
    """

    @property
    def inputs(self) -> Sequence[str]:
        """What `forward` takes of a batch: `image`, perhaps followed by `position`.

        The latter is the number of each tile in its image, int64 (N,).
        """
        return ("image",)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments for a model that can load this one's state dict.

        Plain values; they include the shapes of fitted tensors, and name no source of weights.
        """
        raise NotImplementedError

    def held_out_map(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        """`anomaly_map` of a batch of normal images as if the fit had not seen them.

        That of `forward`, unless the fit uses `FitContext.validation` as well; then, it can be
        called as long as the model has not been saved and loaded.
        """
        return self(batch["image"].to(device))["anomaly_map"]

    def simplify(self) -> None:
        """Turn into a faster model with the same scores that can no longer be trained."""


@dataclass(frozen=True)
class Joined:
    """Several loaders as one."""

    loaders: Sequence[Loader]

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(self.loaders)


@dataclass(frozen=True)
class FitContext:
    """What a fit may use besides the model and its parameters.

    Attributes:
        fit: Batches of normal images, reshuffled every epoch.
        validation: Batches of other normal images, for choosing settings and scaling maps; a model
            that needs no held-out images for that may fit them too.
        auxiliary: Batches of unrelated images, for models that learn from them; or None. They come
            in the same order each time, unless `set_epoch` is called. They are uint8, and have
            `in_channels`.
        state: Folder that outlives a kill, for the state of an interrupted fit. It belongs to
            this exact fit: other parameters, data or code get another folder.
        device: Where to compute.
        pretrained: What the model's `pretrain` returned, if there was one.
        feature_cache: Disk space in GB that may be used in `state`; must not affect the result.
        callbacks: For the trainer, if the model has one.
        in_channels: Of the images, without one that says where they are judged.
    """

    fit: Loader
    validation: Loader
    state: Path
    device: torch.device
    auxiliary: Loader | None = None
    pretrained: dict[str, Any] | None = None
    feature_cache: float = 0.0
    callbacks: Sequence[Callback] = ()
    in_channels: int = 3

    @property
    def normal(self) -> "Joined":
        """All normal images, first those to fit: in the same order each time."""
        set_epoch(self.fit, 1)
        return Joined((self.fit, self.validation))

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
            "checkpoints": ModelCheckpoint(last=1),
        }

    def train(
        self, trainer: BaseTrainer, num_epochs: int, num_steps: int | None = None
    ) -> "FitResult":
        """Train, resuming an interrupted fit; the model ends with its best epoch's weights."""
        trainer.resume()
        trainer.fit(self.fit, self.validation, num_epochs, num_steps=num_steps)
        trainer.load_best_model()
        return FitResult(
            dtype_name(trainer.dtype), trainer.history, trainer.best_epoch, trainer.best_metric
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
        build: Returns a new, unfitted model for its parameters and the images' number of channels.
        fit: Fits a model on the context's images. If killed and called again with the same
            `state`, it ends with the same model, byte for byte.
        pretrain: For a model whose fits start from a network that is trained before, and anew only
            when `Parameters.pretraining` changes: returns plain values for
            `FitContext.pretrained`. It resumes as a fit does, and must not use images that
            calibrate.
    """

    model: type[M]
    build: Callable[[P, int], M]
    fit: Callable[[M, P, FitContext], FitResult]
    pretrain: Callable[[P, FitContext], dict[str, Any]] | None = None

    def prepared(self, parameters: P, context: FitContext) -> FitContext:
        """The context with what `pretrain` returns, if these parameters need it."""
        if self.pretrain is None or not parameters.pretraining():
            return context
        own = replace(context, state=context.state / "pretraining", callbacks=())
        return replace(context, pretrained=self.pretrain(parameters, own))
