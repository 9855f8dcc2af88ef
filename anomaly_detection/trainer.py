"""BaseTrainer: the training loop and its hooks. Nothing here knows of any model.

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
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from anomaly_detection.errors import UserError

Batch = Any
Metrics = dict[str, float]


class TrainingError(UserError):
    """Training cannot start or go on; the message says what to change."""


class Hooks:
    """The places where a trainer's subclass or a callback may act; each does nothing by default.

    A hook that raises StopIteration ends training cleanly: the epoch is finished without further
    training batches, validated and saved, and `on_fit_end` is called.
    """

    def on_fit_start(self) -> None:
        """Before the first epoch."""

    def on_fit_end(self) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self, epoch: int) -> None:
        """Before the first training batch of an epoch; epochs count from 1."""

    def on_train_epoch_end(self, epoch: int, train_loss: float) -> None:
        """After the last training batch, with the mean loss of the epoch's batches."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Before a training step, with the batch on the device; batches count from 0."""

    def on_before_optimizer_step(self) -> None:
        """Between backward and the optimizer's step: the place to clip gradients."""

    def on_train_batch_end(
        self, batch: Batch, batch_idx: int, outputs: dict[str, Any], loss: float
    ) -> None:
        """After the optimizer's step."""

    def on_validation_epoch_start(self, epoch: int) -> None:
        """Before the first validation batch."""

    def on_validation_epoch_end(self, epoch: int, val_metrics: Metrics) -> None:
        """After the last validation batch, with what `compute_metrics` returned."""

    def on_validation_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Before a validation step."""

    def on_validation_batch_end(self, batch: Batch, batch_idx: int, outputs: Any) -> None:
        """After a validation step."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in vars(cls):
            if name.startswith("on_") and not hasattr(Hooks, name):
                hooks = [hook for hook in vars(Hooks) if hook.startswith("on_")]
                nearest = get_close_matches(name, hooks, n=1, cutoff=0)[0]
                raise TypeError(f"{cls.__name__}.{name} is not a hook; did you mean {nearest}?")


