"""How often `tools.select` picks the better candidate, where real or known defects can tell.

    python -m benchmarks.selection [--categories NAME ...] [--models NAME ...] [--json FILE]
    python -m benchmarks.selection --read FILE ...

Categories are those of the built-in data set and the generated ones (`benchmarks.generated`). Each
is prepared, and its candidates fitted, as in the pipeline, with params.yaml as it is. Then each
model's own defaults play the default in turn. Prints Markdown for docs/selection.md; `--read` does
so from the files of earlier runs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages import run, write_json  # isort: skip, before PyTorch: it makes idle threads sleep

import numpy as np

from anomaly_detection import models
from anomaly_detection.config import Config, load_config
from anomaly_detection.data import elpv
from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.prepare import prepare_category
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.metrics import compute_auroc
from anomaly_detection.selection import choose, mean, num_wins, prefers, worst
from benchmarks.generated import PRODUCTS, write_generated
from tools.trial import Trial, fits, is_fitted_in_one_pass

CATEGORIES = ("poly", *PRODUCTS)  # mono is looked at once, when nothing is left to choose
ALIKE = 0.002  # AUROCs that differ by less count as equal

Row = dict[str, Any]  # a candidate, with its areas and its image AUROC
Rows = list[Row]  # all of a category, the first model's default first
Results = dict[str, Rows]


def main(*arguments: str) -> None:
    """Measure, or read, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    known = [*elpv.CATEGORIES, *PRODUCTS]
    parser.add_argument("--categories", nargs="+", choices=known, default=CATEGORIES)
    parser.add_argument("--models", nargs="+", choices=models.names())
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--read", type=Path, nargs="+", help="measure nothing, print these results")
    options = parser.parse_args(arguments)
    names = options.models or [name for name in models.names() if is_fitted_in_one_pass(name)]
    results: Results = {}
    for path in options.read or ():
        for category, rows in json.loads(path.read_text()).items():
            results.setdefault(category, []).extend(rows)
    if not options.read:
        for category in options.categories:
            results[category] = measured(load_config(), category, names)
            if options.json:
                write_json(options.json, results)
    print(by_default(results), by_pair(results), by_category(results), sep="\n\n")


def measured(config: Config, category: str, names: list[str]) -> Rows:
    """The candidates of a category, with what their detectors achieve on its test images."""
    with TemporaryDirectory() as name:
        project = Path(name)
        if category in elpv.CATEGORIES:
            elpv.write_elpv(project / "raw")
        else:
            write_generated(project / "raw" / category, category)
        prepared, data = project / "data" / "prepared" / category, config.data
        prepare_category(
            project / "raw",
            category,
            prepared,
            image_size=data.image_size,
            bit_depth=data.bit_depth,
            validation_fraction=data.validation_fraction,
            calibration_fraction=data.calibration_fraction,
            seed=data.seed,
        )
        model = config.model | {"name": names[0]}
        own = config.model_copy(update={"model": model, "overrides": {}})
        return list(judged(Trial(own, category, prepared, project), names))


def judged(trial: Trial, names: list[str]) -> Iterator[dict[str, Any]]:
    """Each candidate, fitted once for its areas and for the image AUROC of its detector."""
    test = PreparedDataset(trial.prepared, "test")
    labels = [int(row["label"]) for row in test.rows]
    validation = PreparedDataset(trial.prepared, "validation")
    for fit in fits(trial.config, trial.category, names):
        print(trial.category, fit.name, fit.strides, file=sys.stderr)
        model = trial.fitted(fit, validation)
        scores = trial.scores(model, create_dataloader(test), fit.fractions)
        for fraction, areas, own in zip(
            fit.fractions, trial.areas(fit, model), scores, strict=True
        ):
            yield {
                "model": fit.name,
                "strides": fit.strides,
                "top_fraction": fraction,
                "areas": areas,
                "image_auroc": compute_auroc(own, labels),
            }


