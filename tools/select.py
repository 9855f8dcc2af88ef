"""Choose a model, its levels and its reduction for each category, without any defect.

    python -m tools.select [CATEGORY ...] [--models NAME ...] [--picture FILE] [--json FILE]

Compares candidates on validation images and synthetic defects on them, and prints a table and what
to paste into `overrides` in params.yaml. The same goes to files, by default selection.png and
selection.json, which `python -m tools.advice` reads. By default, the models that are fitted in one
pass compete with the configured one. docs/selection.md says how often the choice is right.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from stages import SELECTION, run, write_json  # isort: skip, before PyTorch: it makes idle threads sleep

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ruamel.yaml import YAML

from anomaly_detection import models
from anomaly_detection.config import Config, ConfigError, load_config
from anomaly_detection.metrics.visualization import ANOMALOUS, NEUTRAL, NORMAL
from anomaly_detection.selection import Areas, choose, num_wins, worst
from tools.trial import NUM_DEFECTS, Trial, Values, fits, is_fitted_in_one_pass

COLORS = (NORMAL, ANOMALOUS, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


class Candidate(NamedTuple):
    """A model with its levels and its reduction, and the AUROC of each family of defects."""

    model: str
    strides: tuple[int, ...]
    top_fraction: float | None
    override: Values
    areas: Areas

    @property
    def label(self) -> str:
        """Its name in the picture."""
        levels = f" {'+'.join(map(str, self.strides))}" if self.strides else ""
        reduction = "" if self.top_fraction is None else f", top {self.top_fraction:g}"
        return f"{self.model}{levels}{reduction}"


class Selection(NamedTuple):
    """The candidates for a category, the configured one first, and which is chosen."""

    num_normal: int
    candidates: list[Candidate]
    chosen: int

    @property
    def ranking(self) -> list[int]:
        """The candidates from the best to the worst."""
        areas = [worst(candidate.areas) for candidate in self.candidates]
        return sorted(range(len(areas)), key=lambda i: -areas[i])


def main(*arguments: str) -> None:
    """Choose for each category; print tables and overrides, and write the files."""
    parser = argparse.ArgumentParser(prog="python -m tools.select", description=__doc__)
    parser.add_argument("categories", nargs="*", metavar="CATEGORY", help="default: all")
    parser.add_argument("--models", nargs="+", metavar="NAME", choices=models.names())
    parser.add_argument("--picture", type=Path, default=Path("selection.png"), metavar="FILE")
    parser.add_argument("--json", type=Path, default=SELECTION, metavar="FILE")
    options = parser.parse_args(arguments)
    config = load_config()
    all_names = config.data.categories
    if unknown := [name for name in options.categories if name not in all_names]:
        raise ConfigError(
            f"CATEGORY must be one of data.categories, {', '.join(all_names)}, got {unknown[0]}."
        )
    names = options.models or [name for name in models.names() if is_fitted_in_one_pass(name)]
    selections = {}
    for category in options.categories or all_names:
        selections[category] = select(config, category, names)
        print_table(category, selections[category])
    print_overrides(selections)
    plot(selections, options.picture)
    print(f"Picture: {options.picture}")
    known = json.loads(options.json.read_text()) if options.json.is_file() else {}
    new = {name: described(name, one) for name, one in selections.items()}
    write_json(options.json, known | new)


def select(config: Config, category: str, names: Sequence[str]) -> Selection:
    """Compare the configured model and the named ones.

    Raises:
        UserError: The images are not prepared, or a fit is not possible.
    """
    with TemporaryDirectory() as folder:
        trial = Trial(config, category, Path("data/prepared") / category, Path(folder))
        candidates = list(compared(trial, names))
    chosen = choose({i: one.areas for i, one in enumerate(candidates)}, default=0)
    return Selection(trial.num_normal, candidates, chosen)


def compared(trial: Trial, names: Sequence[str]) -> Iterator[Candidate]:
    """Fit and compare each candidate."""
    for fit in fits(trial.config, trial.category, names):
        print(f"{trial.category}: {fit.name} {fit.strides or ''}", file=sys.stderr)
        areas = trial.areas(fit, trial.known(fit))
        for fraction, own in zip(fit.fractions, areas, strict=True):
            yield Candidate(fit.name, fit.strides, fraction, fit.reduced(fraction), own)


def print_table(category: str, selection: Selection) -> None:
    """Print the candidates from the best to the worst, with AUROC in percent."""
    families = list(selection.candidates[0].areas)
    width = max(len(one.model) for one in selection.candidates)
    print(
        f"{category}: AUROC in % of {2 * NUM_DEFECTS} defects of each family against "
        f"{selection.num_normal} normal images"
    )
    heads = "".join(f"{family:>10}" for family in (*families, "worst", "wins"))
    print(f"  {'model':{width}}  {'strides':8}  {'top':>5}{heads}")
    for i in selection.ranking:
        one = selection.candidates[i]
        strides = " ".join(map(str, one.strides))
        fraction = "" if one.top_fraction is None else f"{one.top_fraction:g}"
        cells = [100 * one.areas[family] for family in families] + [100 * worst(one.areas)]
        numbers = "".join(f"{cell:10.1f}" for cell in cells)
        wins = num_wins(one.areas, selection.candidates[0].areas) if i else ""
        notes = " default" * (i == 0) + " chosen" * (i == selection.chosen)
        print(f"  {one.model:{width}}  {strides:8}  {fraction:>5}{numbers}{wins:10} {notes}")
    print()


def print_overrides(selections: dict[str, Selection]) -> None:
    """Print the block for params.yaml, of the categories whose default is not kept."""
    block = {
        category: one.candidates[one.chosen].override
        for category, one in selections.items()
        if one.chosen
    }
    if kept := ", ".join(category for category in selections if category not in block):
        print(f"{kept}: keep the default; nothing is better in most families and in the worst.")
    if block:
        print("Paste into params.yaml, in place of what overrides has for these categories:\n")
        yaml = YAML()
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.dump({"overrides": block}, sys.stdout)
        print()


def described(category: str, selection: Selection) -> dict[str, Any]:
    """A selection as JSON, with the hashes of the images that it is by."""
    content = json.loads((Path("metrics") / category / "audit.json").read_text())["content"]
    default = selection.candidates[0].areas
    return {
        "content": {split: content[split] for split in ("fit", "validation")},
        "num_normal": selection.num_normal,
        "num_defects_of_each_family": 2 * NUM_DEFECTS,
        "default": 0,
        "chosen": selection.chosen,
        "candidates": [
            one._asdict() | {"worst": worst(one.areas), "num_wins": num_wins(one.areas, default)}
            for one in selection.candidates
        ],
    }


def plot(selections: dict[str, Selection], path: Path) -> Figure:
    """A panel for each category: the AUROC of each family, in a row for each candidate."""
    rows = [len(one.candidates) for one in selections.values()]
    size = (8, sum(0.24 * count + 1.3 for count in rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (category, selection) in zip(panels, selections.items(), strict=True):
        draw(axes, category, selection)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return figure


def draw(axes: Axes, category: str, selection: Selection) -> None:
    """Draw a category's panel, the best candidate at the top."""
    ranking = selection.ranking[::-1]
    ordered = [selection.candidates[i] for i in ranking]
    heights = range(len(ordered))
    for family, color, marker in zip(ordered[0].areas, COLORS, MARKERS, strict=False):
        areas = [one.areas[family] for one in ordered]
        axes.plot(areas, heights, marker, color=color, label=family, markersize=5, alpha=0.8)
    for height, one in zip(heights, ordered, strict=True):
        ends = [min(one.areas.values()), max(one.areas.values())]
        axes.plot(ends, [height] * 2, color=NEUTRAL, linewidth=1, alpha=0.5, zorder=0)
    notes = {0: " (default)", selection.chosen: " (chosen)"}
    if not selection.chosen:
        notes[0] = " (default, kept)"
    labels = [selection.candidates[i].label + notes.get(i, "") for i in ranking]
    axes.set_yticks(heights, labels)
    for tick, i in zip(axes.get_yticklabels(), ranking, strict=True):
        tick.set_fontweight("bold" if i in notes else "normal")
    axes.set(title=category, xlabel="AUROC of synthetic defects against normal images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    run(main)
