"""The sections of params.yaml that do not depend on the model."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, ValidationInfo, field_validator

from anomaly_detection.parameters import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Precision,
    Section,
    Seed,
    Text,
)


def _category(name: str) -> str:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError("must be a folder's name of letters, digits, '_', '.', '+' and '-'")
    if name == "mean":
        raise ValueError("must not be 'mean', which stands for all of them in the summary")
    return name


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"must be a regular expression, but {error}") from None
    return text


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError("must be auto, cpu, cuda, cuda:<number> or mps")
    return name


class Data(Section):
    """Where the images are and how they become arrays."""

    root: Text
    layout: Literal["auto", "mvtec", "btad", "visa", "csv", "folder"]
    auxiliary: Text
    categories: Annotated[list[Annotated[str, AfterValidator(_category)]], Field(min_length=1)]
    crop: Annotated[list[NonNegativeInt], Field(min_length=4, max_length=4)] | None
    resize: Literal["square", "fit", "crop"]
    mask: Text | None
    tile_size: Annotated[int, Field(ge=32)] | None
    tile_overlap: Annotated[int, Field(ge=0)]
    group: Annotated[Text, AfterValidator(_pattern)] | None
    pixel_size: Positive | None
    image_size: Annotated[int, Field(ge=32, le=4096)]
    bit_depth: Annotated[int, Field(ge=9, le=16)]
    validation_fraction: Fraction
    calibration_fraction: Fraction
    test_fraction: Fraction
    seed: Seed

    @field_validator("categories")
    @classmethod
    def _unique(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("must not name a category twice")
        return names

    @field_validator("crop")
    @classmethod
    def _is_a_rectangle(cls, crop: list[int] | None) -> list[int] | None:
        if crop and not (crop[0] < crop[2] and crop[1] < crop[3]):
            raise ValueError("must be left, top, right, bottom, with left < right and top < bottom")
        return crop

    @field_validator("tile_overlap")
    @classmethod
    def _is_a_part_of_a_tile(cls, overlap: int, info: ValidationInfo) -> int:
        if overlap > (info.data.get("tile_size") or 2 * overlap) // 2:
            raise ValueError("must be at most half of data.tile_size")
        return overlap

    @field_validator("calibration_fraction")
    @classmethod
    def _leaves_images_to_fit(cls, fraction: float, info: ValidationInfo) -> float:
        if fraction + info.data.get("validation_fraction", 0) >= 1:
            raise ValueError("must be less than 1 together with data.validation_fraction")
        return fraction


class Evaluation(Section):
    """How scores become verdicts and metrics."""

    calibration: Literal["split", "cross"]
    folds: Annotated[int, Field(ge=2)]
    threshold_method: Literal["false_reject_rate", "adaptive", "quantile", "manual"]
    false_reject_rate: Fraction
    quantile: Fraction
    threshold: float
    aupro_limit: Annotated[float, Field(gt=0, le=1)]
    synthetic_images: Annotated[int, Field(ge=0)]
    batch_size: Count
    precision: Precision


ExportFormat = Literal["onnx", "openvino", "openvino_bfloat16", "openvino_int8", "openvino_resize"]


class Export(Section):
    """What the detector is exported to."""

    formats: list[ExportFormat]
    allow_changed_verdicts: Annotated[int, Field(ge=0)]

    @field_validator("formats")
    @classmethod
    def _unique(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("must not name a format twice")
        return names


class Hardware(Section):
    """What this machine has; changes re-run no stage."""

    device: Annotated[str, AfterValidator(_device)]
    num_workers: Annotated[int, Field(ge=0)]
    feature_cache: NonNegative


class Plots(Section):
    """What the plots show."""

    gallery_size: Annotated[int, Field(ge=1, le=20)]
    colormap: Literal["cividis", "inferno", "magma", "plasma", "viridis", "gray"]
