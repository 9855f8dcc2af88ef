"""The Gaussian model as the pipeline sees it."""

import torch

from anomaly_detection.features.moments import Moments
from anomaly_detection.models.contract import FitContext, FitResult, ModelSpec
from anomaly_detection.models.gaussian.config import Parameters
from anomaly_detection.models.gaussian.model import GaussianModel
from anomaly_detection.models.pyramid import pyramid_options
from anomaly_detection.progress import progress
from anomaly_detection.trainer import choose_dtype, dtype_name


def build(parameters: Parameters, in_channels: int = 3) -> GaussianModel:
    """A backbone with its weights, without any distribution."""
    return GaussianModel(
        **pyramid_options(parameters),
        in_channels=in_channels,
        max_channels=parameters.max_channels,
        is_shared=parameters.shrinkage == 1,
    )


@torch.no_grad()
def fit(model: GaussianModel, parameters: Parameters, context: FitContext) -> FitResult:
    """Estimate the distributions from all normal images; a killed fit starts anew.

    Raises:
        TrainingError: There are fewer than two images, or features are not finite.
    """
    device = context.device
    dtype = choose_dtype(parameters.precision, device)
    levels = [Moments() for _ in model.gaussians]
    generator = torch.Generator().manual_seed(parameters.seed)
    for gaussian in model.gaussians:
        gaussian.choose_channels(generator)
    model.to(device).eval()
    for batch in progress(context.normal, "features", "batches"):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features = model.extract(batch["image"].to(device))
        for moments, level in zip(levels, features, strict=True):
            moments.add(level)
    for gaussian, moments in zip(model.gaussians, levels, strict=True):
        gaussian.estimate(moments, parameters.shrinkage)
    model.standardise(context.normal, device)
    return FitResult(dtype_name(dtype))


SPEC = ModelSpec(GaussianModel, build, fit)