def by_default(results: Results) -> str:
    """What a user of each default gains and loses by the choice."""
    heads = ["default", "categories", "same", "better", "worse"]
    heads += ["mean change", "worst change", "short of best"]
    lines = [heads, ["---"] * len(heads)]
    for name in dict.fromkeys(row["model"] for rows in results.values() for row in rows):
        changes, shortfalls = [], []
        for rows in results.values():
            default = next(i for i, row in enumerate(rows) if row["model"] == name)
            chosen = rows[chosen_for(rows, default)]["image_auroc"]
            changes.append(chosen - rows[default]["image_auroc"])
            shortfalls.append(max(row["image_auroc"] for row in rows) - chosen)
        better, worse = (sum(sign * x > ALIKE for x in changes) for sign in (1, -1))
        counts = [len(changes), len(changes) - better - worse, better, worse]
        figures = [f"{x:+.3f}" for x in (np.mean(changes), min(changes))]
        lines.append([f"`{name}`", *map(str, counts), *figures, f"{np.mean(shortfalls):.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def chosen_for(rows: Rows, default: int) -> int:
    """The candidate that is chosen if this one is the default."""
    return choose({i: row["areas"] for i, row in enumerate(rows)}, default)


def by_pair(results: Results) -> str:
    """How often rules tell which of two candidates is better, and what an error costs."""
    rules: dict[str, Callable[[Row, Row], float]] = {
        "the worst family": lambda a, b: worst(a["areas"]) - worst(b["areas"]),
        "the mean of all families": lambda a, b: mean(a["areas"]) - mean(b["areas"]),
        "most families": lambda a, b: (
            num_wins(a["areas"], b["areas"]) - num_wins(b["areas"], a["areas"])
        ),
        "the worst family and most families": lambda a, b: (
            prefers(a["areas"], b["areas"]) - prefers(b["areas"], a["areas"])
        ),
    }
    lines = ["| rule | pairs | undecided | right | cost of an error: mean | highest |"]
    lines.append("|---|---|---|---|---|---|")
    pairs = [
        (a, b, a["image_auroc"] - b["image_auroc"])
        for rows in results.values()
        for a, b in combinations(rows, 2)
    ]
    pairs = [pair for pair in pairs if abs(pair[2]) > ALIKE]
    for name, rule in rules.items():
        decided = [(rule(a, b), gain) for a, b, gain in pairs if rule(a, b)]
        costs = [abs(gain) for sign, gain in decided if sign * gain < 0]
        right = 1 - len(costs) / max(1, len(decided))
        cost = [f"{np.mean(costs):.3f}", f"{max(costs):.3f}"] if costs else ["-", "-"]
        counts = [f"{len(pairs)}", f"{len(pairs) - len(decided)}", f"{right:.0%}"]
        lines.append(f"| {' | '.join([name, *counts, *cost])} |")
    return "\n".join(lines)


def by_category(results: Results) -> str:
    """What the defaults, the chosen and the best candidate of each category achieve."""
    names = list(dict.fromkeys(row["model"] for rows in results.values() for row in rows))
    heads = ["category", *(f"`{name}`" for name in names), "chosen", "image AUROC", "best", ""]
    lines = [heads, ["---"] * len(heads)]
    for category, rows in results.items():
        first = {row["model"]: row for row in reversed(rows)}
        own = [f"{first[name]['image_auroc']:.3f}" if name in first else "-" for name in names]
        chosen = rows[chosen_for(rows, 0)]
        best = max(rows, key=lambda row: row["image_auroc"])
        lines.append([f"`{category}`", *own, *described(chosen), *described(best)[::-1]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def described(row: Row) -> list[str]:
    """A candidate's name, and what it achieves."""
    name = f"{row['model']} {'+'.join(map(str, row['strides']))}, top {row['top_fraction']:g}"
    return [name, f"{row['image_auroc']:.3f}"]


if __name__ == "__main__":
    run(main)
