"""dvc.lock and params.yaml, whole or cut down to one category."""

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from anomaly_detection.errors import UserError
from anomaly_detection.files import write_text

HEAD = "schema: '2.0'\nstages:\n"
ENTRY = re.compile(r"^  (?=\S)", re.MULTILINE)
STRANGE = re.compile(r"^(?!  ).+", re.MULTILINE)  # such as the mark of a conflict

Lock = dict[str, str]  # the text of each stage's entry, by the stage's name


def parse_lock(text: str) -> Lock:
    """The entries of a dvc.lock as DVC wrote them.

    They are cut out as text: parsing those of a thousand categories takes a minute, and what was
    parsed would have to be written in DVC's very bytes.

    Raises:
        UserError: The text is not as DVC writes it.
    """
    body = text.removeprefix(HEAD)
    entries = [f"  {entry}" for entry in ENTRY.split(body) if entry]
    lock = {_name(entry): entry for entry in entries}
    strange = STRANGE.search(body)
    if body == text or strange or len(lock) < len(entries):
        line = strange[0] if strange else text[:40]
        raise UserError(
            f"dvc.lock must be as DVC writes it, each stage once, got {line!r}; restore it: git "
            "checkout dvc.lock."
        )
    return lock


def lock_text(lock: Lock) -> str:
    """The text of a dvc.lock with these entries."""
    return HEAD + "".join(lock.values())


def read_lock(path: Path) -> Lock:
    """The entries of a dvc.lock, none if there is no file."""
    return parse_lock(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_lock(path: Path, lock: Lock) -> None:
    """Write a dvc.lock with these entries; none if there are none, as DVC does."""
    if lock:
        write_text(path, lock_text(lock))
    else:
        path.unlink(missing_ok=True)


def cut_lock(lock: Mapping[str, str], stages: Iterable[str]) -> Lock:
    """The entries of these stages alone."""
    return {name: lock[name] for name in stages if name in lock}


def cut_params(params: dict[str, Any], category: str) -> str:
    """The text of the parameters with one category alone: its stages read no other's."""
    overrides = params.get("overrides") or {}
    cut = params | {
        "data": params["data"] | {"categories": [category]},
        "overrides": {category: overrides[category]} if category in overrides else {},
    }
    stream = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # DVC keeps it
    yaml.dump(cut, stream)
    return stream.getvalue()


def read_yaml(path: Path) -> Any:
    """The content of a file, YAML 1.2 as DVC reads it.

    Raises:
        UserError: It is not YAML.
    """
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path.name} must be valid YAML: {reason}.") from None


def _name(entry: str) -> str:
    key = entry.split("\n", 1)[0].strip().removesuffix(":")
    return YAML(typ="safe").load(key) if key[0] in "'\"" else key