class BaseTrainer(Hooks, ABC):
    """Trains a model; a subclass says what a step is, and with which optimizer.

    Args:
        model: Moved to `device`.
        loss_fn: For the subclass's steps.
        device: `auto` for the GPU where there is one, or what `torch.device` takes.
        checkpoint_dir: Folder of `epoch_N.pth` and `best_model.pth`; None saves nothing.
        callbacks: Called at each hook, in this order, after the trainer's own method; each finds
            the trainer as `self.trainer`.
        precision: Of the steps: `float32`, `bfloat16`, `float16`, or `auto`.
        keep_last: How many of the newest `epoch_N.pth` stay; 0 writes none, None keeps all.
        metadata: Plain values for the checkpoint, such as the run's parameters.

    Attributes:
        epoch: Epochs begun so far.
        history: A dict for each finished epoch: epoch, train_loss, val_*, learning_rate.
        best_metrics: Of the epoch whose model is `best_model.pth`.
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
        keep_last: int | None = 1,
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
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.keep_last = keep_last
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
            TrainingError: A loader is empty, the optimizer has nothing to train, or a loss is not
                finite.
        """
        self._set_up(train_loader, val_loader)
        self.num_epochs, self.should_stop = num_epochs, False
        self._call("on_fit_start")
        while self.epoch < num_epochs and not self.should_stop:
            self.epoch += 1
            train_loss = self.train_epoch(train_loader)
            val_metrics = {} if val_loader is None else self.validate_epoch(val_loader)
            self._finish_epoch(train_loss, val_metrics)
        if self.should_stop and not self.epoch:
            self.save_checkpoint()
        self._call("on_fit_end")
        return self.history

    def train_epoch(self, loader: Iterable) -> float:
        """One pass over the training batches; returns their mean loss."""
        self.model.train()
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(self.epoch)
        self._call("on_train_epoch_start", self.epoch)
        losses = []
        for batch_idx, batch in enumerate(self._progress(loader)):
            if self.should_stop:
                break
            batch = self._to_device(batch)
            self._call("on_train_batch_start", batch, batch_idx)
            outputs, loss = self._optimize(batch, batch_idx)
            losses.append(loss)
            self._call("on_train_batch_end", batch, batch_idx, outputs, loss)
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
        metrics = self.compute_metrics(results)
        self._call("on_validation_epoch_end", self.epoch, metrics)
        return metrics

    def compute_metrics(self, outputs: list[Any]) -> Metrics:
        """The mean of each value that all validation steps returned, over all its elements."""
        columns = {
            key: [torch.as_tensor(row[key]).flatten() for row in outputs] for key in outputs[0]
        }
        return {key: torch.cat(values).double().mean().item() for key, values in columns.items()}

    def _is_better(self, metrics: Metrics, best: Metrics | None) -> bool:
        """Whether a checkpoint with `metrics` replaces the best one: by default, a lower loss."""
        if "loss" not in metrics:
            raise TrainingError(
                "validation metrics must have 'loss' to choose the best checkpoint, got "
                f"{sorted(metrics)}; return it from validation_step or override _is_better."
            )
        return best is None or metrics["loss"] < best["loss"]

    def save_checkpoint(self, is_best: bool = False) -> None:
        """Write `epoch_N.pth`, delete the one that is too old, and renew `best_model.pth`."""
        if self.checkpoint_dir is None:
            return
        checkpoint = {
            "epoch": self.epoch,
            "model": getattr(self.model, "hyperparameters", {}),
            "metadata": self.metadata,
            "history": self.history,
            "best_metrics": self.best_metrics,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict() if self.scheduler else None,
            "scaler_state_dict": self.scaler.state_dict(),
        }
        if is_best:
            save_atomically(checkpoint, self.checkpoint_dir / "best_model.pth")
        if self.keep_last != 0:
            save_atomically(checkpoint, self.checkpoint_dir / f"epoch_{self.epoch}.pth")
        if self.keep_last:
            (self.checkpoint_dir / f"epoch_{self.epoch - self.keep_last}.pth").unlink(True)

    def load_checkpoint(self, path: str | Path) -> None:
        """Restore model, optimizer, scheduler, epoch and history; `fit` continues from there."""
        self._set_up_optimizer()
        checkpoint = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(checkpoint["model_state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        self.scaler.load_state_dict(checkpoint["scaler_state_dict"])
        if self.scheduler:
            self.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        self.epoch = checkpoint["epoch"]
        self.history = checkpoint["history"]
        self.best_metrics = checkpoint["best_metrics"]

    def _optimize(self, batch: Batch, batch_idx: int) -> tuple[dict[str, Any], float]:
        with self._autocast():
            outputs = self.training_step(batch, batch_idx)
        if not isinstance(outputs, dict) or "loss" not in outputs:
            raise TrainingError("training_step must return a dict with 'loss'.")
        loss = outputs["loss"].item()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss must be finite, got {loss} in epoch {self.epoch}, batch {batch_idx}; "
                "the last good checkpoint is kept. Lower the learning rate, or use float32."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(outputs["loss"]).backward()
        self.scaler.unscale_(self.optimizer)
        self._call("on_before_optimizer_step")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return outputs, loss

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

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )

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
            last = [
                f"{key} {value:.4f}" for key, value in self.history[-1].items() if "loss" in key
            ]
            description += f", last {', '.join(last)}"
        return tqdm(loader, desc=description, unit="batch", leave=False, disable=None)


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; for `auto` the GPU where there is one, else the CPU.

    Raises:
        TrainingError: There is no such device here.
    """
    if str(name) == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"training.device must be a device of this machine, got {name} ({reason}); use auto."
        ) from None
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision's name; `auto` is bfloat16 where the hardware has it."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def save_atomically(content: Any, path: Path) -> None:
    """`torch.save` to a temporary file that then replaces `path`; same content, same bytes.

    Raises:
        TrainingError: The file cannot be written; what was there before is intact.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:  # given a name, torch.save would put it into the file
            torch.save(content, file)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise TrainingError(f"{path} must be writable: {error.strerror}.") from None
