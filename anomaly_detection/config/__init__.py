"""params.yaml: its sections, loading, and error messages. Imports no PyTorch."""

from anomaly_detection.config.loader import (
    Config,
    ConfigError,
    load_config,
    load_experiment_config,
)
from anomaly_detection.config.sections import Data, Evaluation, Hardware, Plots

__all__ = [
    "Config",
    "ConfigError",
    "Data",
    "Evaluation",
    "Hardware",
    "Plots",
    "load_config",
    "load_experiment_config",
]
