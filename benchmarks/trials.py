"""The trials behind the models' designs; docs/results.md has their tables.

    python -m benchmarks.trials [TRIAL ...] [--sets NAME ...] [--image-size 128] [--images N]
                                [--epochs 10] [--seed 0] [--per-set] [--cache FOLDER]

Each trial varies one thing of the Gaussian model's default, or of another model's. No test image is
looked at. The sets are those of `benchmarks.generated`, with a small or a large defect, and `poly`:
some of ELPV's normal training cells against the uncertain cells, of a defect probability of 1/3 or
2/3, which the built-in data set leaves out.

Prints a table for each trial: the image AUROC in % of each variant, as the mean over the generated
sets, and on `poly`. Features are computed once for all trials, or with `--cache` for all commands.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages import run  # isort: skip, before PyTorch: it makes idle threads sleep

import numpy as np
import torch
from joblib import Memory
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomaly_detection.trainer.devices import describe_hardware
from benchmarks.generated import PRODUCTS
from benchmarks.trials_work import (
    STRIDES,
    UNCERTAIN,
    Images,
    Recipe,
    Split,
    averaged,
    bank_distances,
    bank_maps,
    by_all,
    by_position,
    by_quantiles,
    chosen,
    each,
    fused,
    gaussian,
    gaussian_levels,
    gaussian_maps,
    joined,
    nearest,
    patches,
    projected,
    resized,
    student_maps,
)

FEW = {"fit": 35, "validation": 8}  # what the pipeline makes of 50 normal images
FRACTIONS = {"maximum": 0, "0.1 %": 0.001, "1 %": 0.01, "5 %": 0.05, "20 %": 0.2, "mean": 1}

Variants = Iterator[tuple[str, Split]]  # names and scores


def main(*arguments: str) -> None:
    """Try and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trials", description=__doc__)
    sets = [*PRODUCTS, UNCERTAIN]
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=", ".join(TRIALS))
    parser.add_argument("--sets", nargs="+", default=sets, choices=sets)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--images", type=int, help="to fit on at most; default: all")
    parser.add_argument("--epochs", type=int, default=10, help="of STFPM's students")
    parser.add_argument("--seed", type=int, default=0, help="of images and students")
    parser.add_argument("--per-set", action="store_true", help="columns for each set, too")
    parser.add_argument("--cache", type=Path, help="keep images and features in this folder")
    options = parser.parse_args(arguments)
    if unknown := set(options.trials) - set(TRIALS):
        parser.error(f"TRIAL must be one of {', '.join(TRIALS)}, got {', '.join(unknown)}.")
    hardware = ", ".join(describe_hardware(torch.device("cpu")).values())
    packages = [f"{x} {version(x)}" for x in ("torch", "timm", "numpy", "scikit-learn")]
    print(f"{os.cpu_count()} cores of {hardware}; {', '.join(packages)}")
    with TemporaryDirectory() as temporary:
        memory = Memory(options.cache or temporary, verbose=0)
        for name in options.trials or TRIALS:
            areas: dict[str, dict[str, list[float]]] = {}
            for product in options.sets:
                print(name, product, file=sys.stderr)
                images = Images(product, options.image_size, options, memory)
                for variant, scores in TRIALS[name](images):
                    areas.setdefault(variant, {})[product] = aurocs(scores)
            print("\n" + table(name, areas, options.per_set), flush=True)


def aurocs(scores: Split) -> list[float]:
    """Image AUROC in % of small and of large defects against normal images."""
    normal = scores["normal"]
    return [
        100 * roc_auc_score([0] * len(normal) + [1] * len(x), np.concatenate([normal, x]))
        for x in (scores["small"], scores["large"])
    ]


