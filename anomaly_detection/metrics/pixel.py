"""Figures of anomaly maps against masks, in memory that does not grow with the number of images."""

import numpy as np
from scipy import ndimage

SHIFT = 11  # of the 31 bits of a non-negative float32 the upper 20 are the bin: 1 part in 4096
NUM_BINS = 1 << (31 - SHIFT)
EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


class PixelHistogram:
    """Pixel AUROC, average precision, best F1 and AUPRO from histograms of the maps' values.

    The bits of non-negative floats are in the order of their values, so that the upper bits are a
    bin whose range need not be known; values in one bin count as ties. Three histograms carry all
    four figures: normal pixels, anomalous pixels, and anomalous pixels weighted with one over the
    area of their region, whose cumulative sum is the mean overlap of regions.
    """

    def __init__(self) -> None:
        self.normal = np.zeros(NUM_BINS, dtype=np.int64)
        self.anomalous = np.zeros(NUM_BINS, dtype=np.int64)
        self.overlap = np.zeros(NUM_BINS, dtype=np.float64)
        self.num_regions = 0

    def update(self, anomaly_maps: np.ndarray, masks: np.ndarray) -> None:
        """Count the pixels of a batch.

        Args:
            anomaly_maps: Shape (N, H, W), finite and not negative.
            masks: Same shape: 0 normal, 1 anomalous; any other value is left out.

        Raises:
            ValueError: The shapes differ, or a value is negative or not finite.
        """
        if anomaly_maps.ndim != 3 or anomaly_maps.shape != masks.shape:
            raise ValueError(
                "anomaly_maps and masks must have the same shape (N, H, W), got "
                f"{anomaly_maps.shape} and {masks.shape}."
            )
        maps = np.ascontiguousarray(anomaly_maps, dtype=np.float32) + 0.0  # makes -0.0 to 0.0
        if maps.size and not (maps.min() >= 0 and maps.max() < np.inf):
            raise ValueError("anomaly_maps must be finite and not negative.")
        bins = maps.view(np.int32) >> SHIFT
        self.normal += np.bincount(bins[masks == 0], minlength=NUM_BINS)
        for image_bins, mask in zip(bins, masks, strict=True):
            anomalous = mask == 1
            if anomalous.any():
                self._count_regions(image_bins[anomalous], anomalous)

    def _count_regions(self, bins: np.ndarray, anomalous: np.ndarray) -> None:
        regions, count = ndimage.label(anomalous, structure=EIGHT_CONNECTED)
        regions = regions[anomalous]
        np.add.at(self.anomalous, bins, 1)
        np.add.at(self.overlap, bins, 1 / np.bincount(regions)[regions])
        self.num_regions += count

    def merge(self, other: "PixelHistogram") -> None:
        """Add what another one counted; the result is that of one pass over both."""
        self.normal += other.normal
        self.anomalous += other.anomalous
        self.overlap += other.overlap
        self.num_regions += other.num_regions

    def compute(self, aupro_limit: float = 0.3) -> dict[str, float]:
        """`pixel_auroc`, `pixel_average_precision`, `pixel_f1_max` and `aupro`.

        AUPRO is the mean overlap of the 8-connected regions against the false-positive rate,
        integrated to `aupro_limit` (its end interpolated) and divided by it, not rescaled
        (Bergmann et al., IJCV 2021).

        Raises:
            ValueError: There are no normal or no anomalous pixels.
        """
        if not (self.normal.any() and self.anomalous.any()):
            raise ValueError("masks must have normal and anomalous pixels.")
        used = np.flatnonzero(self.normal + self.anomalous)[::-1]
        false = np.cumsum(self.normal[used])
        true = np.cumsum(self.anomalous[used])
        recall, fall_out = true / true[-1], false / false[-1]
        precision = true / (true + false)
        overlap = np.cumsum(self.overlap[used]) / self.num_regions
        return {
            "pixel_auroc": _area(fall_out, recall, 1.0),
            "pixel_average_precision": float(np.diff(recall, prepend=0) @ precision),
            "pixel_f1_max": float(np.max(2 * true / (true + false + true[-1]))),
            "aupro": min(1.0, _area(fall_out, overlap, aupro_limit) / aupro_limit),
        }


def _area(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Area under a curve from (0, 0) to `limit`, where it is interpolated."""
    x, y = np.r_[0.0, x], np.r_[0.0, y]
    inside = x <= limit
    x, y = np.r_[x[inside], limit], np.r_[y[inside], np.interp(limit, x, y)]
    return float(np.trapezoid(y, x))
