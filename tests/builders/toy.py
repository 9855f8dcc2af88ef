"""The model of docs/adding-a-model.md, as its readers would write it."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


def write_autoencoder(models: Path) -> Path:
    """Write the page's files into a folder of models; returns the model's folder."""
    files = re.findall(
        r"^`(autoencoder/\w+\.py)`\n\n```python\n(.*?)```", PAGE.read_text(), re.M | re.S
    )
    for name, code in [*files, ("autoencoder/__init__.py", "")]:
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).write_text(code)
    return models / "autoencoder"
