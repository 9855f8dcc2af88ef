"""Prepare what a model's fits start from: data/prepared/<category>/train -> pretrained/<category>.

Most models need nothing of the kind; a note says so then. If interrupted, the same pretraining
resumes where it stopped.
"""

import os
from pathlib import Path

from anomaly_detection import models
from anomaly_detection.config import Config, load_config
from anomaly_detection.files import write_text
from anomaly_detection.parameters import Parameters
from stages import run


def main(category: str) -> float:
    """Prepare for the fits of `category`; returns the seconds of an attempt that it has resumed."""
    config = load_config()
    name, parameters = config.for_category(category)
    if parameters.pretraining():
        return pretrain(config, category, name, parameters)
    note = Path("pretrained") / category / "note.txt"  # DVC warns of an empty folder
    write_text(note, "This model is not pretrained.\n")
    return 0.0


def pretrain(config: Config, category: str, name: str, parameters: Parameters) -> float:
    """Run the model's own pretraining; returns what `main` does."""
    from anomaly_detection.trainer import (
        choose_device,
        resumable,
        save_atomically,
        seconds_before,
        seed_everything,
    )
    from stages.fitting import PRETRAINED, context, training_key

    device = choose_device(config.hardware.device)
    # With cross-calibration, all images but validation's calibrate: each is judged by a model that
    # has not seen it, and so must be by what that model starts from.
    splits = ["fit"] if config.evaluation.calibration == "split" else ["validation"]
    key = training_key(name, parameters, config, category, device)
    root = Path(os.environ.get("DVC_ROOT", "."))
    with resumable(f"{category}.pretrain", key, root) as state:
        seed_everything(parameters.seed)
        own = context(config, parameters, category, device, state, splits)
        content = models.spec(name).prepared(parameters, own).pretrained
        save_atomically(content, Path("pretrained") / category / PRETRAINED)
        return seconds_before(state)


if __name__ == "__main__":
    run(main, note_cost=True)
