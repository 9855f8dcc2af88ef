"""Typed, strict model of params.yaml. There are no defaults: every value stands in the file."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from anomaly_detection.errors import UserError


class ConfigError(UserError):
    """One line for each wrong value: the key's path, the rule, the value, the nearest name."""


class Section(BaseModel):
    """A mapping in params.yaml: unknown keys and implicit conversions are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


def _category(name: str) -> str:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError("must be a folder's name of letters, digits, '_', '.', '+' and '-'")
    if name == "mean":
        raise ValueError("must not be 'mean', which stands for all of them in the summary")
    return name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError("must be auto, cpu, cuda, cuda:<number> or mps")
    return name


class Data(Section):
    """Where the images are and how they become arrays."""

    root: Annotated[str, Field(min_length=1)]
    categories: Annotated[list[Annotated[str, AfterValidator(_category)]], Field(min_length=1)]
    image_size: Annotated[int, Field(ge=32, le=4096)]
    bit_depth: Annotated[int, Field(ge=9, le=16)]
    validation_fraction: Fraction
    calibration_fraction: Fraction
    seed: Seed

    @field_validator("categories")
    @classmethod
    def _unique(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("must not name a category twice")
        return names

    @field_validator("calibration_fraction")
    @classmethod
    def _leaves_images_to_fit(cls, fraction: float, info: ValidationInfo) -> float:
        if fraction + info.data.get("validation_fraction", 0) >= 1:
            raise ValueError("must be less than 1 together with data.validation_fraction")
        return fraction


class Model(Section):
    """What is trained."""

    name: Literal["stfpm"]
    backbone: Annotated[str, Field(min_length=1)]
    layers: Annotated[list[str], Field(min_length=1)] | None
    weights: Annotated[str, Field(min_length=1)]
    top_fraction: Annotated[float, Field(ge=0, le=1)]


class Training(Section):
    """How it is trained."""

    num_epochs: Count
    batch_size: Count
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    early_stopping_patience: Count | None
    precision: Precision
    device: Annotated[str, AfterValidator(_device)]
    accumulate_batches: Count
    gradient_checkpointing: bool
    feature_cache: Annotated[float, Field(ge=0)]
    num_workers: Annotated[int, Field(ge=0)]
    num_processes: Count
    seed: Seed

    @field_validator("num_processes")
    @classmethod
    def _divides_the_batch(cls, processes: int, info: ValidationInfo) -> int:
        if info.data.get("batch_size", processes) % processes:
            raise ValueError("must divide training.batch_size")
        return processes


class Evaluation(Section):
    """How scores become verdicts and figures."""

    threshold_method: Literal["false_reject_rate", "adaptive", "quantile", "manual"]
    false_reject_rate: Fraction
    quantile: Fraction
    threshold: float
    aupro_limit: Annotated[float, Field(gt=0, le=1)]
    synthetic_images: Annotated[int, Field(ge=0)]
    batch_size: Count
    precision: Precision


class Plots(Section):
    """What the pictures show."""

    gallery_size: Annotated[int, Field(ge=1, le=20)]
    colormap: Literal["cividis", "inferno", "magma", "plasma", "viridis", "gray"]


class Override(Section):
    """Values of one category that replace those of the sections of the same name."""

    model: dict[str, Any] = {}
    training: dict[str, Any] = {}


class Config(Section):
    """All of params.yaml."""

    data: Data
    model: Model
    training: Training
    evaluation: Evaluation
    plots: Plots
    overrides: dict[str, Override]

    def for_category(self, category: str) -> "Config":
        """The configuration of one category: this one with `overrides.<category>` applied."""
        override = self.overrides.get(category, Override())
        values = self.model_dump()
        values["model"] |= override.model
        values["training"] |= override.training
        return Config.model_validate(values)


def load_config(path: str | Path = "params.yaml") -> Config:
    """The validated configuration of a file in YAML 1.2, the dialect that DVC reads.

    Raises:
        ConfigError: The file cannot be read, or has unknown keys, missing keys or wrong values;
            the message has a line for each.
    """
    try:
        values = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise ConfigError(f"{path} must be a readable YAML file: {reason}") from None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, path)) from None
    faults = []
    for category in config.overrides:
        try:
            config.for_category(category)
        except ValidationError as error:
            faults.append(_explain(error, path, f"overrides.{category}."))
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def _explain(error: ValidationError, path: str | Path, prefix: str = "") -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        where = f"{path}: {prefix}{key}" if key else f"{path}"
        if problem["type"] == "missing":
            lines.append(f"{where} is missing.")
        elif problem["type"] == "extra_forbidden":
            nearest = prefix + _nearest_parameter(key)
            lines.append(f"{where} is not a parameter; did you mean {nearest}?")
        else:
            rule = problem["msg"].removeprefix("Value error, ")
            rule = re.sub(r"^\w+ should", "must", rule)
            rule = re.sub(r"valid dictionary.*", "section of keys and values", rule)
            lines.append(f"{where} {rule}, got {problem['input']!r}.")
    return "\n".join(dict.fromkeys(lines))


def _nearest_parameter(unknown: str) -> str:
    """The parameter's path nearest to an unknown one: the same key elsewhere, or alike letters."""
    if unknown.startswith("overrides."):
        category = unknown.rpartition(".")[0]
        names = [f"{category}.{key}" for key in Override.model_fields]
    else:
        sections = {name: field.annotation for name, field in Config.model_fields.items()}
        names = list(sections)
        for name in ("data", "model", "training", "evaluation", "plots"):
            names += [f"{name}.{key}" for key in sections[name].model_fields]
    same_key = [name for name in names if name.split(".")[-1] == unknown.split(".")[-1]]
    return (same_key or get_close_matches(unknown, names, n=1, cutoff=0))[0]
