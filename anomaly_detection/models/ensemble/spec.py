"""The ensemble as the pipeline sees it."""

from dataclasses import replace

from anomaly_detection.models import spec
from anomaly_detection.models.contract import FitContext, FitResult, ModelSpec
from anomaly_detection.models.ensemble.config import Parameters
from anomaly_detection.models.ensemble.model import EnsembleModel
from anomaly_detection.progress import part


def build(parameters: Parameters, in_channels: int = 3) -> EnsembleModel:
    """The unfitted members."""
    told = parameters.of_members().items()
    members = {name: spec(name).build(own, in_channels) for name, own in told}
    return EnsembleModel(members, parameters.top_fraction, in_channels=in_channels)


def fit(model: EnsembleModel, parameters: Parameters, context: FitContext) -> FitResult:
    """Fit one member after the other, each with a folder of its own for its state."""
    results = []
    for name, own in parameters.of_members().items():
        with part(name):
            state = replace(context, state=context.state / name)
            results.append(spec(name).fit(model.members[name], own, state))
    model.standardise(context.validation, context.device)
    return next((result for result in results if result.history), results[0])


SPEC = ModelSpec(EnsembleModel, build, fit)
