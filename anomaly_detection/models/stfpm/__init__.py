"""STFPM, a student and a teacher."""

from anomaly_detection.models.stfpm.stfpm import (
    AnomalyMapGenerator,
    STFPMLoss,
    STFPMModel,
    feature_distance,
)
from anomaly_detection.models.stfpm.trainer import STFPMTrainer

__all__ = ["AnomalyMapGenerator", "STFPMLoss", "STFPMModel", "STFPMTrainer", "feature_distance"]
