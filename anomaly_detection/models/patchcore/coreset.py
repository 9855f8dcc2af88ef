"""A few patches that stand for very many: the most different ones, chosen in two rounds."""

import torch
from torch import Tensor

from anomaly_detection.progress import progress

NUM_DIMENSIONS = 64  # of the projection
GROUP = (
    8192  # patches among which the first round chooses, so that they stay in a processor's cache
)
SHARE = 8  # of which it keeps one in so many, or more where there are few


class Reservoir:
    """A uniform sample of all rows that are added, in memory that does not grow with them.

    Every row draws a random key, and those with the smallest keys are kept: each set of `capacity`
    rows is equally likely, whatever the batches.

    Args:
        capacity: How many rows are kept.
        generator: Draws the keys, on the CPU.
    """

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.keys = torch.full((capacity,), torch.inf, dtype=torch.float64)  # inf: a free place
        self.rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Offer rows (n, C); those kept are copied."""
        if self.rows is None:
            self.rows = rows.new_empty(len(self.keys), rows.shape[1])
        new_keys = torch.rand(len(rows), dtype=torch.float64, generator=self.generator)
        keys = torch.cat([self.keys, new_keys])
        is_kept = torch.zeros(len(keys), dtype=torch.bool)
        is_kept[keys.argsort(stable=True)[: len(self.keys)]] = True
        free, taken = (~is_kept[: len(self.keys)]).nonzero(), is_kept[len(self.keys) :].nonzero()
        self.keys[free] = new_keys[taken]
        self.rows[free[:, 0].to(rows.device)] = rows[taken[:, 0].to(rows.device)]

    def sample(self) -> Tensor:
        """The rows kept, in random order: (capacity, C), or all where there are fewer."""
        if self.rows is None:
            return torch.empty(0, 0)
        order = self.keys.argsort(stable=True)[: int(self.keys.isfinite().sum())]
        return self.rows[order.to(self.rows.device)]


def first_round(patches: Tensor, least: int, generator: torch.Generator) -> Tensor:
    """Indices of patches (n, C) that are far apart, one in `SHARE`, but at least so many of all."""
    chosen = []
    for start in range(0, len(patches), GROUP):
        group = patches[start : start + GROUP]
        count = max(len(group) // SHARE, -(-least * len(group) // len(patches)))
        chosen.append(start + far_apart(group, count, generator))
    return torch.cat(chosen)


def far_apart(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of at most `count` of points (n, C), chosen by `farthest_points` of a projection."""
    if len(points) <= count:
        return torch.arange(len(points), device=points.device)
    return farthest_points(project(points, generator), count)


def project(points: Tensor, generator: torch.Generator) -> Tensor:
    """Points (n, C) in at most `NUM_DIMENSIONS`, with distances that are nearly the same.

    A random Gaussian projection: the error of a squared distance is 18 % (standard deviation),
    whatever C is (Johnson and Lindenstrauss). Points of fewer dimensions stay as they are.
    """
    num_dimensions = points.shape[1]
    if num_dimensions <= NUM_DIMENSIONS:
        return points
    directions = torch.randn(num_dimensions, NUM_DIMENSIONS, generator=generator)
    return points @ directions.to(points.device) / NUM_DIMENSIONS**0.5


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Indices (count,) of points that cover all: a greedy solution of the k-center problem.

    The first is point 0, and each further one is that with the largest distance from those already
    chosen, so the first k are also the choice for a smaller count. (Algorithm 1 of the paper.)

    Args:
        points: Shape (n, C); memory for as many again is needed.
        count: At most n.
    """
    centred = points - points.mean(dim=0)  # less is lost where |a|^2 - 2ab + |b|^2 cancels
    centred = centred.T.contiguous().T  # by columns, which halves the time of the product
    squares = centred.square().sum(dim=1)
    distances = torch.full_like(squares, torch.inf)  # squared, from the nearest one chosen
    chosen = torch.zeros(count, dtype=torch.long, device=points.device)
    for i in progress(range(count), "coreset", "patches") if count > GROUP // 2 else range(count):
        index = chosen[i : i + 1]
        if i:
            torch.argmax(distances, dim=0, keepdim=True, out=index)
        point = centred.index_select(0, index)[0]
        from_point = torch.addmv(squares, centred, point, alpha=-2) + point.square().sum()
        torch.minimum(distances, from_point, out=distances)
        distances.index_fill_(0, index, -torch.inf)  # never again, also among equal points
    return chosen
