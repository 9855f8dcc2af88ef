"""What to try next: rules that read a category's results, each with a command.

No model and no threshold is chosen on test images. Defective ones only say that a result is poor,
in `faults`; good ones also say where maps are bright, and carry the synthetic defects. The other
steps come from the history of the fit, the audit of the data and the calibration images.
docs/if-the-result-is-poor.md explains each.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from anomaly_detection.parameters import AUTO

POOR_MISS_RATE = 0.3
POOR_SIZE = 0.12  # share of the image's side from which on 90 % of synthetic defects are detected
SMALL_SIZE = 0.05  # the same, for images that are shrunk
SHRUNK = 2  # pixels of the image, along a side, in one that the model sees
FALL = 0.1  # of the validation loss over the last third of the epochs
NEAR_DUPLICATES = 0.1  # share of the images of a split
ENOUGH = 3  # calibration images above the threshold, on average; the bound is then twice the rate
AT_BORDER = 0.5  # share of good images

Results = Mapping[str, Any]  # of a category, as `category.page_data` returns them


class Advice(NamedTuple):
    """What was found, with its numbers, and what to run."""

    reason: str
    command: str


def next_steps(results: Results, selection: Results | None = None) -> dict[str, list[Any]]:
    """What is poor about a category's results, `faults`, and what to try, `steps`.

    Args:
        results: As above.
        selection: What `tools.select` has found for this category, if anything.
    """
    found = [rule(results) for rule in RULES] + [another_model(results, selection)]
    steps = [advice._asdict() for advice in found if advice]
    return {"faults": list(faults(results)), "steps": steps}


def advice_lines(name: str, steps: Mapping[str, list[Any]]) -> Iterator[str]:
    """What `next_steps` has found for a category, as lines of text; none if that is nothing."""
    if not any(steps.values()):
        return
    yield f"{name}: what next"
    for fault in steps["faults"]:
        yield f"  Poor: {fault}"
    for step in steps["steps"]:
        yield f"  - {step['reason']}"
        for line in step["command"].splitlines():
            yield f"      {line}"
    if not steps["steps"]:
        yield "  No rule says why."


def faults(results: Results) -> Iterator[str]:
    """What is poor, in words."""
    metrics = results["metrics"]
    if (metrics["miss_rate"] or 0) > POOR_MISS_RATE:
        yield (
            f"{metrics['num_misses']} of {metrics['num_anomalous']} defective test images are "
            f"missed, {_percent(metrics['miss_rate'])}."
        )
    interval = metrics["intervals"]["false_reject_rate"]
    if interval and interval[0] > metrics["calibration"]["false_reject_rate"]["upper_95"]:
        yield (
            f"{metrics['num_false_rejects']} of {metrics['num_normal']} good test images are "
            f"rejected, {_percent(metrics['false_reject_rate'])}, more than the calibration images "
            "explain: the test images differ from them, or they are too much like those of the fit."
        )
    if not metrics["num_anomalous"] and _misses_small_ones(metrics, POOR_SIZE):
        yield f"{_detection(metrics)}."


def train_longer(results: Results) -> Advice | None:
    """The last epoch was the best, and the validation loss fell by FALL over the last third."""
    training = results["training"]
    history = [row for row in training["history"] if row.get("val_loss") is not None]
    if len(history) < 2 or training["best_epoch"] != history[-1]["epoch"]:
        return None
    num_epochs = max(1, len(history) // 3)
    before, last = history[-1 - num_epochs]["val_loss"], history[-1]["val_loss"]
    length = _length(training["parameters"])
    if length is None or before <= 0 or 1 - last / before < FALL:
        return None
    key, value = length
    return Advice(
        f"The last epoch, {training['best_epoch']}, was the best, and the validation loss was "
        f"still falling, from {before:.3g} to {last:.3g} over the last "
        f"{'epoch' if num_epochs == 1 else f'{num_epochs} epochs'}. Train longer.",
        f"dvc exp run -S {key}={2 * value}",
    )


def near_duplicates(results: Results) -> Advice | None:
    """A share NEAR_DUPLICATES of the test or calibration images resembles one of another split."""
    data = results["metrics"]["data"]
    shares = {
        split: data["num_near_duplicates"][split]["images"] / total
        for split in ("test", "calibration")
        if (total := data["num_images"].get(split))
    }
    split = max(shares, key=lambda name: shares[name], default="")
    if not split or shares[split] < NEAR_DUPLICATES:
        return None
    consequence, remedy, command = {
        "test": (
            "the metrics may be optimistic",
            "move them all into train/ or test/, or set data.group if the test images were drawn",
            "make repro",
        ),
        "calibration": (
            "the threshold may be too low",
            "keep them in one split, with your own expression for the part's name in the path",
            "dvc exp run -S \"data.group='(part\\d+)_'\"",
        ),
    }[split]
    return Advice(
        f"{data['num_near_duplicates'][split]['images']} of {data['num_images'][split]} {split} "
        f"images ({_percent(shares[split])}) have near-duplicates in other splits, so "
        f"{consequence}. If there are several pictures of a part, {remedy}.",
        command,
    )


def few_calibration_images(results: Results) -> Advice | None:
    """Of so many images, fewer than ENOUGH exceed the threshold: it is not well known."""
    calibration = results["metrics"]["calibration"]
    rate, upper = calibration["requested_rate"], calibration["false_reject_rate"]["upper_95"]
    if rate is None or calibration["num_images"] * rate >= ENOUGH:
        return None
    is_split = calibration["method"] == "split"
    return Advice(
        f"{calibration['num_images']} calibration images are few for {_percent(rate)} false "
        f"rejects: there may be up to {_percent(upper)} (95 %). Add good images"
        f"{', or calibrate with those that fit the model as well' if is_split else ''}.",
        "dvc exp run -S evaluation.calibration=cross" if is_split else "make repro",
    )


def bright_border(results: Results) -> Advice | None:
    """The maps of AT_BORDER of the good images are highest at the border, beyond chance."""
    peaks = results["peaks"]
    if not peaks or not peaks["num_images"]:
        return None
    share = peaks["at_border"] / peaks["num_images"]
    if share < AT_BORDER or peaks["low"] <= peaks["area"]:
        return None
    return Advice(
        f"The maps of {peaks['at_border']} of {peaks['num_images']} good test images are highest "
        f"at the border, which is {_percent(peaks['area'])} of a map. If the part does not reach "
        "it, crop the images, or mask it with data.mask.",
        "dvc exp run -S 'data.crop=[LEFT,TOP,RIGHT,BOTTOM]'",
    )


def small_defects(results: Results) -> Advice | None:
    """The model sees shrunk images, and defects of SMALL_SIZE are not detected in 90 %."""
    metrics, sides = results["metrics"], results["sides"]
    if not sides or sides["image"] < SHRUNK * sides["seen"]:
        return None
    if not _misses_small_ones(metrics, SMALL_SIZE):
        return None
    return Advice(
        f"Of {sides['image']} pixels along a side, the model sees {sides['seen']}. "
        f"{_detection(metrics)}. If yours are smaller, cut the images into tiles.",
        f"dvc exp run -S data.tile_size={sides['seen']} -S data.tile_overlap={sides['seen'] // 8}",
    )


def another_model(results: Results, selection: Results | None) -> Advice | None:
    """Another model was found better by synthetic defects, or only large ones are detected.

    What `tools.select` has found counts if it compared this model on these images.
    """
    name, training, metrics = results["name"], results["training"], results["metrics"]
    if selection and _is_of(selection, results):
        own, chosen = (selection["candidates"][selection[key]] for key in ("default", "chosen"))
        if chosen is own or _is_in_use(chosen["override"], training["parameters"]):
            return None
        return Advice(
            f"By synthetic defects on validation images, {_label(chosen)} is better than "
            f"{_label(own)}: image AUROC {chosen['worst']:.3f} instead of {own['worst']:.3f}, for "
            "the kind of defect that each detects worst.",
            "# in params.yaml, in place of what overrides has for this category:\n"
            f"overrides:\n  {json.dumps(name)}: {json.dumps(chosen['override'])}\n"
            "# then\nmake repro",
        )
    if not _misses_small_ones(metrics, POOR_SIZE):
        return None
    return Advice(
        f"{_detection(metrics)}. Another model may do better; this compares them on validation "
        "images.",
        f"python -m tools.select {name}",
    )


RULES = (train_longer, near_duplicates, few_calibration_images, bright_border, small_defects)


def _misses_small_ones(metrics: Results, limit: float) -> bool:
    """Whether 90 % of synthetic defects are detected only from a size above the limit, if ever."""
    synthetic = metrics.get("synthetic")
    if not synthetic:
        return False
    size = synthetic["size_detected_in_90_percent"]
    return size is None or size > limit


def _detection(metrics: Results) -> str:
    size, unit = metrics["synthetic"]["size_detected_in_90_percent"], metrics["size_unit"]
    if size is None:
        return "Fewer than 90 % of synthetic defects are detected even at the largest size"
    return (
        "90 % of synthetic defects are detected only at "
        f"{unit['per_side'] * size:.3g} {unit['name']} or larger"
    )


def _length(parameters: Results) -> tuple[str, int] | None:
    """The parameter that says how long a fit lasts, with its value; None if there is none."""
    for section, values in parameters.items():
        for key in ("num_epochs", "num_steps"):
            if isinstance(values.get(key), int):
                return f"{section}.{key}", values[key]
    return None


def _is_of(selection: Results, results: Results) -> bool:
    candidates = [selection["candidates"][selection[key]] for key in ("default", "chosen")]
    content = results["metrics"]["data"]["content"]
    return results["training"]["model"] in {one["model"] for one in candidates} and all(
        content.get(split) == known for split, known in selection["content"].items()
    )


def _is_in_use(override: Results, parameters: Results) -> bool:
    return all(
        value == AUTO or parameters.get(section, {}).get(key) == value
        for section, values in override.items()
        for key, value in values.items()
    )


def _label(candidate: Results) -> str:
    strides = "+".join(map(str, candidate["strides"]))
    fraction = candidate["top_fraction"]
    details = [f"strides {strides}"] if strides else []
    details += [] if fraction is None else [f"top_fraction {fraction:g}"]
    return f"{candidate['model']} ({', '.join(details)})" if details else str(candidate["model"])


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
