"""How many good parts are rejected, over many random divisions of ELPV's good `mono` cells.

    python -m benchmarks.false_rejects [--divisions N]

No defective cell is looked at. The first two tables divide as the pipeline does, and ask whether
the share of rejected test cells is what the calibration cells promise, and whether the choice of
the epoch touches it. The last one compares the two ways to calibrate, with few good cells.

Thousands of fits take minutes because what does not depend on a division is computed once: the
backbone's features, and from them the distance of each patch from the nearest one in each other
cell. The smallest over the fit's cells is the distance to a bank of all their patches: PatchCore
without its coreset. The library's own code turns maps into scores, and scores into thresholds.
"""

import argparse
import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stages import run  # isort: skip, before PyTorch: it makes idle threads sleep

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import betabinom
from torch import Tensor

from anomaly_detection import models
from anomaly_detection.data import create_dataloader, draw_folds, elpv, split_normal_images
from anomaly_detection.data.audit import LIMIT, residuals, small_images
from anomaly_detection.data.decode import decode_image, read_file, resize_image
from anomaly_detection.evaluation.thresholds import false_reject_threshold
from anomaly_detection.features.moments import Moments
from anomaly_detection.models import FitContext
from anomaly_detection.models.fusion import ScaledMapModel
from anomaly_detection.trainer import Callback, seed_everything

CATEGORY, IMAGE_SIZE = "mono", 128
RATE = 0.05
VALIDATION = CALIBRATION = 0.15  # shares, as in params.yaml
TOP_FRACTION = 0.01
TEST_FOLDS = 5  # one of which is the test set
SEEN = (11 / 117, 12 / 117)  # false-reject rates of which the question is how unlikely they are
NUM_FOLDS = 5
NUM_TEST = 117  # cells, in the second table
ENOUGH = 19  # calibration cells for a rate of 5 %

Cells = Sequence[int]  # by their numbers
Maps = Callable[[Cells], list[Tensor]]  # what a fitted model finds: (N, H, W) for each level
Fit = Callable[[Cells], Maps]


def main(*arguments: str) -> None:
    """Divide, fit, and print tables in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.false_rejects", description=__doc__)
    parser.add_argument("--divisions", type=int, default=500, help="default: 500")
    seeds = range(parser.parse_args(arguments).divisions)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        pictures = good_cells(Path(name))
        groups = near_duplicates(pictures, Path(name))
        bank = memory_bank(pictures)
        print(promises(groups, bank, seeds), flush=True)
        print(f"\n{minutes(started)}", flush=True)
        print("\n" + choice_of_epoch(pictures, Path(name), seeds), flush=True)
    print(f"\n{minutes(started)}", flush=True)
    cases = [("PatchCore", bank, num_good, seeds) for num_good in (50, 100, 200)]
    cases.append(("Gaussian", gaussian(pictures), 50, seeds[::5]))  # its fits take longer
    print("\n" + calibrations(len(pictures), cases))
    print(f"\n{minutes(started)}")


def minutes(started: float) -> str:
    """How long it has taken."""
    return f"{(time.monotonic() - started) / 60:.1f} minutes"


def good_cells(folder: Path) -> Tensor:
    """All good cells, those of train and of test, uint8 (N, 3, S, S)."""
    elpv.write_elpv(folder / "elpv")
    paths = sorted((folder / "elpv" / CATEGORY).glob("*/good/*.png"), key=lambda path: path.name)
    pictures = [resize_image(decode_image(read_file(path), path), IMAGE_SIZE) for path in paths]
    return torch.from_numpy(np.stack(pictures))


def near_duplicates(pictures: Tensor, folder: Path) -> list[str]:
    """The name of each cell's group; by the audit's criterion, near-duplicates are in one."""
    np.save(folder / "cells.npy", pictures.numpy())
    everything = torch.ones(len(pictures), dtype=torch.bool)
    unique = residuals(small_images([folder / "cells.npy"]), everything)
    alike = csr_array((unique @ unique.T >= LIMIT).numpy())
    return list(map(str, connected_components(alike)[1].tolist()))


# Fits from what is known of all cells.


def memory_bank(pictures: Tensor) -> Fit:
    """PatchCore with all patches of the fit's cells in its bank."""
    model = models.spec("patchcore").build(models.parameters("patchcore")())
    patches = extract(model, pictures)  # (N, C, H, W)
    size = patches.shape[-2:]
    patches = patches.flatten(2).mT
    patches = patches - patches.mean(dim=(0, 1))  # the sum below loses less
    squares = patches.square().sum(dim=2)
    num_cells, num_patches = squares.shape
    nearest = torch.zeros(num_cells, num_cells, num_patches)  # for each patch of the second cell
    for i in range(num_cells):
        for start in range(i + 1, num_cells, 32):
            part = slice(start, start + 32)
            distances = patches[part].flatten(0, 1) @ patches[i].T
            distances = distances.view(-1, num_patches, num_patches).mul_(-2)
            distances += squares[part, :, None] + squares[i]
            nearest[i, part], nearest[part, i] = distances.amin(dim=2), distances.amin(dim=1)
    nearest = nearest.clamp_(min=0).sqrt_().view(num_cells, num_cells, *size)

    def fit(known: Cells) -> Maps:
        return lambda cells: [nearest[torch.tensor(known)[:, None], cells].amin(dim=0)]

    return fit


