"""What `benchmarks.trials` tries: images and their features, and the parts of the models."""

import argparse
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib import Memory
from torch import Tensor, nn

from anomaly_detection.data import create_dataloader, elpv
from anomaly_detection.data.decode import decode_image, read_file, resize_image
from anomaly_detection.features.images import as_floats
from anomaly_detection.features.pyramid import FeaturePyramid, available_levels
from anomaly_detection.features.weights import BUNDLED
from anomaly_detection.models import FitContext
from anomaly_detection.models.maps import image_scores, mean_of_neighbours, resize_maps
from anomaly_detection.models.stfpm.stfpm import STFPMLoss, STFPMModel
from anomaly_detection.models.stfpm.trainer import STFPMTrainer
from anomaly_detection.trainer import seed_everything
from benchmarks.generated import write_generated

UNCERTAIN = "poly"
SPLITS = ("fit", "validation", "normal", "small", "large")  # the last two have defects
STRIDES = (4, 8, 16, 32)
NUM_VALIDATION, POLY_ENDS = 32, (400, 500)  # where the fit's and the validation's cells end
NUM_CHANNELS, BANK_SIZE, NUM_NEIGHBOURS = 128, 4096, 5

Split = dict[str, Any]  # by split: features (N, C, H, W), maps (N, H, W) or scores (N,)


def each(function: Callable[..., Any], *values: Split) -> Split:
    """The function of every split's values."""
    return {split: function(*(value[split] for value in values)) for split in values[0]}


# Images and their features.


class Images(NamedTuple):
    """A product's images; `drawn_size` is their size before they are enlarged to `size`."""

    name: str
    size: int
    options: argparse.Namespace
    memory: Memory
    drawn_size: int | None = None

    def pictures(self) -> Split:
        """Grey images (N, size, size)."""
        drawn = self.memory.cache(draw)(self.name, self.options.seed)
        drawn["fit"] = drawn["fit"][: self.options.images]
        smaller = each(partial(at_size, size=self.drawn_size or self.size), drawn)
        return each(partial(at_size, size=self.size), smaller)

    def features(self, pictures: Split | None = None) -> list[Split]:
        """Features at the strides 4, 8, 16 and 32 of these or of all pictures."""
        levels = each(self.memory.cache(extract), self.pictures() if pictures is None else pictures)
        return [each(torch.Tensor.float, each(itemgetter(i), levels)) for i in range(len(STRIDES))]

    def score(self, maps: Split, fraction: float = 0.01) -> Split:
        """Scores as `ScaledMapModel` finds them."""
        return each(lambda x: image_scores(x[:, None], fraction).numpy(), resized(maps, self.size))


def draw(name: str, seed: int) -> dict[str, np.ndarray]:
    """Grey images (N, H, W) by split."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        paths = cells(folder, seed) if name == UNCERTAIN else generated(folder, seed)
        parts = [np.stack([decode_image(read_file(x), x) for x in part]) for part in paths]
        return dict(zip(SPLITS, parts, strict=True))


def at_size(pictures: np.ndarray, size: int) -> np.ndarray:
    """Pictures (N, size, size)."""
    return np.stack([resize_image(picture, size)[0] for picture in pictures])


def generated(folder: Path, seed: int) -> list[list[Path]]:
    """Files of generated images, by split."""
    write_generated(folder, folder.name, seed)
    parts = ("train/good", "test/good", "test/scratch", "test/blotch")
    train, *test = (sorted((folder / part).iterdir()) for part in parts)
    return [train[NUM_VALIDATION:], train[:NUM_VALIDATION], *test]


def cells(folder: Path, seed: int) -> list[list[Path]]:
    """Files of ELPV, by split: normal cells of `train`, and those of probability 1/3 and 2/3."""
    elpv.write_elpv(folder)
    import elpv_dataset

    normal = sorted((folder / UNCERTAIN / "train" / "good").iterdir())
    random.Random(seed).shuffle(normal)
    source = Path(elpv_dataset.__file__).parent / "data"
    rows = [line.split() for line in (source / "labels.csv").read_text().splitlines()]
    thirds = {name: round(3 * float(defect)) for name, defect, kind in rows if kind == UNCERTAIN}
    uncertain = [[source / name for name, n in thirds.items() if n == m] for m in (1, 2)]
    first, second = POLY_ENDS
    return [normal[:first], normal[first:second], normal[second:], *uncertain]


@torch.no_grad()
def extract(pictures: np.ndarray) -> list[Tensor]:
    """Each level's features (N, C, H, W) of grey images (N, S, S), float16."""
    teacher = backbone()
    batches = torch.from_numpy(pictures)[:, None].expand(-1, 3, -1, -1).split(32)
    parts = [
        [x.half() for x in teacher(teacher.normalisation(as_floats(y, 3))).values()]
        for y in batches
    ]
    return by_level(parts)


