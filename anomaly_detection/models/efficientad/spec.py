"""EfficientAD's `ModelSpec` for the pipeline."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from anomaly_detection.features.weights import BackboneError
from anomaly_detection.models.contract import FitContext, FitResult, ModelSpec
from anomaly_detection.models.efficientad.config import DISTILLED, FEATURES, PATCHES, Parameters
from anomaly_detection.models.efficientad.distillation import Distillation, DistillationTrainer
from anomaly_detection.models.efficientad.model import EfficientADModel
from anomaly_detection.models.efficientad.teachers import (
    PatchTeacher,
    PyramidTeacher,
    read_teacher,
)
from anomaly_detection.models.efficientad.trainer import EfficientADTrainer
from anomaly_detection.models.pyramid import pyramid_options


def build(parameters: Parameters, in_channels: int = 3) -> EfficientADModel:
    """A teacher, whose weights come with the fit if it is distilled; the rest starts at random.

    Raises:
        BackboneError: The teacher is a file's, and for images of other channels.
    """
    size, channels = parameters.size, parameters.channels
    options: dict[str, Any] = {"top_fraction": parameters.top_fraction, "in_channels": in_channels}
    if parameters.teacher == FEATURES:
        options |= pyramid_options(parameters)
        return EfficientADModel(FEATURES, size, channels, **options)
    if parameters.teacher == DISTILLED:
        level = parameters.backbone, parameters.layers, "random", parameters.strides
        teacher = PatchTeacher(size, PyramidTeacher(*level, channels).channels, in_channels)
    else:
        teacher = read_teacher(Path(parameters.teacher))
    if teacher.in_channels != in_channels:
        raise BackboneError(
            f"efficientad.teacher {parameters.teacher} must be for images of {in_channels} "
            f"channels, got one for {teacher.in_channels}; let it be {FEATURES} or {DISTILLED}."
        )
    model = EfficientADModel(PATCHES, teacher.size, teacher.channels, **options)
    model.teacher.load_state_dict(teacher.state_dict())
    return model


def fit(model: EfficientADModel, parameters: Parameters, context: FitContext) -> FitResult:
    """Train for some steps; the model ends with the weights of the lowest validation loss."""
    if context.pretrained:
        model.teacher.net.load_state_dict(context.pretrained)
    trainer = EfficientADTrainer(
        model,
        context.auxiliary,
        learning_rate=parameters.learning_rate,
        weight_decay=parameters.weight_decay,
        **context.trainer_options(parameters),
    )
    result = context.train(trainer, *epochs_and_steps(parameters.num_steps, parameters, context))
    model.standardise(context.validation, context.device)
    return result


def pretrain(parameters: Parameters, context: FitContext) -> dict[str, Tensor]:
    """The weights of a patch description network that has learned a backbone's features."""
    level = parameters.backbone, parameters.layers, parameters.weights, parameters.strides
    pyramid = PyramidTeacher(*level, parameters.channels, context.in_channels)
    model = Distillation(pyramid, parameters.size, context.in_channels)
    trainer = DistillationTrainer(model, context.auxiliary, **context.trainer_options(parameters))
    context.train(trainer, *epochs_and_steps(parameters.distillation_steps, parameters, context))
    return model.patches.net.state_dict()


def epochs_and_steps(steps: int, parameters: Parameters, context: FitContext) -> tuple[int, int]:
    """As many epochs as these steps need, and the steps."""
    return math.ceil(steps * parameters.accumulate_batches / len(context.fit)), steps


SPEC = ModelSpec(EfficientADModel, build, fit, pretrain)
