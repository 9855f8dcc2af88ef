"""BaseTrainer: the training loop. Nothing here is specific to a model.

on_fit_start()
for epoch in 0 ... num_epochs - 1:
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
    scheduler step, save_checkpoint(epoch, val_metrics)
on_fit_end()
"""

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from anomaly_detection.errors import TrainingError
from anomaly_detection.progress import progress, say
from anomaly_detection.trainer.batches import number_of_images, on_device, set_epoch
from anomaly_detection.trainer.checkpoints import ModelCheckpoint, make_folder, save_atomically
from anomaly_detection.trainer.devices import choose_device, choose_dtype
from anomaly_detection.trainer.hooks import Batch, Callback, Hooks, Loader, Metrics
from anomaly_detection.trainer.messages import (
    epoch_in_words,
    explained_out_of_memory,
    finite,
)
from anomaly_detection.trainer.numerics import synchronise_batch_norm, widen_depthwise_convolutions
from anomaly_detection.trainer.optimizers import checked_optimizers
from anomaly_detection.trainer.processes import (
    distributed_step,
    gather,
    join_processes,
    rank,
    wait_for_all,
    without_synchronisation,
    world_size,
)
from anomaly_detection.trainer.resume import latest_checkpoint
from anomaly_detection.trainer.state import (
    restore_optimizer,
    restore_progress,
    set_random_state,
    training_state,
)


