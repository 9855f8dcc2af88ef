"""Load params.yaml, and resolve each category's parameters with no `auto` left."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from anomaly_detection import models
from anomaly_detection.config import texts
from anomaly_detection.config.sections import Data, Evaluation, Export, Hardware, Plots
from anomaly_detection.errors import UserError
from anomaly_detection.parameters import AUTO, SHARED, Parameters, Section, section_of

Values = dict[str, Any]
Sections = dict[str, Values]

FIXED: dict[str, type[Section]] = {
    "data": Data,
    "evaluation": Evaluation,
    "export": Export,
    "hardware": Hardware,
    "plots": Plots,
}
NO_SECTION = "{} must be a section of keys and values, got {!r}."


class ConfigError(UserError):
    """One line for each wrong value: the key's path, the rule, the value, the nearest name."""


class Config(Section):
    """All of params.yaml.

    Attributes:
        model, training: As written, `auto` included; see `for_category`.
        overrides: Values that replace those of the sections, by category, then by section.
    """

    data: Data
    model: Values
    training: Values
    evaluation: Evaluation
    export: Export
    hardware: Hardware
    plots: Plots
    overrides: dict[str, Values]
    _own: Sections = PrivateAttr(default_factory=dict)  # models' own sections, by model name

    def for_category(self, category: str) -> tuple[str, Parameters]:
        """The name of a category's model, and its parameters.

        If `overrides.<category>` names another model, nothing in the file's `model` and `training`
        applies to it but `training.seed`, which every model has.
        """
        return self._resolved(self.overrides.get(category, {}))

    def experiment(self, model: str | None = None) -> dict[str, Any]:
        """The values by section with no `auto` left, as plain dicts, for a script of one's own.

        Args:
            model: A model's name; None for the file's. Another one than the file's has its
                defaults.

        Returns:
            The sections `model`, `training` (with `device` and `num_workers`), `data` and
            `evaluation`; and `mvtec_dir`, the folder of the categories, `checkpoint_dir` and
            `image_size`.
        """
        name, parameters = self._resolved({"model": {"name": model}} if model else {})
        sections = parameters.by_section(name)
        sections["model"] |= sections.pop(name, {})
        sections["training"] |= self.hardware.model_dump(include={"device", "num_workers"})
        return sections | {
            "data": self.data.model_dump(),
            "evaluation": self.evaluation.model_dump(),
            "mvtec_dir": self.data.root,
            "checkpoint_dir": "checkpoints",
            "image_size": self.data.image_size,
        }

    def __getitem__(self, key: str) -> Any:
        """A section or value of `experiment`."""
        return self.experiment()[key]

    def get(self, key: str, default: Any = None) -> Any:
        """A section or value of `experiment`, or a default."""
        return self.experiment().get(key, default)

    def _resolved(self, override: Values) -> tuple[str, Parameters]:
        own = {"model": self.model, "training": self.training, **self._own}
        name, sections = _applied(own, override)
        values = {key: value for entries in sections.values() for key, value in entries.items()}
        chosen = {key: value for key, value in values.items() if value != AUTO}
        return name, models.parameters(name)(**chosen)


def load_config(path: str | Path = "params.yaml") -> Config:
    """The validated configuration in a YAML 1.2 file, the version that DVC reads.

    Raises:
        ConfigError: The file cannot be read, or has unknown keys, missing keys or wrong values;
            the message has a line for each.
    """
    try:
        values = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise ConfigError(f"{path} must be a readable YAML file: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(NO_SECTION.format(path, values))
    own = {name: values.pop(name) for name in models.names() if name in values}
    faults = [
        NO_SECTION.format(name, section)
        for name, section in own.items()
        if not isinstance(section, dict)
    ]
    config, overrides = None, {}
    try:
        config = Config.model_validate(values)
        config._own, overrides = own, config.overrides
    except ValidationError as error:
        faults += texts.explain(error, _names(), lambda location: ".".join(map(str, location)))
    sections = {"model": values.get("model"), "training": values.get("training"), **own}
    if all(isinstance(section, dict) for section in sections.values()):
        faults += _faults_of_models(sections, overrides)
    if faults or config is None:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in dict.fromkeys(faults)))
    return config


