"""PatchCore as the pipeline sees it."""

import torch
from tqdm import tqdm

from anomaly_detection.models.contract import FitContext, FitResult, ModelSpec
from anomaly_detection.models.patchcore.config import Parameters
from anomaly_detection.models.patchcore.coreset import Reservoir, farthest_points, project
from anomaly_detection.models.patchcore.model import PatchCoreModel
from anomaly_detection.models.pyramid import pyramid_options
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
    reservoir = Reservoir(parameters.max_patches, generator)
    model.to(device).eval()
    set_epoch(context.fit, 1)
    for batch in tqdm(context.fit, desc="features", unit="batch", leave=False, disable=None):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features = model.extract(batch["image"].to(device))
        reservoir.add(features.permute(0, 2, 3, 1).flatten(0, 2))
    patches = reservoir.sample()
    if len(patches) == 0:
        raise TrainingError("the fit must have at least one image, got none.")
    if not patches.isfinite().all():
        raise TrainingError(
            f"features must be finite, got others in {parameters.precision}; "
            "set training.precision to float32."
        )
    if len(patches) > parameters.bank_size:
        points = project(patches, generator)
        patches = patches[farthest_points(points, parameters.bank_size)]
    model.bank = patches
    model.standardise(context.validation, device)
    return FitResult(dtype_name(dtype))


SPEC = ModelSpec(PatchCoreModel, build, fit)