class BaseTrainer(Hooks, ABC):
    """Train a model; a subclass defines the steps and the optimizer.

    Under torchrun, the processes train one model with DistributedDataParallel.

    Args:
        model: Moved to `device`.
        loss_fn: For the subclass's steps.
        device: `auto` for the GPU if there is one, or anything `torch.device` accepts.
        checkpoint_dir: Folder of `epoch_N.pth` and `best_model.pth`, made at once; None saves
            nothing.
        callbacks: Called at each hook, in this order, after the trainer's own method; each has
            the trainer as `self.trainer`.
        precision: What the steps compute in: `float32`, `bfloat16`, `float16`, or `auto`.
        accumulate_batches: How many batches' gradients are averaged for one optimizer step.
        checkpoints: Which checkpoints to keep; by default all.
        metadata: Plain values for the checkpoints, such as the run's parameters.

    Attributes:
        current_epoch: The epoch that runs, or ran last; 0 before and during the first.
        best_metric: The metrics of the best epoch, or None.
        best_epoch: That epoch, counted as in `history`, or None.
        optimizer, scheduler: What `configure_optimizers` returned; None before it is called.
        step: Optimizer steps taken so far.
        num_epochs, num_steps: The arguments of `fit`; num_steps may be None.
        train_loader, val_loader: The arguments of `fit`; val_loader may be None.
        history: A dict for each finished epoch: epoch, counted from 1, train_loss, val_*, and
            learning_rate.
        should_stop: Whether a hook has raised StopIteration.
    """

    train_loader: Loader  # set by `fit`
    optimizer: Any = None
    scheduler: Any = None

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | None = None,
        device: str | torch.device = "auto",
        checkpoint_dir: str | Path | None = "checkpoints",
        *,
        callbacks: Sequence[Callback] = (),
        precision: str = "float32",
        accumulate_batches: int = 1,
        checkpoints: ModelCheckpoint | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.model = model.to(self.device)
        self.loss_fn = loss_fn
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir else None
        if self.checkpoint_dir:
            make_folder(self.checkpoint_dir)
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
        self.scheduler_interval = "epoch"
        self.val_loader: Loader | None = None
        self.current_epoch = self.step = self.num_epochs = 0
        self.num_steps: int | None = None
        self.should_stop = False
        self.history: list[dict[str, float]] = []
        self.best_epoch: int | None = None
        self.best_metric: Metrics | None = None
        self._resumed: dict[str, Any] | None = None  # a state that `fit` goes on from
        self._step: Any = self.training_step

    @abstractmethod
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """A dict whose `loss` is a scalar to minimise; the batch is on the device."""

    @abstractmethod
    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        """Anything that `compute_metrics` accepts; the batch is on the device."""

    @abstractmethod
    def configure_optimizers(self) -> dict[str, Any]:
        """A dict with `optimizer` and, if there is one, a `scheduler`.

        The scheduler steps every epoch, or after every optimizer step if `interval` is "step".
        In `fit`, `num_epochs`, `num_steps` and the loaders are already set.
        """

    def compute_metrics(self, outputs: list[Any]) -> Metrics:
        """Metrics of what the validation steps returned; none by default."""
        return {}

    def _is_better(self, current_metrics: Metrics) -> bool:
        """Whether an epoch is better than that of `self.best_metric`; by default, each is."""
        return True

    def fit(
        self,
        train_loader: Loader,
        val_loader: Loader | None = None,
        num_epochs: int = 1,
        *,
        num_steps: int | None = None,
    ) -> list[dict[str, float]]:
        """Train for `num_epochs`, or up to `num_steps` optimizer steps if that is sooner.

        After `resume`, the epochs before it count. Returns the history.

        Raises:
            TrainingError: A loader is empty, the optimizer has nothing to train, a loss is not
                finite, or the device runs out of memory.
        """
        self.train_loader, self.val_loader = train_loader, val_loader
        self.num_epochs, self.num_steps = num_epochs, num_steps
        self._set_up()
        with explained_out_of_memory():
            self._call("on_fit_start")
            if self._resumed:  # last: the repeated set-up may have drawn random numbers
                set_random_state(self._resumed["random_state"])
                self._resumed = None
            while not self._is_done():
                started = time.monotonic()
                self.current_epoch = len(self.history)
                train_loss = self.train_epoch(train_loader)
                val_metrics = {} if val_loader is None else self.validate_epoch(val_loader)
                self._finish_epoch(train_loss, val_metrics)
                say(epoch_in_words(self, time.monotonic() - started))
            self._call("on_fit_end")
        self.should_stop = False
        return self.history

    def train_epoch(self, train_loader: Loader) -> float:
        """Train on every batch once; returns their mean loss."""
        if self.optimizer is None:
            self._set_up_optimizer()
        self.model.train()
        self.optimizer.zero_grad()
        set_epoch(train_loader, self.current_epoch + 1)
        self._call("on_train_epoch_start", self.current_epoch)
        losses, num_images, started = [], 0, time.perf_counter()
        name = f"epoch {self.current_epoch + 1}/{self.num_epochs or '?'}"
        for batch_idx, batch in enumerate(progress(train_loader, name, "batches")):
            if self.should_stop or self._out_of_steps():
                break
            self._call("on_train_batch_start", batch, batch_idx)
            outputs, loss = self._optimize(batch, batch_idx, len(train_loader))
            losses.append(loss)
            num_images += number_of_images(batch)
            self._call("on_train_batch_end", batch, batch_idx, outputs, loss)
        losses = gather(finite(losses, self.current_epoch))
        self.images_per_second = world_size() * num_images / (time.perf_counter() - started)
        train_loss = math.fsum(losses) / len(losses) if losses else math.nan
        self._call("on_train_epoch_end", self.current_epoch, train_loss)
        return train_loss

    @torch.no_grad()
    def validate_epoch(self, val_loader: Loader) -> Metrics:
        """Validate on every batch once; returns `compute_metrics` of the steps' outputs."""
        self.model.eval()
        self._call("on_validation_epoch_start", self.current_epoch)
        results = []
        for batch_idx, batch in enumerate(val_loader):
            self._call("on_validation_batch_start", batch, batch_idx)
            with self._autocast():
                outputs = self.validation_step(on_device(batch, self.device), batch_idx)
            results.append(outputs)
            self._call("on_validation_batch_end", batch, batch_idx, outputs)
        metrics = self.compute_metrics(gather(results))
        self._call("on_validation_epoch_end", self.current_epoch, metrics)
        return metrics

    def save_checkpoint(self, epoch: int, metrics: Metrics) -> None:
        """Write `epoch_<epoch>.pth`, and `best_model.pth` if the metrics are the best so far.

        Both have `epoch`, `model_state_dict` and `metrics`; the former also
        `optimizer_state_dict`, and under `state` what `resume` needs. Which of them are kept
        is for `checkpoints` to say.
        """
        is_best = self.best_metric is None or self._is_better(metrics)
        if is_best:
            self.best_epoch, self.best_metric = epoch + 1, metrics
        if self.checkpoint_dir is None or rank() > 0:
            return
        content = {
            "epoch": epoch,
            "model_state_dict": self.model.state_dict(),
            "metrics": metrics,
            "hyperparameters": getattr(self.model, "hyperparameters", {}),
            "metadata": self.metadata,
        }
        if is_best and self.checkpoints.best:  # first: a kill in between repeats the epoch
            save_atomically(content, self.checkpoint_dir / "best_model.pth")
        if self.checkpoints.keeps(epoch, newest=epoch):
            optimizer = self.optimizer.state_dict() if self.optimizer else None
            content |= {"optimizer_state_dict": optimizer, "state": training_state(self)}
            save_atomically(content, self.checkpoint_dir / f"epoch_{epoch}.pth")
        if self.checkpoints.last:
            leaving = epoch - self.checkpoints.last
            if not self.checkpoints.keeps(leaving, newest=epoch):
                (self.checkpoint_dir / f"epoch_{leaving}.pth").unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path) -> Metrics:
        """Load the model, and the optimizer if it is configured; returns the metrics."""
        checkpoint = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(checkpoint["model_state_dict"])
        if self.optimizer is not None and checkpoint.get("optimizer_state_dict"):
            self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        return checkpoint["metrics"]

    def resume(self, path: str | Path | None = None) -> None:
        """Let `fit` go on after a checkpoint, as if it had not been interrupted.

        Args:
            path: An `epoch_N.pth`; None for the newest in `checkpoint_dir`, if there is one.
        """
        if path is None:
            path = latest_checkpoint(self.checkpoint_dir) if self.checkpoint_dir else None
            if path is None:
                return
        checkpoint = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(checkpoint["model_state_dict"])
        restore_progress(self, checkpoint["state"])
        self._resumed = checkpoint["state"] | {"optimizer": checkpoint["optimizer_state_dict"]}
        say(f"going on after epoch {checkpoint['epoch'] + 1} of an interrupted training")

    def load_best_model(self) -> None:
        """Load the weights of the best epoch, from `checkpoint_dir`, into the model.

        Each process waits until the file has been written, and until all have read it.
        """
        if self.checkpoint_dir is None or not self.checkpoints.best:
            raise TrainingError(
                "the best model must have been saved, got checkpoint_dir "
                f"{self.checkpoint_dir} and checkpoints.best {self.checkpoints.best}."
            )
        wait_for_all()
        path = self.checkpoint_dir / "best_model.pth"
        checkpoint = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(checkpoint["model_state_dict"])
        wait_for_all()

    def _set_up(self) -> None:
        for name, loader in (("training", self.train_loader), ("validation", self.val_loader)):
            if loader is not None and len(loader) == 0:
                raise TrainingError(f"the {name} loader must have at least one batch, got none.")
        if self.optimizer is None:
            self._set_up_optimizer()
        if self._resumed:
            restore_optimizer(self, self._resumed)
        self._step = self.training_step
        if world_size() > 1:
            join_processes(self.device)
            synchronise_batch_norm(self.model)
            self._step = distributed_step(self.model, self.training_step)

    def _set_up_optimizer(self) -> None:
        configured = checked_optimizers(self.configure_optimizers())
        self.optimizer, self.scheduler = configured["optimizer"], configured.get("scheduler")
        self.scheduler_interval = configured.get("interval", "epoch")

    def _optimize(
        self, batch: Batch, batch_idx: int, num_batches: int
    ) -> tuple[dict[str, Any], Tensor]:
        """The step's outputs, and its loss, detached."""
        first = batch_idx - batch_idx % self.accumulate_batches
        count = min(self.accumulate_batches, num_batches - first)
        completes_group = batch_idx + 1 == first + count
        with contextlib.nullcontext() if completes_group else without_synchronisation(self._step):
            with self._autocast():
                outputs = self._step(on_device(batch, self.device), batch_idx)
            if not isinstance(outputs, dict) or "loss" not in outputs:
                raise TrainingError("training_step must return a dict with 'loss'.")
            loss = outputs["loss"].detach()
            if self.device.type == "cpu":  # a GPU would have to wait; train_epoch checks at its end
                finite([loss], self.current_epoch, batch_idx)
            self.scaler.scale(outputs["loss"] / count).backward()
        if completes_group:
            self.scaler.unscale_(self.optimizer)
            self._call("on_before_optimizer_step")
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.step += 1
            if self.scheduler and self.scheduler_interval == "step":
                self.scheduler.step()
        return outputs, loss

    def _finish_epoch(self, train_loss: float, val_metrics: Metrics) -> None:
        row = {"epoch": self.current_epoch + 1, "train_loss": train_loss}
        row |= {f"val_{key}": value for key, value in val_metrics.items()}
        self.history.append(row | {"learning_rate": self.optimizer.param_groups[0]["lr"]})
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(val_metrics.get("loss", train_loss))
        elif self.scheduler and self.scheduler_interval == "epoch":
            self.scheduler.step()
        metrics = {"loss": train_loss} if self.val_loader is None else val_metrics
        self.save_checkpoint(self.current_epoch, metrics)

    def _is_done(self) -> bool:
        return len(self.history) >= self.num_epochs or self.should_stop or self._out_of_steps()

    def _out_of_steps(self) -> bool:
        return self.num_steps is not None and self.step >= self.num_steps

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
