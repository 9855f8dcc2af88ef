"""Convert a model to plain values for a file, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_detection.models import spec
from anomaly_detection.models.contract import AnomalyModel

SNAPSHOT = ("name", "hyperparameters", "model_state_dict")


class InPrecision(nn.Module):
    """A model whose forward pass runs under autocast.

    Args:
        model: Any model.
        dtype: What it computes in.
    """

    def __init__(self, model: AnomalyModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    @property
    def inputs(self) -> Sequence[str]:
        """The model's."""
        return self.model.inputs

    def forward(self, images: Tensor, *further: Tensor) -> Any:
        """The model's outputs."""
        with torch.autocast(images.device.type, self.dtype):
            return self.model(images, *further)


def snapshot(name: str, model: AnomalyModel) -> dict[str, Any]:
    """What `restore` needs, in types that `torch.load(weights_only=True)` allows."""
    state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    return {"name": name, "hyperparameters": model.hyperparameters, "model_state_dict": state}


def restore(
    content: dict[str, Any],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The model of a `snapshot`, in eval mode and simplified for inference.

    On a GPU, a float32 model makes this process compute convolutions in float32 from now on: in
    TF32, PyTorch's default, scores would differ from those on a CPU and of exports.

    Args:
        content: The snapshot, perhaps with further values.
        device: Where to put the model.
        dtype: What it computes in.
    """
    model: Any = spec(content["name"]).model(**content["hyperparameters"])
    model.load_state_dict(content["model_state_dict"])
    model.eval().simplify()
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False
    else:
        model = InPrecision(model, dtype).eval()
    return model.to(device)


def load_model(
    checkpoint: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The model in a checkpoint of the pipeline, for inference; needs nothing but the file."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return restore(content, device, dtype)
