"""What to try next, by the results in report_data/: what the report says too.

python -m tools.advice

docs/if-the-result-is-poor.md explains the rules.
"""

import json
from pathlib import Path
from typing import Any

from anomaly_detection.config import load_config
from anomaly_detection.errors import UserError
from anomaly_detection.report import advice_lines, next_steps
from stages import run
from stages.report import selections


def main() -> None:
    """Print what to try for each category, and for how many there is nothing."""
    names, chosen, without = load_config().data.categories, selections(), 0
    for name in names:
        found = list(advice_lines(name, steps_of(name, chosen.get(name))))
        without += not found
        print(*found, sep="\n", end="\n" if found else "")
    if without < len(names):
        print("docs/if-the-result-is-poor.md explains more.")
    if without:
        print(f"What next: nothing to suggest for {without} of {len(names)} categories.")


def steps_of(name: str, selection: Any) -> dict[str, list[Any]]:
    """What `next_steps` finds for a category.

    Raises:
        UserError: It has no results, or those of another version.
    """
    path = Path("report_data") / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path} must exist, but does not; run `make repro`.")
    try:
        return next_steps(json.loads(path.read_text()), selection)
    except KeyError as error:
        raise UserError(
            f"{path} must be of this version, but has no {error}; run `make repro`."
        ) from None


if __name__ == "__main__":
    run(main)
