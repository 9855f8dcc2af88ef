"""Names that code outside of this project may import."""

from importlib import import_module

import pytest

PUBLIC = {
    "anomaly_detection": ["Detector", "Prediction"],
    "anomaly_detection.config": ["load_config", "load_experiment_config"],
    "anomaly_detection.data": [
        "MVTecDataset",
        "create_dataloader",
        "get_test_transforms",
        "get_train_transforms",
    ],
    "anomaly_detection.evaluation": ["false_reject_threshold"],
    "anomaly_detection.evaluator": ["evaluate"],
    "anomaly_detection.features": ["FeaturePyramid", "available_levels"],
    "anomaly_detection.cli": ["main"],
    "anomaly_detection.export": ["export_detector", "measure_parity"],
    "anomaly_detection.inference": ["Detector", "DetectorError", "p_value", "save_detector"],
    "anomaly_detection.metrics": [
        "compute_auroc",
        "compute_auroc_per_class",
        "plot_confusion_matrix",
        "plot_roc_curve",
    ],
    "anomaly_detection.models": ["ModelSpec", "load_model", "restore", "snapshot"],
    "anomaly_detection.models.ensemble": ["EnsembleModel"],
    "anomaly_detection.models.gaussian": ["GaussianModel"],
    "anomaly_detection.models.patchcore": ["PatchCoreModel"],
    "anomaly_detection.models.stfpm": [
        "STFPMLoss",
        "STFPMModel",
        "STFPMTrainer",
    ],
    "anomaly_detection.trainer": ["BaseTrainer", "Callback", "EarlyStopping"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_importable(module):
    for name in PUBLIC[module]:
        assert callable(getattr(import_module(module), name))
