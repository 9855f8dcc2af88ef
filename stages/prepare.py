"""Decode, resize, split and audit one category: <data.root>/<category> -> data/prepared/<category>.

What is fitted and calibrated with is in train/ there, and what only judges the result in test/, so
that a further test image trains nothing. The audit is written to metrics/<category>/audit.json.
What `evaluation` asks for decides only whether there are images enough, so a change of it does not
prepare them again: `check` refuses what cannot be, and `evaluate` the rest.
"""

from pathlib import Path

from anomaly_detection.config import load_config
from anomaly_detection.data.audit import audit_prepared
from anomaly_detection.data.prepare import prepare_category
from stages import run, write_json


def main(category: str) -> None:
    """Prepare `category`."""
    config = load_config()
    data, evaluation = config.data, config.evaluation
    promises = evaluation.threshold_method == "false_reject_rate"
    output = Path("data/prepared") / category
    layout = prepare_category(
        Path(data.root),
        category,
        output,
        image_size=data.image_size,
        bit_depth=data.bit_depth,
        validation_fraction=data.validation_fraction,
        calibration_fraction=data.calibration_fraction,
        seed=data.seed,
        layout=data.layout,
        test_fraction=data.test_fraction,
        crop=data.crop,
        resize=data.resize,
        mask=data.mask,
        tile_size=data.tile_size,
        tile_overlap=data.tile_overlap,
        false_reject_rate=evaluation.false_reject_rate if promises else None,
        calibration=evaluation.calibration,
        group=data.group,
    )
    print(f"{category}: layout {layout}")
    audit = {"layout": layout} | audit_prepared(output)
    write_json(Path("metrics") / category / "audit.json", audit)


if __name__ == "__main__":
    run(main, note_cost=True)
