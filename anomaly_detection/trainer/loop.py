"""BaseTrainer: the training loop. Nothing here is specific to a model.

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
checkpoint
"""

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from anomaly_detection.errors import TrainingError
from anomaly_detection.progress import pace, progress, say
from anomaly_detection.trainer.checkpoints import (
    ModelCheckpoint,
    random_state,
    save_atomically,
    set_random_state,
)
from anomaly_detection.trainer.devices import (
    choose_device,
    choose_dtype,
    dtype_name,
    gather,
    join_processes,
    rank,
    wait_for_all,
    world_size,
)
from anomaly_detection.trainer.hooks import Batch, Callback, Hooks, Loader, Metrics
from anomaly_detection.trainer.numerics import synchronise_batch_norm, widen_depthwise_convolutions
from anomaly_detection.trainer.resume import latest_checkpoint


class BaseTrainer(Hooks, ABC):
    """Train a model; a subclass defines the steps and the optimizer.

    Under torchrun, the processes train one model with DistributedDataParallel.

    Args:
        model: Moved to `device`.
        loss_fn: For the subclass's steps.
        device: `auto` for the GPU if there is one, or anything `torch.device` accepts.
        checkpoint_dir: Folder of `epoch_N.pth` and `best_model.pth`; None saves nothing.
        callbacks: Called at each hook, in this order, after the trainer's own method; each has
            the trainer as `self.trainer`.
        precision: What the steps compute in: `float32`, `bfloat16`, `float16`, or `auto`.
        accumulate_batches: How many batches' gradients are averaged for one optimizer step.
        checkpoints: Which checkpoints to keep.
        metadata: Plain values for the checkpoint, such as the run's parameters.

    Attributes:
        epoch: Epochs started so far.
        step: Optimizer steps taken so far.
        num_epochs, num_steps: The arguments of `fit`; num_steps may be None.
        train_loader, val_loader: The arguments of `fit`; val_loader may be None.
        history: A dict for each finished epoch: epoch, train_loss, val_*, learning_rate.
        best_epoch: The epoch whose model is `best_model.pth`.
        best_metrics: That epoch's validation metrics.
        should_stop: Whether a hook has raised StopIteration.
    """

    optimizer: torch.optim.Optimizer  # both are set by `fit`
    train_loader: Loader

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | None = None,
        device: str | torch.device = "auto",
        checkpoint_dir: str | Path | None = None,
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
        self.scheduler: Any = None
        self.scheduler_interval = "epoch"
        self.val_loader: Loader | None = None
        self.epoch = self.step = self.num_epochs = 0
        self.num_steps: int | None = None
        self.should_stop = False
        self.history: list[dict[str, float]] = []
        self.best_epoch: int | None = None
        self.best_metrics: Metrics | None = None
        self._checkpoint: dict[str, Any] | None = None  # loaded, not yet resumed from
        self._images_per_second = 0.0

    @abstractmethod
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """A dict whose `loss` is a scalar to minimise."""

    @abstractmethod
    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        """Anything that `compute_metrics` accepts; by default a dict of values to average."""

    @abstractmethod
    def configure_optimizers(self) -> dict[str, Any]:
        """A dict with `optimizer` and, if there is one, a `scheduler`.

        The scheduler steps every epoch, or after every optimizer step if `interval` is "step".
        `num_epochs`, `num_steps` and the loaders are already set.
        """

    def fit(
        self,
        train_loader: Loader,
        val_loader: Loader | None = None,
        num_epochs: int = 1,
        num_steps: int | None = None,
    ) -> list[dict[str, float]]:
        """Train up to epoch `num_epochs`, or up to `num_steps` optimizer steps if that is sooner.

        Returns the history. The checkpoints include what hooks change in `on_fit_end`.

        Raises:
            TrainingError: A loader is empty, the optimizer has nothing to train, a loss is not
                finite, or the device runs out of memory.
        """
        self.train_loader, self.val_loader = train_loader, val_loader
        self.num_epochs, self.num_steps = num_epochs, num_steps
        self._set_up()
        with _explained_out_of_memory():
            self._call("on_fit_start")
            if self._checkpoint:  # last: the repeated set-up may have drawn random numbers
                set_random_state(self._checkpoint["random_state"])
                self._checkpoint = None
            while not self._is_done():
                started = time.monotonic()
                self.epoch += 1
                train_loss = self.train_epoch(train_loader)
                val_metrics = {} if val_loader is None else self.validate_epoch(val_loader)
                self._finish_epoch(train_loss, val_metrics)
                say(self._epoch_in_words(time.monotonic() - started))
            self._call("on_fit_end")
        self.save_checkpoint(is_best=self.best_epoch == self.epoch)
        self.should_stop = False
        return self.history

    def train_epoch(self, loader: Loader) -> float:
        """Train on every batch once; returns their mean loss."""
        self.model.train()
        self.optimizer.zero_grad()
        set_epoch(loader, self.epoch)
        self._call("on_train_epoch_start", self.epoch)
        losses, num_images, started = [], 0, time.perf_counter()
        name = f"epoch {self.epoch}/{self.num_epochs}"
        for batch_idx, batch in enumerate(progress(loader, name, "batches")):
            if self.should_stop or self._out_of_steps():
                break
            batch = self._to_device(batch)
            self._call("on_train_batch_start", batch, batch_idx)
            outputs, loss = self._optimize(batch, batch_idx, len(loader))
            losses.append(loss)
            num_images += number_of_images(batch)
            self._call("on_train_batch_end", batch, batch_idx, outputs, loss)
        losses = gather(self._finite(losses))
        self._images_per_second = world_size() * num_images / (time.perf_counter() - started)
        train_loss = math.fsum(losses) / len(losses) if losses else math.nan
        self._call("on_train_epoch_end", self.epoch, train_loss)
        return train_loss

    @torch.no_grad()
    def validate_epoch(self, loader: Loader) -> Metrics:
        """Validate on every batch once; returns `compute_metrics` of the steps' outputs."""
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
        """Write the checkpoints that the policy keeps, and delete those it no longer keeps."""
        if self.checkpoint_dir is None or rank() > 0:
            return
        checkpoint = {
            "epoch": self.epoch,
            "step": self.step,
            "hyperparameters": getattr(self.model, "hyperparameters", {}),
            "metadata": self.metadata,
            "device": self.device.type,
            "precision": dtype_name(self.dtype),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_metrics": self.best_metrics,
            "should_stop": self.should_stop,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict() if self.scheduler else None,
            "scaler_state_dict": self.scaler.state_dict(),
            "callback_state_dicts": {
                name: callback.state_dict() for name, callback in self._named_callbacks()
            },
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
        """Restore everything, so that `fit` continues as if it had not been interrupted.

        `fit` creates the optimizer and the scheduler, and restores them then.
        """
        checkpoint = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(checkpoint["model_state_dict"])
        for name, callback in self._named_callbacks():
            if name in checkpoint["callback_state_dicts"]:
                callback.load_state_dict(checkpoint["callback_state_dicts"][name])
        for name in ("epoch", "step", "history", "best_epoch", "best_metrics", "should_stop"):
            setattr(self, name, checkpoint[name])
        self._checkpoint = checkpoint

    def load_latest_checkpoint(self) -> None:
        """`load_checkpoint` with the newest one in `checkpoint_dir`, if there is one."""
        newest = latest_checkpoint(self.checkpoint_dir) if self.checkpoint_dir else None
        if newest:
            self.load_checkpoint(newest)
            say(f"going on after epoch {self.epoch} of an interrupted training")

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
            if self.device.type == "cpu":  # a GPU would have to wait; train_epoch checks at its end
                self._finite([loss], batch_idx)
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

    def _is_done(self) -> bool:
        return self.epoch >= self.num_epochs or self.should_stop or self._out_of_steps()

    def _out_of_steps(self) -> bool:
        return self.num_steps is not None and self.step >= self.num_steps

    def _named_callbacks(self) -> list[tuple[str, Callback]]:
        """The callbacks by class name; the second of a class is `<name>-2`."""
        named: dict[str, Callback] = {}
        for callback in self.callbacks:
            name = type(callback).__name__
            number = 1 + sum(type(other).__name__ == name for other in named.values())
            named[name if number == 1 else f"{name}-{number}"] = callback
        return list(named.items())

    def _finite(self, losses: list[Tensor], first: int = 0) -> list[float]:
        """The losses of consecutive batches as floats; raises if one is not finite."""
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
        elif self.scheduler and self.scheduler_interval == "epoch":
            self.scheduler.step()
        is_best = self._is_better(metrics, self.best_metrics)
        if is_best:
            self.best_epoch, self.best_metrics = self.epoch, metrics
        self.save_checkpoint(is_best)

    def _set_up(self) -> None:
        loaders: dict[str, Loader | None]
        loaders = {"training": self.train_loader, "validation": self.val_loader}
        for name, loader in loaders.items():
            if loader is not None and len(loader) == 0:
                raise TrainingError(f"the {name} loader must have at least one batch, got none.")
        if not hasattr(self, "optimizer"):
            self._set_up_optimizer()
        if self._checkpoint:
            self._restore_optimizer(self._checkpoint)
        self._step = self.training_step
        if world_size() > 1:
            join_processes(self.device)
            synchronise_batch_norm(self.model)
            self._step = DistributedDataParallel(_TrainingStep(self))

    def _set_up_optimizer(self) -> None:
        configured = self.configure_optimizers()
        if not isinstance(configured, dict) or "optimizer" not in configured:
            raise TrainingError(
                "configure_optimizers must return a dict with 'optimizer' and optionally "
                f"'scheduler' and 'interval', got {type(configured).__name__}."
            )
        groups = configured["optimizer"].param_groups
        if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
            raise TrainingError("the optimizer must have a parameter that requires a gradient.")
        self.optimizer, self.scheduler = configured["optimizer"], configured.get("scheduler")
        self.scheduler_interval = configured.get("interval", "epoch")
        if self.scheduler_interval not in ("epoch", "step"):
            raise TrainingError(
                f"interval must be 'epoch' or 'step', got {self.scheduler_interval!r}."
            )
        if self.scheduler_interval == "step" and isinstance(self.scheduler, ReduceLROnPlateau):
            raise TrainingError(
                "interval must be 'epoch' for ReduceLROnPlateau, which needs the validation loss."
            )

    def _restore_optimizer(self, checkpoint: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        self.scaler.load_state_dict(checkpoint["scaler_state_dict"])
        if self.scheduler:
            self.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])

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

    def _epoch_in_words(self, seconds: float) -> str:
        """Losses and speed of the epoch that took so long, and how long the others will take."""
        row, left = self.history[-1], (self.num_epochs - self.epoch) * seconds
        losses = [f"train loss {row['train_loss']:#.4g}"]
        if "val_loss" in row:
            losses.append(f"validation loss {row['val_loss']:#.4g}")
        speed = pace(self._images_per_second, "images", None if self._is_done() else left)
        return f"epoch {self.epoch}/{self.num_epochs}: {', '.join([*losses, speed])}"


def number_of_images(batch: Batch) -> int:
    """The length of the first tensor in a batch that has one; 0 without any."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    if isinstance(batch, dict):
        batch = list(batch.values())
    parts = batch if isinstance(batch, (list, tuple)) else []
    return next((count for part in parts if (count := number_of_images(part))), 0)


def set_epoch(loader: Loader, epoch: int) -> None:
    """Make a loader that shuffles use that epoch's order."""
    sampler: Any = getattr(loader, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


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
