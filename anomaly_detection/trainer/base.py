"""BaseTrainer: the training loop. Nothing here knows of any model.

on_fit_start()
for epoch in 1 ... num_epochs:
    on_train_epoch_start(epoch)
    for each batch:
        on_train_batch_start(batch, batch_idx)
        training_step, backward
        on_before_optimizer_step()
        optimizer step
        on_train_batch_end(batch, batch_idx, outputs, loss)
    on_train_epoch_end(epoch, train_loss)
    on_validation_epoch_start(epoch)
    for each batch:
        on_validation_batch_start(batch, batch_idx)
        validation_step
        on_validation_batch_end(batch, batch_idx, outputs)
    on_validation_epoch_end(epoch, val_metrics)
    scheduler step, checkpoint
on_fit_end()
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from anomaly_detection.errors import TrainingError
from anomaly_detection.trainer.checkpoints import (
    ModelCheckpoint,
    random_state,
    save_atomically,
    set_random_state,
)
from anomaly_detection.trainer.devices import (
    choose_device,
    choose_dtype,
    gather,
    join_processes,
    rank,
    synchronise_batch_norm,
    widen_depthwise_convolutions,
    world_size,
)
from anomaly_detection.trainer.hooks import Batch, Hooks, Metrics


class BaseTrainer(Hooks, ABC):
    """Trains a model; a subclass says what a step is, and with which optimizer.

    Started by torchrun, the processes train one model with DistributedDataParallel.

    Args:
        model: Moved to `device`.
        loss_fn: For the subclass's steps.
        device: `auto` for the GPU where there is one, or what `torch.device` takes.
        checkpoint_dir: Folder of `epoch_N.pth` and `best_model.pth`; None saves nothing.
        callbacks: Called at each hook, in this order, after the trainer's own method; each finds
            the trainer as `self.trainer`.
        precision: Of the steps: `float32`, `bfloat16`, `float16`, or `auto`.
        accumulate_batches: How many batches' gradients are averaged for one optimizer step.
        checkpoints: Which checkpoints stay.
        metadata: Plain values for the checkpoint, such as the run's parameters.

    Attributes:
        epoch: Epochs begun so far.
        history: A dict for each finished epoch: epoch, train_loss, val_*, learning_rate.
        best_metrics: Of the epoch whose model is `best_model.pth`.
        should_stop: Set when a hook has raised StopIteration.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | None = None,
        device: str | torch.device = "auto",
        checkpoint_dir: str | Path | None = None,
        *,
        callbacks: Sequence[Hooks] = (),
        precision: str = "float32",
        accumulate_batches: int = 1,
        checkpoints: ModelCheckpoint | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.model = model.to(self.device)
        self.loss_fn = loss_fn
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir else None
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            callback.trainer = self
        self.dtype = choose_dtype(precision, self.device)
        if self.device.type == "cpu" and self.dtype != torch.float32:
            widen_depthwise_convolutions(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.accumulate_batches = accumulate_batches
        self.checkpoints = checkpoints or ModelCheckpoint()
        self.metadata = metadata or {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        self.epoch = 0
        self.num_epochs = 0
        self.should_stop = False
        self.history: list[dict[str, float]] = []
        self.best_metrics: Metrics | None = None

    @abstractmethod
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """A dict whose `loss` is a scalar to minimise."""

    @abstractmethod
    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        """Anything that `compute_metrics` understands; by default a dict of values to average."""

    @abstractmethod
    def configure_optimizers(self) -> dict[str, Any]:
        """A dict with `optimizer` and, if there is one, a `scheduler` that steps every epoch."""

    def fit(
        self, train_loader: Iterable, val_loader: Iterable | None = None, num_epochs: int = 1
    ) -> list[dict[str, float]]:
        """Train up to epoch `num_epochs`; returns the history.

        Raises:
            TrainingError: A loader is empty, the optimizer has nothing to train, a loss is not
                finite, or the device's memory is too small.
        """
        self._set_up(train_loader, val_loader)
        self.num_epochs = num_epochs
        with _explained_out_of_memory():
            self._call("on_fit_start")
            while self.epoch < num_epochs and not self.should_stop:
                self.epoch += 1
                train_loss = self.train_epoch(train_loader)
                val_metrics = {} if val_loader is None else self.validate_epoch(val_loader)
                self._finish_epoch(train_loss, val_metrics)
            if self.epoch == 0:
                self.save_checkpoint()
            self._call("on_fit_end")
        self.should_stop = False
        return self.history

    def train_epoch(self, loader: Iterable) -> float:
        """One pass over the training batches; returns their mean loss."""
        self.model.train()
        self.optimizer.zero_grad()
        set_epoch(loader, self.epoch)
        self._call("on_train_epoch_start", self.epoch)
        losses = []
        for batch_idx, batch in enumerate(self._progress(loader)):
            if self.should_stop:
                break
            batch = self._to_device(batch)
            self._call("on_train_batch_start", batch, batch_idx)
            outputs, loss = self._optimize(batch, batch_idx, len(loader))
            losses.append(loss)
            self._call("on_train_batch_end", batch, batch_idx, outputs, loss)
        losses = gather(self._finite(losses))
        train_loss = math.fsum(losses) / len(losses) if losses else math.nan
        self._call("on_train_epoch_end", self.epoch, train_loss)
        return train_loss

    @torch.no_grad()
    def validate_epoch(self, loader: Iterable) -> Metrics:
        """One pass over the validation batches; returns `compute_metrics` of the steps' outputs."""
        self.model.eval()
        self._call("on_validation_epoch_start", self.epoch)
        results = []
        for batch_idx, batch in enumerate(loader):
            batch = self._to_device(batch)
            self._call("on_validation_batch_start", batch, batch_idx)
            with self._autocast():
                outputs = self.validation_step(batch, batch_idx)
            results.append(outputs)
            self._call("on_validation_batch_end", batch, batch_idx, outputs)
        metrics = self.compute_metrics(gather(results))
        self._call("on_validation_epoch_end", self.epoch, metrics)
        return metrics

    def compute_metrics(self, outputs: list[Any]) -> Metrics:
        """The mean of each value that all validation steps returned, over all its elements."""
        means = {}
        for key in outputs[0]:
            values = [torch.as_tensor(row[key]).detach().cpu().flatten() for row in outputs]
            means[key] = torch.cat(values).double().mean().item()
        return means

    def _is_better(self, metrics: Metrics, best: Metrics | None) -> bool:
        """Whether a checkpoint with `metrics` replaces the best one: by default, a lower loss."""
        if "loss" not in metrics:
            raise TrainingError(
                "validation metrics must have 'loss' to choose the best checkpoint, got "
                f"{sorted(metrics)}; return it from validation_step or override _is_better."
            )
        return best is None or metrics["loss"] < best["loss"]

    def save_checkpoint(self, is_best: bool = False) -> None:
        """Write what the policy keeps, and delete what it no longer keeps."""
        if self.checkpoint_dir is None or rank() > 0:
            return
        checkpoint = {
            "epoch": self.epoch,
            "model": getattr(self.model, "hyperparameters", {}),
            "metadata": self.metadata,
            "device": self.device.type,
            "precision": str(self.dtype).removeprefix("torch."),
            "history": self.history,
            "best_metrics": self.best_metrics,
            "should_stop": self.should_stop,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict() if self.scheduler else None,
            "scaler_state_dict": self.scaler.state_dict(),
            "callback_state_dicts": [callback.state_dict() for callback in self.callbacks],
            "random_state": random_state(),
        }
        if is_best and self.checkpoints.best:
            save_atomically(checkpoint, self.checkpoint_dir / "best_model.pth")
        if self.checkpoints.keeps(self.epoch, newest=self.epoch):
            save_atomically(checkpoint, self.checkpoint_dir / f"epoch_{self.epoch}.pth")
        if self.checkpoints.last:
            leaving = self.epoch - self.checkpoints.last
            if not self.checkpoints.keeps(leaving, newest=self.epoch):
                (self.checkpoint_dir / f"epoch_{leaving}.pth").unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path) -> None:
        """Restore everything, so that `fit` continues as if it had not been interrupted."""
        self._set_up_optimizer()
        checkpoint = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(checkpoint["model_state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        self.scaler.load_state_dict(checkpoint["scaler_state_dict"])
        if self.scheduler:
            self.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        states = checkpoint["callback_state_dicts"]
        for callback, state in zip(self.callbacks, states, strict=True):
            callback.load_state_dict(state)
        self.epoch = checkpoint["epoch"]
        self.history = checkpoint["history"]
        self.best_metrics = checkpoint["best_metrics"]
        self.should_stop = checkpoint["should_stop"]
        set_random_state(checkpoint["random_state"])

    def _optimize(
        self, batch: Batch, batch_idx: int, num_batches: int
    ) -> tuple[dict[str, Any], Tensor]:
        first = batch_idx - batch_idx % self.accumulate_batches
        count = min(self.accumulate_batches, num_batches - first)
        completes_group = batch_idx + 1 == first + count
        with contextlib.nullcontext() if completes_group else self._without_synchronisation():
            with self._autocast():
                outputs = self._step(batch, batch_idx)
            if not isinstance(outputs, dict) or "loss" not in outputs:
                raise TrainingError("training_step must return a dict with 'loss'.")
            loss = outputs["loss"].detach()
            if self.device.type == "cpu":  # a GPU would have to wait; train_epoch looks at its end
                self._finite([loss], batch_idx)
            self.scaler.scale(outputs["loss"] / count).backward()
        if completes_group:
            self.scaler.unscale_(self.optimizer)
            self._call("on_before_optimizer_step")
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        return outputs, loss

    def _finite(self, losses: list[Tensor], first: int = 0) -> list[float]:
        """The values of the losses of consecutive batches."""
        values = torch.stack(losses).tolist() if losses else []
        for batch_idx, value in enumerate(values, start=first):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss must be finite, got {value} in epoch {self.epoch}, batch "
                    f"{batch_idx}; the last good checkpoint is kept. Lower the learning rate, or "
                    "use float32."
                )
        return values

    def _finish_epoch(self, train_loss: float, val_metrics: Metrics) -> None:
        row = {"epoch": self.epoch, "train_loss": train_loss}
        row |= {f"val_{key}": value for key, value in val_metrics.items()}
        self.history.append(row | {"learning_rate": self.optimizer.param_groups[0]["lr"]})
        metrics = val_metrics or {"loss": train_loss}
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metrics["loss"])
        elif self.scheduler:
            self.scheduler.step()
        is_best = self._is_better(metrics, self.best_metrics)
        if is_best:
            self.best_metrics = metrics
        self.save_checkpoint(is_best)

    def _set_up(self, train_loader: Iterable, val_loader: Iterable | None) -> None:
        for name, loader in (("training", train_loader), ("validation", val_loader)):
            if loader is not None and len(loader) == 0:
                raise TrainingError(f"the {name} loader must have at least one batch, got none.")
        self._set_up_optimizer()
        self._step = self.training_step
        if world_size() > 1:
            join_processes(self.device)
            synchronise_batch_norm(self.model)
            self._step = DistributedDataParallel(_TrainingStep(self))

    def _set_up_optimizer(self) -> None:
        if self.optimizer is not None:
            return
        configured = self.configure_optimizers()
        if not isinstance(configured, dict) or "optimizer" not in configured:
            raise TrainingError(
                "configure_optimizers must return a dict with 'optimizer' and optionally "
                f"'scheduler', got {type(configured).__name__}."
            )
        groups = configured["optimizer"].param_groups
        if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
            raise TrainingError("the optimizer must have a parameter that requires a gradient.")
        self.optimizer, self.scheduler = configured["optimizer"], configured.get("scheduler")

    def _call(self, hook: str, *args: Any) -> None:
        for hooks in (self, *self.callbacks):
            try:
                getattr(hooks, hook)(*args)
            except StopIteration:
                self.should_stop = True

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _without_synchronisation(self) -> contextlib.AbstractContextManager:
        """While batches accumulate, gradients need not travel between processes."""
        if isinstance(self._step, DistributedDataParallel):
            return self._step.no_sync()
        return contextlib.nullcontext()

    def _to_device(self, batch: Batch) -> Batch:
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, dict):
            return {key: self._to_device(value) for key, value in batch.items()}
        if isinstance(batch, (list, tuple)):
            return type(batch)(map(self._to_device, batch))
        return batch

    def _progress(self, loader: Iterable) -> Iterable:
        description = f"epoch {self.epoch}/{self.num_epochs}"
        if self.history:
            losses = (item for item in self.history[-1].items() if "loss" in item[0])
            last = ", ".join(f"{key} {value:.4f}" for key, value in losses)
            description += f", last {last}"
        silent = True if rank() > 0 else None  # None: unless it is a terminal
        return tqdm(loader, desc=description, unit="batch", leave=False, disable=silent)


def set_epoch(loader: Iterable, epoch: int) -> None:
    """Let a loader that shuffles do so as in that epoch."""
    if hasattr(getattr(loader, "sampler", None), "set_epoch"):
        loader.sampler.set_epoch(epoch)


class _TrainingStep(nn.Module):
    """A trainer's step as the forward pass that DistributedDataParallel wraps."""

    def __init__(self, trainer: BaseTrainer) -> None:
        super().__init__()
        self.model = trainer.model
        self.training_step = trainer.training_step

    def forward(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return self.training_step(batch, batch_idx)


@contextlib.contextmanager
def _explained_out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the device's memory is too small ({str(error).splitlines()[0]}); lower "
            "training.batch_size (and raise training.accumulate_batches to make up for it), set "
            "training.gradient_checkpointing, a training.precision of 16 bits, or a smaller "
            "data.image_size."
        ) from None