def table(name: str, areas: dict[str, dict[str, list[float]]], per_set: bool = False) -> str:
    """The AUROC of each variant, in Markdown; the best of a column is bold."""
    sets = list(next(iter(areas.values())))
    made = [x for x in sets if x != UNCERTAIN]
    groups = {
        f"{len(made)} generated, small": made,
        f"{UNCERTAIN}, 1/3": [x for x in sets if x == UNCERTAIN],
    }
    if per_set:
        groups |= {f"{x}, small": [x] for x in made}
    heads, columns = [f"`{name}`"], []
    for head, group in groups.items():
        if group:
            heads += [head, "2/3" if UNCERTAIN in group else "large"]
            means = [np.mean([row[x] for x in group], axis=0) for row in areas.values()]
            columns += np.transpose(means).tolist()
    rows = [heads, ["---"] * len(heads)]
    for i, variant in enumerate(areas):
        cells = [f"**{x[i]:.1f}**" if x[i] > max(x) - 0.05 else f"{x[i]:.1f}" for x in columns]
        rows.append([variant, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def levels(images: Images) -> Variants:
    """Strides, raw and averaged over 3 x 3 positions (p), and combinations."""
    maps = {}
    for stride, level in zip(STRIDES, map(chosen, images.features()), strict=True):
        maps[f"{stride}"] = by_position(gaussian(level))
        maps[f"{stride}p"] = by_position(gaussian(averaged(level)))
    more = ["8p + 16", "4p + 8p + 16", "4p + 8p + 16 + 32", "8 + 16 + 32", "8p + 16p + 32"]
    for name in [*maps, *more, "8p + 16 + 32"]:
        yield name, images.score(fused([maps[x] for x in name.split(" + ")]))


def joint(images: Images) -> Variants:
    """One Gaussian of several levels, as in PaDiM, or one for each."""
    raw = [chosen(level) for level in images.features()]
    smooth = [averaged(level) for level in raw]
    groups = {"4 + 8 + 16": raw[:3], "8 + 16": raw[1:3], "4p + 8p + 16p": smooth[:3]}
    groups |= {"8p + 16p": smooth[1:3], "8p + 16 + 32": [smooth[1], *raw[2:]]}
    for name, group in groups.items():
        together = joined(group)
        yield f"{name}, joint", images.score(by_position(gaussian(together)))
        if name == "4 + 8 + 16":
            some = by_position(gaussian(chosen(together, 100)))
            yield f"{name}, joint, 100 channels", images.score(some)
        separate = [by_position(gaussian(level)) for level in group]
        yield f"{name}, separate", images.score(fused(separate))


def covariance(images: Images) -> Variants:
    """What a position's covariance is made of, with all images and with few."""
    variants: dict[str, dict[str, Any]] = {"of each position": {"shrinkage": 0}}
    variants |= {f"averaged over {n} x {n}": {"shrinkage": 0, "window": n} for n in (3, 5)}
    variants |= {f"shrunk {x}": {"shrinkage": x} for x in (0.05, 0.2, 0.5, 0.8, 0.95)}
    variants["one for all positions"] = {"shrinkage": 1}
    variants["one for all, and one mean"] = {"shrinkage": 1, "is_one": True}
    variants |= {f"shrunk 0.2, regularised {x}": {"regularisation": x} for x in (0.001, 0.1, 1, 10)}
    features = gaussian_levels(images)
    few = [{split: x[: FEW.get(split)] for split, x in level.items()} for level in features]
    for suffix, group in (("", features), (f"; {FEW['fit']} images", few)):
        for name, options in variants.items():
            maps = [by_position(gaussian(level, **options)) for level in group]
            yield name + suffix, images.score(fused(maps))


def scale(images: Images) -> Variants:
    """How maps are brought to one scale, fused and smoothed."""
    maps = [gaussian(level) for level in gaussian_levels(images)]
    distances = bank_distances(images)
    scales: dict[str, Callable[[Split], Split]] = {"none": dict, "all pixels": by_all}
    scales |= {f"quantiles {x}, 0.995": partial(by_quantiles, low=x) for x in (0.5, 0.9)}
    for n in (1, 3):
        for k in (0.5, 3, 10):
            name = f"by position, {n} x {n}, prior of {k}"
            scales[name] = partial(by_position, window=n, prior=k)
    for name, function in scales.items():
        yield f"{name}; mean", images.score(fused([function(x) for x in maps]))
        yield f"{name}; bank", images.score(function(distances))
    standard = [by_position(x) for x in maps]
    yield "by position; maximum", images.score(fused(standard, torch.amax))
    yield "by position; squares", images.score(fused(standard, mean_of_squares))
    for sigma in (0.5, 1, 2):
        blur = partial(gaussian_filter, sigma=(0, sigma, sigma), mode="nearest")
        smooth = each(lambda x: torch.from_numpy(blur(x.numpy())), fused(standard))  # noqa: B023
        yield f"by position; mean, smoothed {sigma}", images.score(smooth)


def mean_of_squares(maps: Tensor, dim: int) -> Tensor:
    """The mean of the squares of what is above 0."""
    return maps.clamp(min=0).square().mean(dim)


def reductions(images: Images) -> Variants:
    """How a map becomes a score: the mean of which share of its highest values."""
    for model, maps in (("Gaussian", gaussian_maps(images)), ("bank", bank_maps(images))):
        scores = {name: images.score(maps, fraction) for name, fraction in FRACTIONS.items()}
        for name, values in scores.items():
            yield f"{model}, {name}", values
        several = [by_all(scores[name]) for name in ("1 %", "5 %", "mean")]
        largest = each(lambda *xs: np.max(xs, axis=0), *several)
        yield f"{model}, largest z of 1 %, 5 % and mean", largest


def bank(images: Images) -> Variants:
    """Distances from the nearest patch of normal images."""
    smooth = [averaged(level) for level in images.features()]
    plain = joined(smooth[1:3])
    variants = {"8": smooth[1], "16": smooth[2], "8 + 16": plain, "4 + 8 + 16": joined(smooth[:3])}
    variants["8 + 16 + 32"] = joined([*smooth[1:3], chosen(smooth[3])])
    known = patches(plain["fit"])
    variants["8 + 16, standardised"] = projected(plain, known.std(dim=0).reciprocal().diag())
    variances, directions = torch.linalg.eigh(torch.cov(known.T))
    for x in (0.01, 0.1, 1):
        whitening = directions * (variances + x * variances.mean()).rsqrt()
        variants[f"8 + 16, whitened, regularised {x}"] = projected(plain, whitening)
    maps = {name: nearest(features) for name, features in variants.items()}
    maps["8 + 16, density"] = nearest(plain, density=True)
    pool, pictures = [known], images.pictures()["fit"]
    for turns in range(1, 8):
        fine, middle = images.features({"fit": turned(pictures, turns)})[1:3]
        pool.append(patches(joined([averaged(fine), averaged(middle)])["fit"]))
        if turns in (3, 7):
            name = "turned" if turns == 3 else "turned and mirrored"
            maps[f"8 + 16, {name}"] = nearest(plain, torch.cat(pool))
    for name, distances in maps.items():
        yield f"{name}; not scaled", images.score(distances)
        yield f"{name}; by position", images.score(by_position(distances))


def turned(pictures: np.ndarray, turns: int) -> np.ndarray:
    """Pictures turned by multiples of 90 degrees; from 4 on, mirrored first."""
    flipped = pictures[..., ::-1] if turns >= 4 else pictures
    return np.ascontiguousarray(np.rot90(flipped, turns, (1, 2)))


def ensemble(images: Images) -> Variants:
    """Two models' maps, standardised again as in `models.ensemble`."""
    first, second = (
        by_position(resized(maps, images.size))
        for maps in (gaussian_maps(images), bank_maps(images))
    )
    for m, n in ((1, 0), (0, 1), (1, 1), (2, 1), (1, 2)):
        yield f"Gaussian {m} : {n} bank", images.score(fused([first] * m + [second] * n))


def size(images: Images) -> Variants:
    """The images' size, whatever `--image-size` is."""
    for pixels, drawn in ((128, 128), (192, 192), (256, 256), (256, 128)):
        other = images._replace(size=pixels, drawn_size=drawn)
        name = f"{pixels}" if pixels == drawn else f"{drawn}, enlarged to {pixels}"
        yield f"{name}; Gaussian", other.score(gaussian_maps(other))
        yield f"{name}; bank", other.score(bank_maps(other))


def channels(images: Images) -> Variants:
    """Stride 32's channels, alone and with the other levels."""
    coarse = images.features()[3]
    others = [by_position(gaussian(level)) for level in gaussian_levels(images)[:2]]
    count = coarse["fit"].shape[1]
    variants = {f"all {count}": coarse}
    for n in (64, 128):
        noise = torch.randn(count, n, generator=torch.Generator().manual_seed(0))
        variants[f"{n} at random"] = chosen(coarse, n)
        variants[f"projected to {n}"] = projected(coarse, torch.linalg.qr(noise).Q)
    for name, features in variants.items():
        maps = by_position(gaussian(features))
        yield f"{name}; 32", images.score(maps)
        yield f"{name}; 8p + 16 + 32", images.score(fused([*others, maps]))


PLAIN = Recipe((4, 8, 16), 32, 1.0, False, False, False)
HARD = PLAIN._replace(has_cycle=True, has_heads=True, hard_fraction=0.1)
RECIPES = {
    "SGD 0.4; strides 4, 8, 16; batches of 32": PLAIN,
    "+ one cycle": PLAIN._replace(has_cycle=True),
    "+ standardised channels, heads": HARD._replace(hard_fraction=1.0),
    "+ hardest 10 %": HARD,
    "+ AdamW 2e-3": HARD._replace(has_adam=True),
    "+ strides 8, 16": HARD._replace(has_adam=True, strides=(8, 16)),
    "+ batches of 8: the default": Recipe(),
    "the default, strides 8, 16, 32": Recipe((8, 16, 32)),
    "the default, all positions": Recipe(hard_fraction=1.0),
}


def stfpm(images: Images) -> Variants:
    """What the parts of a training add, and two ways to make one map of the levels'."""
    for name, recipe in RECIPES.items():
        maps = student_maps(images, recipe)
        squares = [resized(each(torch.square, x), images.size) for x in maps]
        yield f"{name}; product", images.score(fused(squares, torch.prod))
        yield f"{name}; mean", images.score(fused([by_position(x) for x in maps]))


ALL = (levels, joint, covariance, scale, reductions, bank, ensemble, size, channels, stfpm)
TRIALS: dict[str, Callable[[Images], Variants]] = {trial.__name__: trial for trial in ALL}


if __name__ == "__main__":
    run(main)