def load_experiment_config(
    model: str, dataset: str, path: str | Path = "params.yaml"
) -> dict[str, Any]:
    """The parameters of one model on one data set, resolved, by section; see `Config.experiment`.

    Args:
        model: A model's name.
        dataset: `mvtec` for the categories in `data.root`; or a folder beside it.
        path: The parameters' file.

    Raises:
        ConfigError: As in `load_config`, or there is no such model.
    """
    config = load_config(path)
    if fault := _fault_of_name(model, "model"):
        raise ConfigError(fault)
    values = config.experiment(model)
    if dataset != "mvtec":
        values["mvtec_dir"] = str(Path(config.data.root).with_name(dataset))
    return values


def _applied(sections: Sections, override: Values) -> tuple[str, Sections]:
    """A model's name and the three sections that hold its values, with an override applied."""
    default = sections["model"].get("name")
    name = override.get("model", {}).get("name", default)
    if name == default:
        chosen = {"model": sections["model"], "training": sections["training"]}
    else:
        seed = {key: value for key, value in sections["training"].items() if key == "seed"}
        chosen = {"model": {}, "training": seed}
    chosen[name] = sections.get(name, {})
    applied = {key: values | override.get(key, {}) for key, values in chosen.items()}
    applied["model"] = {key: x for key, x in applied["model"].items() if key != "name"}
    return name, applied


def _faults_of_models(sections: Sections, overrides: dict[str, Values]) -> list[str]:
    """The faults in models' values: first in the file's sections, then in its overrides."""
    if fault := _fault_of_name(sections["model"].get("name"), "model.name"):
        return [fault]
    name, chosen = _applied(sections, {})
    faults = list(_faults_of(name, chosen, lambda section, key: ""))
    for other in models.names():
        if other != name and other in sections:
            faults += _faults_of(other, {other: sections[other]}, lambda section, key: "")
    if not faults:
        for category, override in overrides.items():
            faults += _faults_of_override(sections, override, f"overrides.{category}.")
    return faults


def _faults_of_override(sections: Sections, override: Values, prefix: str) -> Iterator[str]:
    allowed = [*SHARED, *models.names()]
    for section, values in override.items():
        if section not in allowed:
            yield texts.unknown(prefix + section, [prefix + name for name in allowed])
        elif not isinstance(values, dict):
            yield NO_SECTION.format(prefix + section, values)
    override = {key: values for key, values in override.items() if isinstance(values, dict)}
    name = override.get("model", {}).get("name", sections["model"]["name"])
    if fault := _fault_of_name(name, f"{prefix}model.name"):
        yield fault
        return
    _, chosen = _applied(sections, override)
    for other in override.keys() & set(models.names()) - {name}:
        yield from _faults_of(other, {other: override[other]}, lambda section, key: prefix)
    yield from _faults_of(
        name, chosen, lambda section, key: prefix if key in override.get(section, {}) else ""
    )


def _faults_of(name: str, sections: Sections, prefix: Callable[[str, str], str]) -> Iterator[str]:
    """A line for each value that a model rejects; `prefix` gives what precedes its path."""
    accepted = models.parameters(name)
    own = [key for key in accepted.model_fields if section_of(key, name) == name]
    chosen = {}
    for section, values in sections.items():
        for key, value in values.items():
            before = prefix(section, key)
            if key not in SHARED.get(section, own):
                yield texts.unknown(f"{before}{section}.{key}", _names(before))
            elif value == AUTO:
                continue
            elif key not in accepted.model_fields:
                trained = "learning_rate" in accepted.model_fields or section != "training"
                reason = f"has no {key}" if trained else "is not trained by gradients"
                yield f"{before}{section}.{key} must be auto: {name} {reason}, got {value!r}."
            else:
                chosen[key] = value

    def where(location: tuple[Any, ...]) -> str:
        section = section_of(location[0], name)
        return prefix(section, location[0]) + ".".join(map(str, (section, *location)))

    try:
        accepted(**chosen)
    except ValidationError as error:
        yield from texts.explain(error, _names(), where)


def _fault_of_name(name: Any, path: str) -> str | None:
    known = models.names()
    if name in known:
        return None
    return f"{path} must be {texts.alternatives(known)}, got {name!r}."


def _names(prefix: str = "") -> list[str]:
    """The paths of all parameters; with an override's `prefix`, those allowed in it."""
    keys = {"model": ["name", *SHARED["model"]], "training": list(SHARED["training"])}
    for name in models.names():
        fields = models.parameters(name).model_fields
        keys[name] = [key for key in fields if section_of(key, name) == name]
    if not prefix:
        keys |= {section: list(kind.model_fields) for section, kind in FIXED.items()}
        keys["overrides"] = []
    paths = [f"{section}.{key}" for section, names in keys.items() for key in names]
    return [prefix + path for path in (*keys, *paths)]
