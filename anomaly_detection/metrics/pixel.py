"""Metrics of anomaly maps against masks, in memory that does not grow with the number of images."""

import numpy as np
from scipy import ndimage

SHIFT = 11  # a bin drops the lower 11 bits of a float32, so it is 1 part in 4096 wide
CHUNK = 2**20  # pixels whose bins are in memory at once
EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


class PixelHistogram:
    """Pixel AUROC, average precision, best F1 and AUPRO from histograms of the maps' values.

    Bins are the upper bits of the values (see `_bins`), so no range has to be known beforehand;
    values in one bin count as ties. Three histograms carry all four metrics: normal pixels,
    anomalous pixels, and anomalous pixels weighted with one over the area of their region, whose
    cumulative sum is the mean overlap of regions. They cover the bins from the lowest to the
    highest value seen and grow with it: 4096 bins for each factor of 2 between the values.
    """

    def __init__(self) -> None:
        self.start = 0  # the bin that comes first in the histograms
        self.normal = np.zeros(0, dtype=np.int64)
        self.anomalous = np.zeros(0, dtype=np.int64)
        self.overlap = np.zeros(0, dtype=np.float64)
        self.num_regions = 0

    def update(self, anomaly_maps: np.ndarray, masks: np.ndarray) -> None:
        """Count the pixels of a batch.

        Args:
            anomaly_maps: Shape (N, H, W), finite, of any sign.
            masks: Same shape: 0 normal, 1 anomalous; any other value is left out.

        Raises:
            ValueError: The shapes differ, or a value is not finite.
        """
        if anomaly_maps.ndim != 3 or anomaly_maps.shape != masks.shape:
            raise ValueError(
                "anomaly_maps and masks must have the same shape (N, H, W), got "
                f"{anomaly_maps.shape} and {masks.shape}."
            )
        maps = np.ascontiguousarray(anomaly_maps, dtype=np.float32)
        values, truth = maps.reshape(-1), np.ascontiguousarray(masks).reshape(-1)
        for start in range(0, len(values), CHUNK):
            part = slice(start, start + CHUNK)
            self._count_normal(values[part], truth[part])
        for anomaly_map, mask in zip(maps, masks, strict=True):
            anomalous = mask == 1
            if anomalous.any():
                self._count_regions(anomaly_map[anomalous], anomalous)

    def _count_normal(self, values: np.ndarray, truth: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            raise ValueError(f"anomaly_maps must be finite, got {(~finite).sum()} that are not.")
        bins = _bins(values)
        self._cover(int(bins.min()), int(bins.max()) + 1)
        bins -= self.start
        self.normal += np.bincount(bins[truth == 0], minlength=len(self.normal))

    def _count_regions(self, values: np.ndarray, anomalous: np.ndarray) -> None:
        bins = _bins(values) - self.start
        regions, areas = label_regions(anomalous)
        np.add.at(self.anomalous, bins, 1)
        np.add.at(self.overlap, bins, 1 / areas[regions])
        self.num_regions += len(areas)

    def _cover(self, start: int, stop: int) -> None:
        """Grow the histograms to the bins from `start` to before `stop`."""
        if not len(self.normal):
            self.start = start
        before = max(self.start - start, 0)
        after = max(stop - self.start - len(self.normal), 0)
        if before or after:
            self.start -= before
            self.normal = np.pad(self.normal, (before, after))
            self.anomalous = np.pad(self.anomalous, (before, after))
            self.overlap = np.pad(self.overlap, (before, after))

    def merge(self, other: "PixelHistogram") -> None:
        """Add what another one counted; the result is that of one pass over both."""
        if not len(other.normal):
            return
        self._cover(other.start, other.start + len(other.normal))
        first = other.start - self.start
        part = slice(first, first + len(other.normal))
        self.normal[part] += other.normal
        self.anomalous[part] += other.anomalous
        self.overlap[part] += other.overlap
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


def label_regions(anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8-connected regions of a mask.

    Args:
        anomalous: Bool (H, W).

    Returns:
        Of each of its n pixels, in their order, the number of its region, from 0, int32 (n,); and
        the regions' areas in pixels.
    """
    rows, columns = (np.flatnonzero(anomalous.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return np.empty(0, np.int32), np.empty(0, np.int64)
    part = anomalous[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    regions = ndimage.label(part, structure=EIGHT_CONNECTED)[0][part] - 1
    return regions, np.bincount(regions)


def _bins(maps: np.ndarray) -> np.ndarray:
    """The bin of each float32, int32: higher values have the same or a higher bin.

    Read as integers, non-negative floats are in the order of their values and negative ones, below
    them, in the opposite order, which flipping all bits but the sign's turns around.
    """
    bits = (maps + 0.0).view(np.int32)  # -0.0 becomes 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


def _area(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Area under a curve from (0, 0) to `limit`, where it is interpolated."""
    x, y = np.r_[0.0, x], np.r_[0.0, y]
    inside = x <= limit
    x, y = np.r_[x[inside], limit], np.r_[y[inside], np.interp(limit, x, y)]
    return float(np.trapezoid(y, x))
