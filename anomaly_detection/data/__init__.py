"""From folders of images to batches."""

from anomaly_detection.data.audit import audit_prepared
from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.mvtec import (
    DataError,
    MVTecDataset,
    Sample,
    available_categories,
    scan_category,
)
from anomaly_detection.data.prepared import PreparedDataset, prepare_category
from anomaly_detection.data.splits import split_normal_images
from anomaly_detection.data.synthetic import every_defect, one_defect_each, synthetic_batches
from anomaly_detection.data.transforms import get_test_transforms, get_train_transforms

__all__ = [
    "DataError",
    "MVTecDataset",
    "PreparedDataset",
    "Sample",
    "audit_prepared",
    "available_categories",
    "create_dataloader",
    "every_defect",
    "get_test_transforms",
    "get_train_transforms",
    "one_defect_each",
    "prepare_category",
    "scan_category",
    "split_normal_images",
    "synthetic_batches",
]
