"""Two experiments side by side, image by image.

    python -m tools.compare [REV [REV2]] [--json]

REV is a git revision or the name of an experiment. A single REV, by default HEAD, is compared
with the workspace.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import dvc.api
import numpy as np
from dvc.exceptions import DvcException
from dvc.scm import SCMError

from anomaly_detection.errors import UserError
from anomaly_detection.metrics import auroc_difference, compute_auroc, mcnemar_p_value
from stages import run

WORKSPACE = "workspace"


class CompareError(UserError):
    """A revision's predictions are missing, or are for other images."""


def main(*arguments: str) -> None:
    """Compare every category that both revisions have, and print tables or JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__)
    parser.add_argument("revisions", nargs="*", default=["HEAD"], metavar="REV")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if len(options.revisions) > 2:
        parser.error(f"REV must be given twice at most, got {' '.join(options.revisions)}.")
    first, second = (*options.revisions, WORKSPACE)[:2]
    names = [name for name in categories(first) if name in categories(second)]
    if not names:
        raise CompareError(f"{first} and {second} must have a category in common, but have none.")
    result = {name: compare(read(name, first), read(name, second), name) for name in names}
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        for name in names:
            print_table(name, first, second, result[name])


def categories(revision: str) -> list[str]:
    """The categories in a revision's params.yaml."""
    try:
        rev = None if revision == WORKSPACE else revision
        return dvc.api.params_show(rev=rev)["data"]["categories"]
    except (DvcException, SCMError, KeyError) as error:
        raise CompareError(f"{revision} must be a revision or an experiment: {error}.") from None


def read(category: str, revision: str) -> dict[str, dict[str, str]]:
    """The rows of scores.csv by image path, from the workspace or through DVC."""
    path = f"predictions/{category}/scores.csv"
    try:
        if revision == WORKSPACE:
            text = Path(path).read_text(encoding="utf-8")
        else:
            text = dvc.api.read(path, rev=revision, encoding="utf-8")
    except (DvcException, SCMError, OSError) as error:
        raise CompareError(
            f"{path} of {revision} must be in DVC's cache or a remote, but is not ({error}); "
            "run `dvc repro` at that revision, or `dvc pull`."
        ) from None
    return {row["path"]: row for row in csv.DictReader(io.StringIO(text))}


def compare(first: dict[str, Any], second: dict[str, Any], category: str) -> dict[str, Any]:
    """What changed from the first to the second, on the same test images.

    Raises:
        CompareError: The test images differ.
    """
    contents = [{path: row["sha256"] for path, row in rows.items()} for rows in (first, second)]
    if contents[0] != contents[1]:
        raise CompareError(
            f"{category}: both must have the same test images, got {len(first)} and "
            f"{len(second)} that differ in name or content; metrics of different test sets "
            "cannot be compared."
        )
    paths = sorted(first)
    labels = np.array([int(first[path]["label"]) for path in paths])
    verdicts, scores = (
        [np.array([kind(rows[path][column]) for path in paths]) for rows in (first, second)]
        for column, kind in (("pred_label", int), ("score", float))
    )
    right = [verdict == labels for verdict in verdicts]
    changes = {
        name: [path for path, chosen in zip(paths, which, strict=True) if chosen]
        for name, which in {
            "new_misses": right[0] & ~right[1] & (labels == 1),
            "new_false_rejects": right[0] & ~right[1] & (labels == 0),
            "fixed_misses": ~right[0] & right[1] & (labels == 1),
            "fixed_false_rejects": ~right[0] & right[1] & (labels == 0),
        }.items()
    }
    worse = len(changes["new_misses"]) + len(changes["new_false_rejects"])
    better = len(changes["fixed_misses"]) + len(changes["fixed_false_rejects"])
    result = {
        "num_images": len(paths),
        **changes,
        "mcnemar_p_value": mcnemar_p_value(worse, better),
    }
    if len(set(labels.tolist())) == 2:
        difference, interval = auroc_difference(labels, scores[1], scores[0])
        result["image_auroc"] = [compute_auroc(labels, score) for score in scores]
        result["image_auroc_difference"] = difference
        result["image_auroc_difference_interval"] = list(interval)
    return result


def print_table(category: str, first: str, second: str, result: dict[str, Any]) -> None:
    """Print the comparison as a table, new misses first."""
    print(f"{category}: {first} -> {second}, {result['num_images']} test images")
    if "image_auroc" in result:
        before, after = result["image_auroc"]
        low, high = result["image_auroc_difference_interval"]
        print(
            f"  image AUROC {before:.4f} -> {after:.4f}, difference "
            f"{result['image_auroc_difference']:+.4f}, 95 % from {low:+.4f} to {high:+.4f}"
        )
    for name in ("new_misses", "new_false_rejects", "fixed_misses", "fixed_false_rejects"):
        print(f"  {name.replace('_', ' '):21} {len(result[name])}")
        for path in result[name]:
            print(f"    {path}")
    p_value = result["mcnemar_p_value"]
    print(f"  McNemar's exact test: p = {p_value:.3g} if both are right equally often")


if __name__ == "__main__":
    run(main)