def gaussian(pictures: Tensor) -> Fit:
    """The library's Gaussian model."""
    parameters = models.parameters("gaussian")()
    model = models.spec("gaussian").build(parameters)
    for level in model.gaussians:
        level.choose_channels(torch.Generator().manual_seed(0))
    features = extract(model, pictures)

    def fit(known: Cells) -> Maps:
        levels = copy.deepcopy(model.gaussians)
        for level, values in zip(levels, features, strict=True):
            moments = Moments()
            moments.add(values[known])
            level.estimate(moments, parameters.shrinkage)
        return lambda cells: [x(values[cells]) for x, values in zip(levels, features, strict=True)]

    return fit


@torch.no_grad()
def extract(model: Any, pictures: Tensor) -> Any:
    """What a model's `extract` gives for all cells: a tensor or a list of them."""
    parts = [model.eval().extract(batch) for batch in pictures.split(32)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [torch.cat(level) for level in zip(*parts, strict=True)]


class Replay(ScaledMapModel):
    """Scores cells by maps that are known; a cell's picture is a square filled with its number."""

    def __init__(self, known: Maps) -> None:
        super().__init__(TOP_FRACTION, ())
        self.known = known

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps of the cells."""
        return self.known(images[:, 0, 0, 0].tolist())


def score(maps: Maps, validation: Cells, cells: Cells) -> np.ndarray:
    """The image scores of cells, from maps that validation cells standardise."""
    model = Replay(maps)
    model.standardise([{"image": numbered(validation)}], torch.device("cpu"))
    with torch.inference_mode():
        return model(numbered(cells))["pred_score"].numpy()


def numbered(cells: Cells) -> Tensor:
    """The pictures for `Replay`, uint16 (N, 3, S, S)."""
    numbers = torch.tensor(cells, dtype=torch.uint16)
    return numbers.view(-1, 1, 1, 1).expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE)


# Divisions.


class Division(NamedTuple):
    """Cells by use."""

    fit: list[int]
    validation: list[int]
    calibration: list[int]
    test: list[int]


def divide(names: Sequence[str], seed: int) -> Division:
    """Divide cells as ELPV and the pipeline do; those of the same name get the same use."""
    fold = draw_folds(names, TEST_FOLDS, seed)
    test = [i for i, x in enumerate(fold) if x == TEST_FOLDS - 1]
    train = [i for i, x in enumerate(fold) if x < TEST_FOLDS - 1]
    use = split_normal_images([names[i] for i in train], VALIDATION, CALIBRATION, seed)
    parts = (
        [i for i, x in zip(train, use, strict=True) if x == name]
        for name in ("fit", "validation", "calibration")
    )
    return Division(*parts, test)


class Outcome(NamedTuple):
    """How many test cells a threshold rejected."""

    num_calibration: int
    num_test: int
    num_rejected: int

    @property
    def rate(self) -> float:
        """The share of test cells that was rejected."""
        return self.num_rejected / self.num_test


def outcome(calibration: np.ndarray, test: np.ndarray) -> Outcome:
    """Set the threshold by calibration scores, and apply it to test scores."""
    rejected = test > np.float32(false_reject_threshold(calibration, RATE))
    return Outcome(len(calibration), len(test), int(rejected.sum()))


def split_outcome(fit: Fit, division: Division) -> Outcome:
    """Fit, calibrate and test with cells for each alone."""
    cells = division.calibration + division.test
    scores = score(fit(division.fit), division.validation, cells)
    return outcome(*np.split(scores, [len(division.calibration)]))


def cross_outcome(fit: Fit, division: Division, seed: int) -> Outcome:
    """Calibrate out of fold, and test the model that is fitted on all cells but validation's."""
    normal = sorted(division.fit + division.calibration)
    fold = draw_folds(list(map(str, normal)), NUM_FOLDS, seed)
    calibration = []
    for k in range(NUM_FOLDS):
        held_out = [i for i, x in zip(normal, fold, strict=True) if x == k]
        others = [i for i, x in zip(normal, fold, strict=True) if x != k]
        calibration.append(score(fit(others), division.validation, held_out))
    test = score(fit(normal), division.validation, division.test)
    return outcome(np.concatenate(calibration), test)


# Tables.


def promises(groups: list[str], bank: Fit, seeds: Iterable[int]) -> str:
    """False-reject rates of divisions like the pipeline's, beside what is promised."""
    apart = list(map(str, range(len(groups))))
    first = divide(apart, 0)
    maps = bank(first.fit)
    others = first.calibration + first.test
    fixed = score(maps, first.validation, others)

    def of_fixed(seed: int) -> Outcome:
        scores = np.random.default_rng(seed).permutation(fixed)
        return outcome(*np.split(scores, [len(first.calibration)]))

    rows = {
        "fixed model: only calibration and test cells drawn": map(of_fixed, seeds),
        "all drawn, the bank filled anew": (split_outcome(bank, divide(apart, x)) for x in seeds),
        "the same, near-duplicates together": (
            split_outcome(bank, divide(groups, x)) for x in seeds
        ),
    }
    size = sum(Counter(groups)[x] > 1 for x in groups)
    head = f"{len(groups)} cells; {size} have near-duplicates.\n\n"
    return head + table(
        {"promised": promised(len(first.calibration), len(first.test))}
        | {name: list(outcomes) for name, outcomes in rows.items()}
    )


def promised(num_calibration: int, num_test: int) -> list[Outcome]:
    """Outcomes of exchangeable scores, in the proportions of their distribution."""
    above = int((num_calibration + 1) * RATE + 1e-9)
    law = betabinom(num_test, above, num_calibration + 1 - above)
    drawn = law.ppf((np.arange(20_000) + 0.5) / 20_000).astype(int)
    return [Outcome(num_calibration, num_test, x) for x in drawn.tolist()]


def table(rows: dict[str, list[Outcome]]) -> str:
    """The distribution of the false-reject rate in each row."""
    lines = [
        f"| | mean | 5 / 50 / 95 % | at least {' | at least '.join(f'{x:.1%}' for x in SEEN)} |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(line(*row) for row in rows.items())])


def line(name: str, outcomes: list[Outcome]) -> str:
    """A row of `table`."""
    rates = np.array([x.rate for x in outcomes])
    low, middle, high = np.quantile(rates, (0.05, 0.5, 0.95), method="inverted_cdf")
    cells = [name, f"{rates.mean():.2%}", f"{low:.1%} / {middle:.1%} / {high:.1%}"]
    cells += [f"{(rates > x - 1e-9).mean():.1%}" for x in SEEN]
    return f"| {' | '.join(cells)} |"


class Recorder(Callback):
    """Keeps the maps and the validation losses of all cells after each epoch."""

    def __init__(self, pictures: Tensor) -> None:
        self.batches = [{"image": part, "path": []} for part in pictures.split(32)]
        self.epochs: list[tuple[list[Tensor], np.ndarray]] = []

    def on_validation_epoch_end(self, epoch: int, val_metrics: Any) -> None:
        """Judge all cells."""
        model, step = self.trainer.model, self.trainer.validation_step
        maps = [model.maps(batch["image"]) for batch in self.batches]
        losses = torch.cat([step(batch, 0)["loss"] for batch in self.batches])
        levels = [torch.cat(level) for level in zip(*maps, strict=True)]
        self.epochs.append((levels, losses.numpy()))


def maps_of(levels: list[Tensor], cells: Cells) -> list[Tensor]:
    """These cells' maps."""
    return [level[cells] for level in levels]


def choice_of_epoch(pictures: Tensor, folder: Path, seeds: Iterable[int]) -> str:
    """The table of one training, of which each division chooses the best epoch."""
    numbers = list(map(str, range(len(pictures))))
    first = divide(numbers, 0)
    parameters = models.parameters("stfpm")(precision="float32")
    seed_everything(parameters.seed)
    model = models.spec("stfpm").build(parameters)
    recorder = Recorder(pictures)
    fit, validation = (
        [{"image": pictures[i], "path": str(i)} for i in part]
        for part in (first.fit, first.validation)
    )
    size = parameters.batch_size
    context = FitContext(
        fit=create_dataloader(fit, size, shuffle=True),
        validation=create_dataloader(validation, size),
        state=folder,
        device=torch.device("cpu"),
        callbacks=[recorder],
    )
    models.spec("stfpm").fit(model, parameters, context)
    ends = np.cumsum([len(first.validation), len(first.calibration)])
    by_use: dict[str, list[Outcome]] = {"validation": [], "calibration": []}
    for seed in seeds:
        drawn = np.random.default_rng(seed).permutation(
            first.validation + first.calibration + first.test
        )
        parts = dict(zip(("validation", "calibration", "test"), np.split(drawn, ends), strict=True))
        cells = np.concatenate([parts["calibration"], parts["test"]]).tolist()
        for use, outcomes in by_use.items():
            best = min(recorder.epochs, key=lambda epoch: epoch[1][parts[use]].mean())
            maps = partial(maps_of, best[0])
            scores = score(maps, parts["validation"].tolist(), cells)
            outcomes.append(outcome(*np.split(scores, [len(parts["calibration"])])))
    return table(
        {
            "one STFPM, its best epoch chosen by the validation cells drawn": by_use["validation"],
            "the same, were it chosen by the calibration cells": by_use["calibration"],
        }
    )


def calibrations(num_cells: int, cases: Iterable[tuple[str, Fit, int, Sequence[int]]]) -> str:
    """False-reject rates with few good cells, calibrated with `split` and with `cross`.

    Args:
        num_cells: How many there are.
        cases: The model's name, how it is fitted, how many good cells there are, and the seeds of
            the divisions.
    """
    lines = [
        "| model | divisions | good cells | calibration | cells that calibrate | promised: mean "
        "| 5 / 50 / 95 % | measured: mean | 5 / 50 / 95 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, fit, num_good, seeds in cases:
        few = {seed: few_cells(num_cells, num_good, seed) for seed in seeds}
        ways = {
            "split": [split_outcome(fit, division) for division in few.values()],
            "cross": [cross_outcome(fit, division, seed) for seed, division in few.items()],
        }
        for way, outcomes in ways.items():
            head = [name, str(len(seeds)), str(num_good), f"`{way}`"]
            lines.append(compared(head, outcomes))
    return "\n".join(lines)


def few_cells(num_cells: int, num_good: int, seed: int) -> Division:
    """A division of few good cells, with enough for calibration; others are for the test."""
    drawn = np.random.default_rng(seed).permutation(num_cells).tolist()
    good, test = drawn[:num_good], drawn[num_good:][:NUM_TEST]
    calibration = max(CALIBRATION, ENOUGH / num_good)
    use = split_normal_images(list(map(str, good)), VALIDATION, calibration, seed)
    parts = (
        [i for i, x in zip(good, use, strict=True) if x == name]
        for name in ("fit", "validation", "calibration")
    )
    return Division(*parts, test)


def compared(head: list[str], outcomes: list[Outcome]) -> str:
    """A row of the last table."""
    count = outcomes[0].num_calibration
    cells = [*head, str(count)]
    for these in (promised(count, outcomes[0].num_test), outcomes):
        rates = np.array([x.rate for x in these])
        quantiles = np.quantile(rates, (0.05, 0.5, 0.95), method="inverted_cdf")
        cells += [f"{rates.mean():.2%}", " / ".join(f"{x:.1%}" for x in quantiles)]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run(main)
