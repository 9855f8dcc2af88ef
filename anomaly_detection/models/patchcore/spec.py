"""PatchCore as the pipeline sees it."""

import torch
from torch import Tensor

from anomaly_detection.models.contract import FitContext, FitResult, ModelSpec
from anomaly_detection.models.patchcore.config import Parameters
from anomaly_detection.models.patchcore.coreset import Reservoir, farthest_points, project
from anomaly_detection.models.patchcore.model import PatchCoreModel
from anomaly_detection.models.pyramid import pyramid_options
from anomaly_detection.progress import progress
from anomaly_detection.trainer import TrainingError, choose_dtype, dtype_name, set_epoch


def build(parameters: Parameters, in_channels: int = 3) -> PatchCoreModel:
    """A backbone with its weights, and an empty bank."""
    return PatchCoreModel(**pyramid_options(parameters), in_channels=in_channels)


@torch.no_grad()
def fit(model: PatchCoreModel, parameters: Parameters, context: FitContext) -> FitResult:
    """Fill the bank in one pass over the images; there is no state, a killed fit starts anew.

    Raises:
        TrainingError: There are no images, or features are not finite.
    """
    device = context.device
    dtype = choose_dtype(parameters.precision, device)
    generator = torch.Generator().manual_seed(parameters.seed)
    count = context.num_positions
    reservoirs = [
        Reservoir(max(1, parameters.max_patches // count), generator) for _ in range(count)
    ]
    model.to(device).eval()
    set_epoch(context.fit, 1)
    for batch in progress(context.fit, "features", "batches"):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features = model.extract(batch["image"].to(device))
        patches = features.permute(0, 2, 3, 1).flatten(1, 2)
        if count == 1:
            reservoirs[0].add(patches.flatten(0, 1))
        else:
            for position, own in zip(batch["position"].tolist(), patches, strict=True):
                reservoirs[position].add(own)
    size = max(1, parameters.bank_size // count)
    banks = [chosen(reservoir.sample(), size, generator) for reservoir in reservoirs]
    model.bank = banks[0] if count == 1 else filled(banks)
    if not model.bank.numel():
        raise TrainingError("the fit must have at least one image, got none.")
    if not model.bank.isfinite().all():
        raise TrainingError(
            f"features must be finite, got others in {parameters.precision}; "
            "set training.precision to float32."
        )
    model.standardise(context.validation, device)
    return FitResult(dtype_name(dtype))


def chosen(patches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of patches (n, C) that are far apart."""
    if len(patches) <= count:
        return patches
    return patches[farthest_points(project(patches, generator), count)]


def filled(banks: list[Tensor]) -> Tensor:
    """Banks (n, C) of different sizes as one tensor (P, m, C): smaller ones repeat their patches.

    A position where nothing is judged has none; it never comes, and gets zeros.
    """
    size, channels = max(len(bank) for bank in banks), max(bank.shape[1] for bank in banks)
    like = next((bank for bank in banks if len(bank)), banks[0])
    whole = like.new_zeros(len(banks), size, channels)
    for own, bank in zip(whole, banks, strict=True):
        if len(bank):
            own[:] = bank[torch.arange(size, device=bank.device) % len(bank)]
    return whole


SPEC = ModelSpec(PatchCoreModel, build, fit)
