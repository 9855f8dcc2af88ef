"""Mean and covariance of features at each position, in one pass."""

from torch import Tensor


class Moments:
    """Mean and scatter of vectors of C channels at P positions, in float64 and on the CPU.

    Memory does not grow with the images: parts are merged (Chan, Golub and LeVeque, 1983).

    Attributes:
        count: Number of vectors at each position.
        mean: (P, C).
        scatter: (P, C, C), the sum of the outer products of the centred vectors.
        size: Height and width of the maps, P = H x W.
    """

    mean: Tensor
    scatter: Tensor
    size: tuple[int, int]

    def __init__(self) -> None:
        self.count = 0

    def add(self, maps: Tensor) -> None:
        """Add feature maps (N, C, H, W)."""
        part = Moments()
        part.count, part.size = len(maps), (maps.shape[-2], maps.shape[-1])
        vectors = maps.cpu().double().flatten(2).permute(2, 0, 1)
        part.mean = vectors.mean(dim=1)
        centred = vectors - part.mean[:, None]
        part.scatter = centred.mT @ centred
        self.merge(part)

    def merge(self, part: "Moments") -> None:
        """Add what another object has seen."""
        if not part.count:
            return
        if not self.count:
            self.__dict__.update(part.__dict__)
            return
        count = self.count + part.count
        step = part.mean - self.mean
        weight = self.count * part.count / count
        self.scatter = self.scatter + part.scatter + weight * step[:, :, None] * step[:, None, :]
        self.mean = self.mean + step * (part.count / count)
        self.count = count

    @property
    def is_finite(self) -> bool:
        """Whether all values were, and there were any."""
        return self.count > 0 and bool(self.scatter.isfinite().all())
