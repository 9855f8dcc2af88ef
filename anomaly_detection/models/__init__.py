"""The models: one folder each, found by name and imported on demand.

A folder has `config.py` with the class `Parameters`, which imports no PyTorch, and `spec.py` with
`SPEC`, a `ModelSpec`. See docs/adding-a-model.md.
"""

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import lazy_loader

from anomaly_detection.parameters import Parameters

_attached, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "files": ["SNAPSHOT", "load_model", "restore", "snapshot"],
        "contract": ["AnomalyModel", "FitContext", "FitResult", "ModelSpec"],
    },
)


def __getattr__(name: str) -> Any:
    return _attached(name)


def names() -> list[str]:
    """The names of all models, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def parameters(name: str) -> type[Parameters]:
    """A model's `Parameters` class."""
    return import_module(f"{__name__}.{name}.config").Parameters


def spec(name: str) -> Any:
    """A model's `ModelSpec`: how it is built and fitted."""
    return import_module(f"{__name__}.{name}.spec").SPEC


def folder(name: str) -> Path:
    """The folder with a model's code."""
    return Path(import_module(f"{__name__}.{name}.config").__file__ or "").parent
