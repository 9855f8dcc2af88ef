"""What `configure_optimizers` must return."""

from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from anomaly_detection.errors import TrainingError


def checked_optimizers(configured: Any) -> dict[str, Any]:
    """The dict that `configure_optimizers` returned.

    Raises:
        TrainingError: It is none, has no optimizer, or has one with nothing to train; or its
            scheduler cannot step as often as `interval` says.
    """
    if not isinstance(configured, dict) or "optimizer" not in configured:
        raise TrainingError(
            "configure_optimizers must return a dict with 'optimizer' and optionally "
            f"'scheduler' and 'interval', got {type(configured).__name__}."
        )
    groups = configured["optimizer"].param_groups
    if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
        raise TrainingError("the optimizer must have a parameter that requires a gradient.")
    interval = configured.get("interval", "epoch")
    if interval not in ("epoch", "step"):
        raise TrainingError(f"interval must be 'epoch' or 'step', got {interval!r}.")
    if interval == "step" and isinstance(configured.get("scheduler"), ReduceLROnPlateau):
        raise TrainingError(
            "interval must be 'epoch' for ReduceLROnPlateau, which needs the validation loss."
        )
    return configured
