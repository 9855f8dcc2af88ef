"""Two experiments side by side, image by image.

    python -m tools.compare [REV [REV2]] [--json]

REV is a git revision or the name of an experiment. A single REV, by default HEAD, is compared
with the workspace. The images are the test images of the second; those that are new to the first
are judged by its detector, and shown apart.
"""

import argparse
import csv
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import dvc.api
import numpy as np
from dvc.exceptions import DvcException
from dvc.scm import SCMError

from anomaly_detection.data.decode import content_hash, read_file
from anomaly_detection.data.sample import picture_named
from anomaly_detection.errors import DataError, UserError
from anomaly_detection.inference import Detector
from anomaly_detection.metrics import auroc_difference, compute_auroc, mcnemar_p_value
from stages import run

WORKSPACE = "workspace"

CHANGES = ("new_misses", "new_false_rejects", "fixed_misses", "fixed_false_rejects")

Rows = dict[str, dict[str, Any]]  # of scores.csv, by the image's path


class CompareError(UserError):
    """What a comparison needs is missing, or images cannot be compared."""


def main(*arguments: str) -> None:
    """Compare every category that both revisions have, and print tables or JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__)
    parser.add_argument("revisions", nargs="*", default=["HEAD"], metavar="REV")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if len(options.revisions) > 2:
        parser.error(f"REV must be given twice at most, got {' '.join(options.revisions)}.")
    first, second = (*options.revisions, WORKSPACE)[:2]
    before, data = data_of(first), data_of(second)
    names = [name for name in before["categories"] if name in data["categories"]]
    if not names:
        raise CompareError(f"{first} and {second} must have a category in common, but have none.")
    result = {name: compare_category(name, first, second, data) for name in names}
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        for name in names:
            print_table(name, first, second, result[name])


def data_of(revision: str) -> dict[str, Any]:
    """The section `data` of a revision's params.yaml."""
    try:
        data = dvc.api.params_show(rev=None if revision == WORKSPACE else revision)["data"]
        return {"categories": data["categories"], **data}
    except (DvcException, SCMError, KeyError) as error:
        raise CompareError(f"{revision} must be a revision or an experiment: {error}.") from None


def read(path: str, revision: str) -> bytes:
    """A file of the pipeline, from the workspace or through DVC."""
    try:
        if revision == WORKSPACE:
            return Path(path).read_bytes()
        return dvc.api.read(path, rev=revision, mode="rb")
    except (DvcException, SCMError, OSError) as error:
        raise CompareError(
            f"{path} of {revision} must be in DVC's cache or a remote, but is not ({error}); "
            "run `dvc repro` at that revision, or `dvc pull`."
        ) from None


def read_rows(path: str, revision: str) -> Rows:
    """The rows of a CSV file by image path."""
    text = read(path, revision).decode()
    return {row["path"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}


def compare_category(name: str, first: str, second: str, data: dict[str, Any]) -> dict[str, Any]:
    """What changed from the first to the second, on the second's test images.

    Returns:
        As `compare` of the images that both have tested; `new`, as `compare` of those that the
        first's detector judges now, if there are any; and how many images do not count, since the
        first was made with them (`num_seen`), or only the first has tested them (`num_dropped`).
    """
    before, after = (read_rows(f"predictions/{name}/scores.csv", x) for x in (first, second))
    shared, new = paired(before, after, name)
    num_new = len(new)
    if new:
        index = read_rows(f"data/prepared/{name}/train/index.csv", first).values()
        seen = {row["sha256"] for row in index}
        new = {path: row for path, row in new.items() if row["sha256"] not in seen}
    contents = {row["sha256"] for row in after.values()}
    result = compare(shared, after)
    if new:
        result["new"] = compare(judged(name, first, new, data), new)
    result["num_seen"] = num_new - len(new)
    result["num_dropped"] = sum(row["sha256"] not in contents for row in before.values())
    return result


def paired(first: Rows, second: Rows, category: str) -> tuple[Rows, Rows]:
    """What the first says of the second's images, by their paths there, and the rows of the others.

    Images are the same if their contents are.

    Raises:
        CompareError: An image has another content in each.
    """
    other = [x for x in second if x in first and first[x]["sha256"] != second[x]["sha256"]]
    if other:
        raise CompareError(
            f"{category}: an image must be the same in both, but {other[0]} has another content, "
            f"one of {len(other)}; metrics of different test sets cannot be compared."
        )
    contents = {row["sha256"]: row for row in first.values()}
    shared = {
        path: contents[row["sha256"]] for path, row in second.items() if row["sha256"] in contents
    }
    return shared, {path: row for path, row in second.items() if path not in shared}


def judged(category: str, revision: str, images: Rows, data: dict[str, Any]) -> Rows:
    """The verdicts of a revision's detector on images of data.root in the workspace.

    Raises:
        CompareError: The detector is not there, or the images are not.
    """
    folder = Path(data["root"]) / category
    for path, row in images.items():
        if content_hash(read_file(folder / path)) != row["sha256"]:
            raise CompareError(f"{folder / path} must be the image that was tested; check it out.")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / f"{category}.pt"
        file.write_bytes(read(f"detectors/{category}.pt", revision))
        detector = Detector.load(file)
    masks = None
    if isinstance(detector.frame.mask, str) and data["mask"]:  # it needs one for each image
        masks = [picture_named(Path(path), folder / data["mask"]) for path in images]
    verdicts = {}
    files = [folder / path for path in images]
    for path, found in zip(images, detector.predict_many(files, masks=masks), strict=True):
        if isinstance(found, DataError):
            raise found
        verdicts[path] = {"score": found.score, "pred_label": found.verdict == "anomalous"}
    return verdicts


def compare(first: Rows, second: Rows) -> dict[str, Any]:
    """What changed from the first to the second, on the images of the first."""
    paths = sorted(first)
    labels = np.array([int(second[path]["label"]) for path in paths], dtype=int)
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
        difference, interval = auroc_difference(scores[1], scores[0], labels)
        result["image_auroc"] = [compute_auroc(score, labels) for score in scores]
        result["image_auroc_difference"] = difference
        result["image_auroc_difference_interval"] = list(interval)
    return result


def print_table(category: str, first: str, second: str, result: dict[str, Any]) -> None:
    """Print the comparison as a table, new misses first; then that of new images."""
    print(f"{category}: {first} -> {second}, {result['num_images']} test images")
    _print_changes(result)
    if "new" in result:
        print(
            f"{category}: {first} -> {second}, {result['new']['num_images']} new test images; if "
            f"they are there because {first} was wrong, they favour {second}"
        )
        _print_changes(result["new"])
    if result["num_seen"]:
        print(f"  left out: {result['num_seen']} that {first} was fitted or calibrated with")
    if result["num_dropped"]:
        print(f"  left out: {result['num_dropped']} that only {first} has tested")


def _print_changes(result: dict[str, Any]) -> None:
    if "image_auroc" in result:
        before, after = result["image_auroc"]
        low, high = result["image_auroc_difference_interval"]
        print(
            f"  image AUROC {before:.4f} -> {after:.4f}, difference "
            f"{result['image_auroc_difference']:+.4f}, 95 % from {low:+.4f} to {high:+.4f}"
        )
    for name in CHANGES:
        print(f"  {name.replace('_', ' '):21} {len(result[name])}")
        for path in result[name]:
            print(f"    {path}")
    p_value = result["mcnemar_p_value"]
    print(f"  McNemar's exact test: p = {p_value:.3g} if both are right equally often")


if __name__ == "__main__":
    run(main)
