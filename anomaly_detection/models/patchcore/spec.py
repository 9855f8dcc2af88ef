"""PatchCore as the pipeline sees it."""

import torch
from torch import Tensor

from anomaly_detection.models.contract import FitContext, FitResult, ModelSpec
from anomaly_detection.models.maps import whitening_of
from anomaly_detection.models.patchcore.config import Parameters
from anomaly_detection.models.patchcore.coreset import Reservoir, far_apart, first_round
from anomaly_detection.models.patchcore.model import PatchCoreModel, image_names, nearest
from anomaly_detection.models.pyramid import pyramid_options
from anomaly_detection.progress import progress
from anomaly_detection.trainer import TrainingError, choose_dtype, dtype_name

NUM_PAIRS = 65536  # patches whose differences from their nearest ones give the metric
PAIR_BANK = 4096  # patches among which these are looked for
REGULARISATION = 1.0  # of the differences' mean variance, added to every variance


def build(parameters: Parameters, in_channels: int = 3) -> PatchCoreModel:
    """A backbone with its weights, and an empty bank."""
    return PatchCoreModel(**pyramid_options(parameters), in_channels=in_channels)


@torch.no_grad()
def fit(model: PatchCoreModel, parameters: Parameters, context: FitContext) -> FitResult:
    """Fill the bank from all normal images; there is no state, a killed fit starts anew.

    Patches that are far apart are chosen in two rounds: in each batch, then among the candidates
    of all. The first needs no memory that grows with the images, and a uniform sample in its place
    would lose the rare patches.

    Raises:
        TrainingError: There are no images, or features are not finite.
    """
    device, images = context.device, context.normal
    dtype = choose_dtype(parameters.precision, device)
    generator = torch.Generator().manual_seed(parameters.seed)
    candidates = Reservoir(parameters.max_patches, generator)
    sample = Reservoir(NUM_PAIRS, generator)
    least = -(-2 * parameters.bank_size // max(1, len(images)))
    names: dict[str, int] = {}
    model.to(device).eval()
    for batch in progress(images, "features", "batches"):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            patches = model.patches(batch["image"].to(device))
        owned = with_owners(
            patches, [names.setdefault(name, len(names)) for name in image_names(batch)]
        )
        sample.add(owned)
        candidates.add(owned[first_round(patches.flatten(0, 1), least, generator)])
    if not names:
        raise TrainingError("the fit must have at least one image, got none.")
    patches, owners = without_owners(candidates.sample())
    if not patches.isfinite().all():
        raise TrainingError(
            f"features must be finite, got others in {parameters.precision}; "
            "set training.precision to float32."
        )
    near = far_apart(patches, PAIR_BANK, generator)
    pairs = differences(*without_owners(sample.sample()), patches[near], owners[near])
    model.metric = metric_of(pairs).to(device)
    patches = patches @ model.metric
    chosen = far_apart(patches, parameters.bank_size, generator)
    model.bank, all_names = patches[chosen], list(names)
    model.owners = [all_names[i] for i in owners[chosen].tolist()]
    model.standardise(context.normal, device)
    return FitResult(dtype_name(dtype))


def with_owners(patches: Tensor, owners: list[int]) -> Tensor:
    """Patches (N, P, C) as rows (N x P, C + 1), the last value of which is the image's number."""
    numbers = torch.tensor(owners, dtype=patches.dtype, device=patches.device)
    return torch.cat([patches, numbers[:, None, None].expand(*patches.shape[:2], 1)], 2).flatten(
        0, 1
    )


def without_owners(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (n, C) of such rows, and the numbers of their images, (n,)."""
    return rows[:, :-1].contiguous(), rows[:, -1].long()


def differences(patches: Tensor, owners: Tensor, bank: Tensor, bank_owners: Tensor) -> Tensor:
    """Each patch (n, C) less the nearest one in a bank that is of another image: (n, C)."""
    found = []
    for owner in owners.unique().tolist():
        own, others = patches[owners == owner], bank[bank_owners != owner]
        if len(others):
            found.append(own - others[nearest(own, others)])
    return torch.cat(found) if found else torch.zeros_like(patches)


def metric_of(pairs: Tensor) -> Tensor:
    """The metric (C, C) in which differences (n, C) of normal patches are alike in all directions.

    As Mahalanobis' distance has the covariance of points, this has that of differences; what is
    added to the variances keeps directions without differences from deciding alone. It is scaled so
    that the mean squared difference stays as it is.
    """
    pairs = pairs.cpu().double()
    covariance = pairs.T @ pairs / len(pairs)
    variance = covariance.diagonal().mean()
    whitening = whitening_of(covariance, REGULARISATION * variance)
    scale = (1 + REGULARISATION) * variance.clamp(min=1e-14)
    return (whitening.T * scale.sqrt()).float()


SPEC = ModelSpec(PatchCoreModel, build, fit)
