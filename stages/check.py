"""Refuse a bad params.yaml before DVC deletes what the stages made: params.yaml -> checked/.

`checked/params` never changes, so that a good change re-runs nothing through this stage, and
`checked/overrides/<category>.json` changes only with that category's overrides.
"""

import shutil
from pathlib import Path

from anomaly_detection import elpv
from anomaly_detection.config import Config, ConfigError, load_config
from anomaly_detection.data.layout import available_categories
from stages import run, write_json

KNOWN_GOOD = {"backbone": "tf_efficientnet_lite0", "layers": None, "weights": "bundled"}


def main() -> None:
    """Check and write."""
    config = load_config()
    check_folders(config)
    for category in config.data.categories:
        check_model(config.for_category(category))
    shutil.rmtree("checked", ignore_errors=True)
    for category in config.data.categories:
        override = config.overrides.get(category)
        values = override.model_dump() if override else {}
        write_json(Path("checked/overrides") / f"{category}.json", values)
    Path("checked/params").write_text("params.yaml is valid.\n")


def check_folders(config: Config) -> None:
    """Every category and every override must be of a folder in data.root."""
    root = Path(config.data.root)
    if root == Path(elpv.ROOT):  # which the next stage writes
        there = list(elpv.CATEGORIES)
    elif root.is_dir():
        there = available_categories(root)
    else:
        raise ConfigError(
            f"params.yaml: data.root must be a folder, got {str(root)!r}. An experiment in a "
            "temporary copy or in the queue has only tracked files: `dvc add` the folder, or give "
            "an absolute path."
        )
    listed = ", ".join(there) or "none"
    for key, names in (
        ("data.categories", config.data.categories),
        ("overrides", config.overrides),
    ):
        for name in names:
            if name not in there:
                raise ConfigError(
                    f"params.yaml: {key} must be folders in {root}, got {name!r}; "
                    f"there are: {listed}."
                )


def check_model(config: Config) -> None:
    """The backbone, its layers and weights, and the device must be there.

    The usual ones are known to be, which saves the seconds that importing timm and PyTorch takes.
    """
    model = config.model
    if model.model_dump(include=KNOWN_GOOD.keys()) != KNOWN_GOOD:
        from anomaly_detection.backbones import check_backbone

        check_backbone(model.backbone, model.layers, model.weights)
    if config.training.device not in ("auto", "cpu"):
        from anomaly_detection.trainer import choose_device

        choose_device(config.training.device)


if __name__ == "__main__":
    run(main)
