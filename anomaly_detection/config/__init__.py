"""params.yaml: its sections, how it is read, and what is said of a wrong value. No PyTorch."""

from anomaly_detection.config.loader import Config, ConfigError, load_config
from anomaly_detection.config.sections import Data, Evaluation, Hardware, Plots

__all__ = ["Config", "ConfigError", "Data", "Evaluation", "Hardware", "Plots", "load_config"]
