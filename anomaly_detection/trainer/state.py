"""What a training needs to go on, besides the weights, as if it had not been interrupted."""

import random
from typing import Any

import numpy as np
import torch

from anomaly_detection.trainer.devices import dtype_name

PROGRESS = ("step", "history", "best_epoch", "best_metric", "should_stop")


def training_state(trainer: Any) -> dict[str, Any]:
    """Progress, and the states of all that has one, in types that `weights_only` loading allows."""
    return {name: getattr(trainer, name) for name in PROGRESS} | {
        "device": trainer.device.type,
        "precision": dtype_name(trainer.dtype),
        "scheduler": trainer.scheduler.state_dict() if trainer.scheduler else None,
        "scaler": trainer.scaler.state_dict(),
        "callbacks": {name: x.state_dict() for name, x in _named(trainer.callbacks)},
        "random_state": random_state(),
    }


def restore_progress(trainer: Any, state: dict[str, Any]) -> None:
    """Set what hooks may look at before training goes on, and the callbacks' states."""
    for name in PROGRESS:
        setattr(trainer, name, state[name])
    for name, callback in _named(trainer.callbacks):
        if name in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][name])


def restore_optimizer(trainer: Any, state: dict[str, Any]) -> None:
    """Set the states of optimizer, scheduler and loss scaling."""
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    if trainer.scheduler:
        trainer.scheduler.load_state_dict(state["scheduler"])


def _named(callbacks: list[Any]) -> list[tuple[str, Any]]:
    """The callbacks by class name; the second of a class is `<name>-2`."""
    named: dict[str, Any] = {}
    for callback in callbacks:
        name = type(callback).__name__
        number = 1 + sum(type(other).__name__ == name for other in named.values())
        named[name if number == 1 else f"{name}-{number}"] = callback
    return list(named.items())


def random_state() -> dict[str, Any]:
    """The state of all random number generators, in types that `weights_only` loading allows."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002, the generator that libraries use
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])
