"""Candidates for a category, and how well each detects synthetic defects.

A candidate is a model, the levels of its features, and the reduction of its maps to scores. It is
fitted on the split `fit`. Half of `validation` scales its maps, and is fitted to by models that do
so in the pipeline; the other half is compared with the same images with defects; then the halves
swap, so that no image is judged by a model or a scale that has seen it. Calibration and test images
are not used.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from anomaly_detection import models
from anomaly_detection.config import Config
from anomaly_detection.data.auxiliary import AuxiliaryDataset
from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.errors import DataError
from anomaly_detection.evaluation.synthetic import synthetic_batches
from anomaly_detection.evaluator import Batch, predict
from anomaly_detection.features.config import PyramidParameters
from anomaly_detection.features.images import judged
from anomaly_detection.features.pyramid import available_levels
from anomaly_detection.inference.pytorch import read_detector
from anomaly_detection.inference.runtimes import DetectorError
from anomaly_detection.models import FitContext, restore, snapshot
from anomaly_detection.models.fusion import ScaledMapModel
from anomaly_detection.models.maps import image_scores
from anomaly_detection.parameters import GradientParameters, Parameters
from anomaly_detection.selection import Areas, areas_by_family, family_cases, mean_areas
from anomaly_detection.trainer import choose_device, choose_dtype, dtype_name, seed_everything

STRIDES = ((8, 16), (8, 16, 32))  # a model's own levels compete with the first that are others
FRACTIONS = (0.0, 0.01, 0.1)  # and its own top_fraction with these
NUM_DEFECTS = 48  # of each family, for each half of the normal images
BATCH_SIZE = 32

Values = dict[str, Any]


class Fit(NamedTuple):
    """A model to fit.

    Attributes:
        name: The model's.
        parameters: The model's.
        override: What `overrides.<category>` in params.yaml must be for these parameters.
    """

    name: str
    parameters: Parameters
    override: Values

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of its levels, in pixels; empty if it has none of its own."""
        if not isinstance(self.parameters, PyramidParameters):
            return ()
        if self.parameters.layers is None:
            return self.parameters.strides
        levels = available_levels(self.parameters.backbone)
        return tuple(sorted(levels[layer] for layer in self.parameters.layers))

    @property
    def fractions(self) -> list[float | None]:
        """The values of `top_fraction` that compete, its own first; None if it has none."""
        own = getattr(self.parameters, "top_fraction", None)
        return [own] if own is None else list(dict.fromkeys((own, *FRACTIONS)))

    def reduced(self, fraction: float | None) -> Values:
        """The override for another `top_fraction`."""
        own = fraction == getattr(self.parameters, "top_fraction", None)
        return self.override if own else _with(self.override, top_fraction=fraction)


def fits(config: Config, category: str, names: Sequence[str]) -> list[Fit]:
    """The configured model, then the named ones, each with its own levels and with others.

    Raises:
        UserError: A parameter names what does not exist.
    """
    configured, _ = config.for_category(category)
    present = config.overrides.get(category, {})
    result = []
    for name in dict.fromkeys((configured, *names)):
        own = {section: values for section, values in present.items() if section == name}
        override = present if name == configured else {"model": {"name": name}} | own
        fit = Fit(name, _parameters(config, category, override), override)
        fit.parameters.check()
        result.append(fit)
        if layers := _other_layers(fit):
            changed = _with(override, layers=layers)
            result.append(Fit(name, _parameters(config, category, changed), changed))
    return result


def is_fitted_in_one_pass(name: str) -> bool:
    """Whether neither the model nor a part of its default is trained by gradients."""
    parameters = models.parameters(name)()
    return not any(
        issubclass(models.parameters(part), GradientParameters)
        for part in (name, *parameters.parts())
    )