def by_level(batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What all batches have of each level."""
    return [torch.cat(level).contiguous() for level in zip(*batches, strict=True)]


@cache
def backbone() -> FeaturePyramid:
    """The default teacher, with all its levels from stride 4 on."""
    pyramid = FeaturePyramid(BUNDLED, None, "bundled", STRIDES).freeze()
    pyramid.fold_batch_norm()
    return pyramid


# What models are made of.

averaged = partial(each, mean_of_neighbours)


def chosen(features: Split, count: int = NUM_CHANNELS) -> Split:
    """At most so many channels, drawn at random."""
    order = torch.randperm(features["fit"].shape[1], generator=torch.Generator().manual_seed(0))
    return each(lambda x: x[:, order[:count].sort().values], features)


def joined(levels: Sequence[Split]) -> Split:
    """The channels of all levels, at the first one's size."""
    size = tuple(levels[0]["fit"].shape[2:])
    return each(lambda *xs: torch.cat([resize_maps(x, size) for x in xs], dim=1), *levels)


def projected(features: Split, transform: Tensor) -> Split:
    """Features times a matrix (C, D)."""
    return each(lambda x: torch.einsum("nchw,cd->ndhw", x, transform), features)


def gaussian(
    features: Split,
    shrinkage: float = 0.2,
    regularisation: float = 0.01,
    window: int = 1,
    is_one: bool = False,
) -> Split:
    """Maps of distances as in `models.gaussian`.

    Each covariance is averaged over a window of positions first; `is_one` gives all the same mean.
    """
    count, channels, height, width = features["fit"].shape
    vectors = features["fit"].flatten(2).permute(2, 0, 1)  # (P, n, C)
    mean = vectors.mean(dim=(0, 1) if is_one else 1, keepdim=True)
    covariance = (vectors - mean).mT @ (vectors - mean) / (count - 1)
    if window > 1:
        of_positions = covariance.view(height, width, -1).permute(2, 0, 1)[None]
        smooth = mean_of_neighbours(of_positions, window)[0].permute(1, 2, 0)
        covariance = smooth.reshape(-1, channels, channels)
    shared = covariance.mean(dim=0, keepdim=True)
    covariance = shared if shrinkage == 1 else torch.lerp(covariance, shared, shrinkage)
    variance = shared.diagonal(dim1=1, dim2=2).mean()
    factor = torch.linalg.cholesky(covariance + regularisation * variance * torch.eye(channels))

    def distances(x: Tensor) -> Tensor:
        centred = x.flatten(2).permute(2, 1, 0) - mean.mT  # (P, C, N)
        whitened = torch.linalg.solve_triangular(factor, centred, upper=False)
        return whitened.square().mean(dim=1).sqrt().T.reshape(-1, height, width)

    return {split: distances(features[split]) for split in SPLITS[1:]}


def nearest(features: Split, pool: Tensor | None = None, density: bool = False) -> Split:
    """Maps of distances from the nearest of a random bank of the fit's patches, or of a pool's.

    With `density`, less the mean distance of the bank's patch from its own nearest ones (after REB,
    arXiv:2308.12577).
    """
    pool = patches(features["fit"]) if pool is None else pool
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    centre = pool.mean(dim=0)  # distances lose less to rounding
    bank = pool[order[:BANK_SIZE]] - centre
    usual = torch.cdist(bank, bank).topk(NUM_NEIGHBOURS + 1, largest=False).values[:, 1:].mean(1)

    def distances(x: Tensor) -> Tensor:
        parts = (patches(x) - centre).split(4096)
        found = [torch.cdist(part, bank).min(dim=1) for part in parts]
        values = torch.cat([y.values - density * usual[y.indices] for y in found])
        return values.view(len(x), *x.shape[2:])

    return {split: distances(features[split]) for split in SPLITS[1:]}


def patches(maps: Tensor) -> Tensor:
    """Features (N, C, H, W) as (N * H * W, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def by_position(maps: Split, window: int = 3, prior: float = 0.5) -> Split:
    """Maps standardised as by `MapScale`, whose window this is."""
    normal = maps["validation"]
    mean, square = normal.mean(dim=0), normal.square().mean(dim=0)
    overall, overall_variance = mean.mean(), square.mean() - mean.mean().square()
    mean, square = mean_of_neighbours(torch.stack([mean, square])[None], window)[0]
    trust = len(normal) / (len(normal) + prior)
    variance = trust * (square - mean.square()) + (1 - trust) * overall_variance
    mean = trust * mean + (1 - trust) * overall
    return each(lambda x: (x - mean) / variance.sqrt(), maps)


def by_all(values: Split) -> Split:
    """Values standardised by all of the validation images."""
    mean, deviation = values["validation"].mean(), values["validation"].std()
    return each(lambda x: (x - mean) / deviation, values)


def by_quantiles(maps: Split, low: float) -> Split:
    """Maps scaled so that two quantiles of all validation pixels become 0 and 1."""
    bottom, top = np.quantile(maps["validation"].numpy(), [low, 0.995]).tolist()
    return each(lambda x: (x - bottom) / (top - bottom), maps)


def resized(maps: Split, size: int) -> Split:
    """Maps (N, size, size)."""
    return each(lambda x: resize_maps(x[:, None], (size, size))[:, 0], maps)


def fused(parts: Sequence[Split], reduction: Callable[..., Tensor] = torch.mean) -> Split:
    """One map of several, of the first one's size."""
    same = [resized(part, parts[0]["normal"].shape[-1]) for part in parts]
    return each(lambda *xs: reduction(torch.stack(xs), dim=0), *same)


def gaussian_levels(images: Images) -> list[Split]:
    """The features that the Gaussian model judges by default."""
    _, fine, middle, coarse = images.features()
    return [averaged(fine), middle, chosen(coarse)]


def gaussian_maps(images: Images) -> Split:
    """The Gaussian model's maps by default."""
    return fused([by_position(gaussian(level)) for level in gaussian_levels(images)])


def bank_distances(images: Images) -> Split:
    """PatchCore's distances by default, except that the bank is drawn at random."""
    return nearest(joined([averaged(x) for x in images.features()[1:3]]))


def bank_maps(images: Images) -> Split:
    """PatchCore's maps by default, except that the bank is drawn at random."""
    return by_position(bank_distances(images))


# STFPM with parts taken away.


class Recipe(NamedTuple):
    """How a student is trained; by default as in `models.stfpm`."""

    strides: tuple[int, ...] = (8, 16)
    batch_size: int = 8
    hard_fraction: float = 0.1
    has_adam: bool = True
    has_cycle: bool = True
    has_heads: bool = True  # and standardised features


class RecipeTrainer(STFPMTrainer):
    """The model's trainer, with what the recipe leaves out."""

    recipe: Recipe

    def on_fit_start(self) -> None:
        """Standardise the features, or leave them as they are."""
        super().on_fit_start()
        for standardisation in self.model.standardisations:
            if not self.recipe.has_heads:
                standardisation.mean.zero_()
                standardisation.deviation.fill_(1)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, or the paper's SGD with this project's former learning rate."""
        if self.recipe.has_adam:
            return super().configure_optimizers()
        student = self.model.student_model.parameters()
        optimizer = torch.optim.SGD(student, 0.4, momentum=0.9, weight_decay=1e-4)
        if not self.recipe.has_cycle:
            return {"optimizer": optimizer}
        steps = self.num_epochs * len(self.train_loader) + 1
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=steps)
        return {"optimizer": optimizer, "scheduler": cycle, "interval": "step"}


def student_maps(images: Images, recipe: Recipe) -> list[Split]:
    """Maps of each level's distances between the teacher's and a student's features."""
    seed_everything(images.options.seed)
    layers = [x for x, stride in available_levels(BUNDLED).items() if stride in recipe.strides]
    model = STFPMModel(layers=layers)
    if not recipe.has_heads:
        model.student_model.heads = nn.ModuleList(nn.Identity() for _ in layers)
    loaders = {}
    for split, pictures in images.pictures().items():
        colour = torch.from_numpy(pictures)[:, None].expand(-1, 3, -1, -1)
        part: Any = [{"image": x, "path": f"{split} {i}"} for i, x in enumerate(colour)]
        loaders[split] = create_dataloader(part, recipe.batch_size, shuffle=split == "fit")
    with TemporaryDirectory() as state:
        loss = STFPMLoss(recipe.hard_fraction)
        trainer = RecipeTrainer(model, loss, "cpu", state, feature_cache=4.0)
        trainer.recipe = recipe
        loading = loaders.pop("fit"), loaders["validation"]
        context = FitContext(*loading, Path(state), torch.device("cpu"))
        context.train(trainer, images.options.epochs)
    model.eval().simplify()
    with torch.no_grad():
        maps = each(lambda x: by_level([model.maps(y["image"]) for y in x]), loaders)
    return [each(itemgetter(i), maps) for i in range(len(layers))]
