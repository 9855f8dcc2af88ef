"""STFPM's `ModelSpec` for the pipeline."""

import math
from dataclasses import replace

from anomaly_detection.models.contract import FitContext, FitResult, ModelSpec
from anomaly_detection.models.pyramid import pyramid_options
from anomaly_detection.models.stfpm.config import Parameters
from anomaly_detection.models.stfpm.stfpm import STFPMLoss, STFPMModel
from anomaly_detection.models.stfpm.trainer import STFPMTrainer
from anomaly_detection.trainer import Repeated

MIN_BATCHES = 42  # of an epoch: with fewer images, each comes several times


def build(parameters: Parameters, in_channels: int = 3) -> STFPMModel:
    """A pretrained teacher and a randomly initialised student."""
    return STFPMModel(**pyramid_options(parameters), in_channels=in_channels)


def fit(model: STFPMModel, parameters: Parameters, context: FitContext) -> FitResult:
    """Train the student; the model ends with the weights of the lowest validation loss."""
    if parameters.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    trainer = STFPMTrainer(
        model,
        STFPMLoss(parameters.hard_fraction),
        learning_rate=parameters.learning_rate,
        weight_decay=parameters.weight_decay,
        feature_cache=context.feature_cache,
        **context.trainer_options(parameters),
    )
    times = math.ceil(MIN_BATCHES / max(1, len(context.fit)))
    if times > 1:
        context = replace(context, fit=Repeated(context.fit, times))
    result = context.train(trainer, parameters.num_epochs)
    model.standardise(context.validation, context.device)
    return result


SPEC = ModelSpec(STFPMModel, build, fit)