class Trial:
    """The images that candidates for a category are fitted to and compared on.

    Args:
        config: Of the project.
        category: The category's name.
        prepared: The folder with its prepared images.
        folder: For the images with defects, which are drawn once.

    Raises:
        DataError: There are no prepared images, too few, or those of another size.
    """

    def __init__(self, config: Config, category: str, prepared: Path, folder: Path) -> None:
        self.config, self.category, self.prepared = config, category, prepared
        self.device = choose_device(config.hardware.device)
        if not (prepared / "train").is_dir():
            raise DataError(
                f"{prepared} must have the category's images, but is not there; "
                f"run `dvc repro prepare@{category}`."
            )
        self.fit_images = PreparedDataset(prepared, "fit")
        normal = PreparedDataset(prepared, "validation")
        self.num_normal, self.image_size = len(normal.rows), normal.image_size
        if self.image_size != config.data.image_size:
            raise DataError(
                f"{prepared} must have images of data.image_size {config.data.image_size}, got "
                f"{self.image_size}; run `dvc repro prepare@{category}`."
            )
        if self.num_normal < 4:
            raise DataError(
                f"{category} must have at least 4 validation images to choose by, got "
                f"{self.num_normal}; add normal images or raise data.validation_fraction."
            )
        self.channels = normal.channels
        self.preprocessing = normal.preprocessing(config.data.bit_depth)
        halves = [np.flatnonzero(normal.owners % 2 == i) for i in (0, 1)]  # tiles stay together
        self.halves = [Subset(normal, half.tolist()) for half in halves]
        self.defects = [
            Defects(half, normal.channels, folder / f"{i}.npy", seed=i)
            for i, half in enumerate(self.halves)
        ]

    def fitted(self, fit: Fit, validation: Dataset) -> nn.Module:
        """The model, simplified for inference."""
        parameters, spec = fit.parameters, models.spec(fit.name)
        size, seed = parameters.batch_size, parameters.seed
        data = self.config.data
        channels = self.fit_images.channels
        auxiliary = AuxiliaryDataset(data.auxiliary, data.image_size, channels)
        seed_everything(seed)
        model = spec.build(parameters, channels)
        with TemporaryDirectory() as state:
            context = FitContext(
                fit=create_dataloader(self.fit_images, size, shuffle=True, seed=seed),
                validation=create_dataloader(validation, size),
                auxiliary=create_dataloader(auxiliary, size, shuffle=True, seed=seed),
                state=Path(state),
                device=self.device,
                in_channels=channels,
                feature_cache=self.config.hardware.feature_cache,
            )
            spec.fit(model, parameters, spec.prepared(parameters, context))
        return restore(snapshot(fit.name, model), self.device)

    def known(self, fit: Fit) -> nn.Module | None:
        """The model that the pipeline has fitted to these images with these parameters, if any."""
        audit = Path("metrics") / self.category / "audit.json"
        try:
            detector = read_detector(Path("detectors") / f"{self.category}.pt")
            content = json.loads(audit.read_text())["content"]
        except (DetectorError, OSError):
            return None
        values = fit.parameters.by_section(fit.name)
        dtype = choose_dtype(fit.parameters.precision, self.device)
        values["training"]["precision"] = dtype_name(dtype)  # as the stage `train` notes it
        is_same = (
            detector["parameters"] == values
            and detector["provenance"]["data"] == content
            and detector["preprocessing"] == self.preprocessing
        )
        return restore(detector["model"], self.device) if is_same else None

    def areas(self, fit: Fit, model: nn.Module | None = None) -> list[Areas]:
        """For each of the fit's `fractions`, the AUROC of each family of defects.

        Args:
            fit: What to fit.
            model: The same, if it is fitted already.
        """
        halves = []
        for scaling, compared in ((0, 1), (1, 0)):
            if model is None or not (scaled := _scaled_parts(model)):
                model = self.fitted(fit, self.halves[scaling])
            else:
                for part in scaled:
                    part.standardise(_batches(self.halves[scaling]), self.device)
            defects = self.defects[compared]
            normal = self.scores(model, _batches(self.halves[compared]), fit.fractions)
            defective = self.scores(model, defects, fit.fractions)
            pairs = zip(normal, defective, strict=True)
            halves.append([areas_by_family(*pair, defects.families) for pair in pairs])
        return [mean_areas(pair) for pair in zip(*halves, strict=True)]

    def scores(
        self, model: nn.Module, batches: Iterable[Batch], fractions: Sequence[float | None]
    ) -> np.ndarray:
        """The scores (K, N) of N images by K reductions of their maps; None is the model's own."""
        parts = [
            torch.stack(
                [
                    outputs["pred_score"]
                    if fraction is None
                    else image_scores(
                        outputs["anomaly_map"], fraction, judged(batch["image"], self.channels)
                    )
                    for fraction in fractions
                ]
            )
            for batch, outputs in predict(model, batches, self.device)
        ]
        return torch.cat(parts, dim=1).numpy()


class Defects:
    """Batches of images with defects, drawn once and kept in a file.

    Args:
        images: Normal images of a `PreparedDataset`.
        channels: Of the images, without that of the judged part.
        path: The .npy file to write.
        seed: Draws them.
    """

    def __init__(self, images: Dataset, channels: int, path: Path, seed: int) -> None:
        cases = family_cases(images, NUM_DEFECTS, seed, channels)
        self.families = [case.kind for case in cases]
        self.positions = torch.tensor([case.position for case in cases])
        like = cases[0].image
        self.images = open_memmap(path, "w+", like.dtype, (len(cases), *like.shape))
        end = 0
        for batch in synthetic_batches(cases, seed, BATCH_SIZE):
            start, end = end, end + len(batch["image"])
            self.images[start:end] = batch["image"].numpy()

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.images), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            images = torch.from_numpy(np.array(self.images[part]))
            yield {"image": images, "position": self.positions[part]}


def _batches(images: Dataset) -> DataLoader:
    return create_dataloader(images, BATCH_SIZE)


def _scaled_parts(model: nn.Module) -> list[ScaledMapModel]:
    """The parts that scale maps, those inside others first; none if one has seen these images."""
    parts = [part for part in reversed(list(model.modules())) if isinstance(part, ScaledMapModel)]
    return [] if any(part.fits_validation for part in parts) else parts


def _other_layers(fit: Fit) -> list[str] | None:
    """Levels that the fit does not have, of its backbone; None if that has no such levels.

    None, too, for a model that takes one level only.
    """
    if not isinstance(fit.parameters, PyramidParameters) or len(fit.parameters.strides) == 1:
        return None
    wanted = next(strides for strides in STRIDES if strides != fit.strides)
    levels = available_levels(fit.parameters.backbone)
    layers = [layer for layer, stride in levels.items() if stride in wanted]
    return layers if len(layers) == len(wanted) else None


def _parameters(config: Config, category: str, override: Values) -> Parameters:
    changed = config.model_copy(update={"overrides": {category: override}})
    return changed.for_category(category)[1]


def _with(override: Values, **values: Any) -> Values:
    """An override with other values in its section `model`."""
    return override | {"model": override.get("model", {}) | values}
