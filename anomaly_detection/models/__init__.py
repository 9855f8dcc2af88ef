"""The models by name, each with its trainer. A new model is a new folder and a line in MODELS."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from anomaly_detection.backbones import FeaturePyramid
from anomaly_detection.models.stfpm import STFPMModel, STFPMTrainer
from anomaly_detection.trainer import BaseTrainer

MODELS: dict[str, tuple[type[nn.Module], type[BaseTrainer]]] = {
    "stfpm": (STFPMModel, STFPMTrainer),
}


def create_model(name: str, **hyperparameters: Any) -> nn.Module:
    """A new model of a registered name."""
    return MODELS[name][0](**hyperparameters)


def create_trainer(name: str, model: nn.Module, **options: Any) -> BaseTrainer:
    """The trainer that belongs to a registered name."""
    return MODELS[name][1](model, **options)


def load_model(
    checkpoint: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model of a checkpoint, for inference as below; nothing but the file is needed."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = create_model(**content["model"], weights="random")
    model.load_state_dict(content["model_state_dict"])
    return for_inference(model, device, dtype)


def for_inference(
    model: nn.Module, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A model that is on the CPU, made ready to judge images; it can no longer be trained.

    Args:
        model: Is changed.
        device: Where it goes.
        dtype: What it computes in, by `torch.autocast`.
    """
    for module in model.eval().modules():
        if isinstance(module, FeaturePyramid):
            module.fold_batch_norm()
    if dtype != torch.float32:
        model.forward = torch.autocast(torch.device(device).type, dtype)(model.forward)
    return model.to(device)
