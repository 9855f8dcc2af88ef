"""From folders of images to batches.

What is named here is imported from its module when it is asked for, so that nothing waits for
PyTorch or torchvision that does not use them.
"""

from importlib import import_module
from typing import Any

from anomaly_detection.errors import DataError

HOMES = {
    "PreparedArrays": "arrays",
    "audit_prepared": "audit",
    "Sample": "layout",
    "available_categories": "layout",
    "scan_category": "layout",
    "create_dataloader": "loader",
    "MVTecDataset": "mvtec",
    "prepare_category": "prepare",
    "PreparedDataset": "prepared",
    "split_normal_images": "splits",
    "every_defect": "synthetic",
    "one_defect_each": "synthetic",
    "synthetic_batches": "synthetic",
    "get_test_transforms": "transforms",
    "get_train_transforms": "transforms",
}
__all__ = ["DataError", *HOMES]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
