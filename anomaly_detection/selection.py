"""Which of several detectors to use, judged on normal images and synthetic defects alone.

Statistics of the scores of normal images cannot tell (Ma et al., arXiv:2104.01422); synthetic
defects often choose as real ones would (SWSA, arXiv:2310.10461). docs/selection.md measures how
often.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import cycle, islice, product
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from anomaly_detection.evaluation.synthetic import FAMILIES, SIZES, Case
from anomaly_detection.metrics import compute_auroc

OPACITIES = (1.0, 0.5, 0.25)  # weak defects too: among strong ones, all candidates look perfect

Areas = Mapping[str, float]  # AUROC by family of defects
K = TypeVar("K", bound=Hashable)


def family_cases(images: Any, num_defects: int, seed: int, channels: int = 3) -> list[Case]:
    """Defects of every family, of all sizes and opacities in turn, on images drawn at random.

    Args:
        images: A data set whose items have `image`, (C, H, W), and `position`.
        num_defects: How many of each family.
        seed: Draws the images.
        channels: As in `Case`.
    """
    rng = np.random.default_rng(seed)
    strengths = list(islice(cycle(product(SIZES, OPACITIES)), num_defects))
    cases = []
    for family, (size, opacity) in product(FAMILIES, strengths):
        item = images[int(rng.integers(len(images)))]
        image, position = np.asarray(item["image"]), int(item["position"])
        cases.append(Case(image, family, size, opacity, channels, position=position))
    return cases


def areas_by_family(normal: ArrayLike, defective: ArrayLike, families: Sequence[str]) -> Areas:
    """The AUROC of each family's defects against the normal images.

    Args:
        normal: Scores of normal images, shape (n,).
        defective: Scores of images with a synthetic defect, shape (m,).
        families: The family of each of these, m names.
    """
    normal, defective = np.asarray(normal), np.asarray(defective)
    areas = {}
    for family in dict.fromkeys(families):
        of_family = defective[np.asarray(families) == family]
        labels = np.repeat([0, 1], [len(normal), len(of_family)])
        areas[family] = compute_auroc(np.concatenate([normal, of_family]), labels)
    return areas


def mean_areas(parts: Sequence[Areas]) -> Areas:
    """The mean area of each family over several comparisons."""
    return {family: float(np.mean([part[family] for part in parts])) for family in parts[0]}


def worst(areas: Areas) -> float:
    """The area of the family that is detected worst."""
    return min(areas.values())


def mean(areas: Areas) -> float:
    """The mean area of all families."""
    return float(np.mean(list(areas.values())))


def num_wins(areas: Areas, others: Areas) -> int:
    """In how many families the first has the larger area."""
    return sum(areas[family] > others[family] for family in areas)


def prefers(areas: Areas, own: Areas) -> bool:
    """Whether a rival is better in most families, and in its worst one."""
    return num_wins(areas, own) > len(own) / 2 and worst(areas) > worst(own)


def choose(candidates: Mapping[K, Areas], default: K) -> K:
    """The candidate to use: the default, unless another is better in most families.

    Of those that are, the one with the best worst family is chosen.
    """
    own = candidates[default]
    rivals = [key for key, areas in candidates.items() if prefers(areas, own)]
    return max(rivals, key=lambda key: worst(candidates[key]), default=default)
