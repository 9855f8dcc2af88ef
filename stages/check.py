"""Reject a bad params.yaml before DVC deletes the stages' outputs: params.yaml -> checked/.

`checked/params` never changes, so a valid change re-runs nothing through this stage.
`checked/<category>.json` holds what determines how that category is fitted: its model, the model's
parameters with every `auto` resolved but that of the precision, which the hardware decides, and a
hash of the model's code and of the files that its parameters name.
`checked/pretrain/<category>.json` holds as much of that as decides a pretraining, if there is one.
"""

from pathlib import Path

from anomaly_detection import models
from anomaly_detection.config import Config, ConfigError, load_config
from anomaly_detection.data import elpv
from anomaly_detection.data.calibration import require_calibration_images
from anomaly_detection.data.groups import parts_of
from anomaly_detection.data.layouts import (
    AUTO,
    available_categories,
    layout_of,
    required,
    scan_category,
    without_layout,
)
from anomaly_detection.data.sample import pictures_in
from anomaly_detection.data.splits import fraction_to_test, split_counts
from anomaly_detection.errors import DataError
from anomaly_detection.files import fingerprint
from stages import run, write_json


def main() -> None:
    """Check params.yaml and write checked/."""
    config = load_config()
    check_folders(config)
    check_numbers(config)
    check_device(config.hardware.device)
    check_export(config)
    chosen = {category: config.for_category(category) for category in config.data.categories}
    for _, parameters in chosen.values():
        parameters.check()
    for old in sorted(Path("checked").rglob("*"), reverse=True):  # which may be a link to a folder
        old.rmdir() if old.is_dir() else old.unlink()
    for category, (name, parameters) in chosen.items():
        folders = [models.folder(part) for part in (name, *parameters.parts())]
        code = sorted(path for folder in folders for path in folder.rglob("*.py"))
        decides = {
            "parameters": parameters.by_section(name),
            "folds": config.evaluation.folds if config.evaluation.calibration == "cross" else 0,
            "code": fingerprint(name, [*code, *parameters.files()]),
        }
        write_json(Path("checked") / f"{category}.json", decides)
        if before := parameters.pretraining():
            calibration = config.evaluation.calibration  # decides which images it may learn from
            before = {"parameters": before, "code": decides["code"], "calibration": calibration}
        write_json(Path("checked/pretrain") / f"{category}.json", before)
    Path("checked/params").write_text("params.yaml is valid.\n")


def check_folders(config: Config) -> None:
    """Raise unless every category and every override has a folder in data.root."""
    root = Path(config.data.root)
    if root == Path(elpv.ROOT):  # the next stage writes it
        elpv.require_elpv()
        there = list(elpv.CATEGORIES) if config.data.layout in (AUTO, "mvtec") else []
    elif root.is_dir():
        there = available_categories(root, config.data.layout)
    else:
        raise ConfigError(
            f"params.yaml: data.root must be a folder, got {str(root)!r}. An experiment in a "
            "temporary copy or in the queue has only tracked files: `dvc add` the folder, or give "
            "an absolute path."
        )
    check_masks(config)
    auxiliary = Path(config.data.auxiliary)
    if auxiliary != Path(elpv.PHOTOGRAPHS) and not pictures_in(auxiliary):
        raise ConfigError(
            "params.yaml: data.auxiliary must be a folder with images, got "
            f"{str(auxiliary)!r}; the built-in one is {elpv.PHOTOGRAPHS}."
        )
    listed = ", ".join(there) or "none"
    for key, names in (
        ("data.categories", config.data.categories),
        ("overrides", config.overrides),
    ):
        for name in names:
            if name not in there and (root / name).is_dir():
                fault = without_layout(root / name, config.data.layout)
                raise ConfigError(f"params.yaml: {key} names {name!r}, but {fault}")
            if name not in there:
                raise ConfigError(
                    f"params.yaml: {key} must be folders in {root} with "
                    f"{required(config.data.layout)}, got {name!r}; there are: {listed}."
                )


def check_masks(config: Config) -> None:
    """Raise unless every category has its mask or masks, if there are to be some."""
    if config.data.mask is None or config.data.root == elpv.ROOT:
        return
    for category in config.data.categories:
        path = Path(config.data.root) / category / config.data.mask
        if not path.exists():
            raise ConfigError(
                f"params.yaml: data.mask must be an image or a folder in {path.parent}, got "
                f"{config.data.mask!r}, which is not there."
            )


def check_numbers(config: Config) -> None:
    """Raise if a category has too few files for its splits, or for the promised false rejects.

    `prepare` knows better: files may be the same image, or none.
    """
    data, evaluation = config.data, config.evaluation
    root = Path(data.root)
    for category in data.categories:
        if not layout_of(root / category, data.layout):
            continue  # the next stage writes it
        besides = root / category / data.mask if data.mask else None
        _, samples, findings = scan_category(root, category, data.layout, besides)
        if findings:
            continue  # `prepare` lists them all
        try:
            paths = [str(sample.path) for sample in samples]
            parts = parts_of(samples, paths, root / category, data.group)
        except DataError as error:
            raise ConfigError(f"params.yaml: {error}") from None
        train = [part for part, x in zip(parts, samples, strict=True) if x.split == "train"]
        number = len(set(train))
        test_fraction = fraction_to_test(samples, data.test_fraction)
        fractions = data.validation_fraction, data.calibration_fraction, test_fraction
        try:
            split_counts(number, *fractions)
            if evaluation.threshold_method == "false_reject_rate":
                rate, method = evaluation.false_reject_rate, evaluation.calibration
                unit = "images" if set(train) <= set(paths) else "parts"
                require_calibration_images(number, *fractions, rate=rate, method=method, unit=unit)
        except DataError as error:
            raise ConfigError(f"{root / category}: {error}") from None


def check_device(device: str) -> None:
    """Raise unless the device exists; the usual ones do, which saves importing PyTorch."""
    if device not in ("auto", "cpu"):
        from anomaly_detection.trainer import choose_device

        choose_device(device)


def check_export(config: Config) -> None:
    """Raise if exports would compute in another precision than the evaluation."""
    if config.export.formats and config.evaluation.precision not in ("auto", "float32"):
        raise ConfigError(
            "params.yaml: evaluation.precision must be float32 to export, got "
            f"{config.evaluation.precision!r}; or let export.formats be []."
        )


if __name__ == "__main__":
    run(main)
