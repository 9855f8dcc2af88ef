"""From folders of images to batches."""

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
from anomaly_detection.data.transforms import get_test_transforms, get_train_transforms

__all__ = [
    "DataError",
    "MVTecDataset",
    "PreparedDataset",
    "Sample",
    "available_categories",
    "create_dataloader",
    "get_test_transforms",
    "get_train_transforms",
    "prepare_category",
    "scan_category",
    "split_normal_images",
]
