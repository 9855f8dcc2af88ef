import pytest
import torch
from pydantic import ValidationError

from anomaly_detection import models
from anomaly_detection.data import create_dataloader
from anomaly_detection.features.weights import BackboneError
from anomaly_detection.models import FitContext, restore, snapshot
from anomaly_detection.models.ensemble import EnsembleModel
from anomaly_detection.models.ensemble.config import Parameters
from anomaly_detection.trainer import TrainingError, seed_everything

SPEC = models.spec("ensemble")
CPU = torch.device("cpu")
NUM_EPOCHS = models.parameters("stfpm")().num_epochs


def random_images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=generator).byte()


HELD_OUT = [{"image": random_images(3, seed=9)}]


def parameters(*members, **changes):
    values = {"backbone": "test_resnet", "weights": "random", "batch_size": 4}
    return Parameters(**values | {"members": list(members)} | changes)


def loader():
    data = [{"image": image} for image in random_images(6)]
    return create_dataloader(data, 4, shuffle=True)


def fit(told, state, fit_loader=None, validation=HELD_OUT):
    seed_everything(told.seed)
    model = SPEC.build(told)
    result = SPEC.fit(model, told, FitContext(fit_loader or loader(), validation, state, CPU))
    return model, result


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return fit(parameters("patchcore", "gaussian"), tmp_path_factory.mktemp("state"))[0]


# Maps and scores


def test_map_is_the_mean_of_the_members_maps_each_standardised_once_more(fitted):
    new = random_images(2, seed=1)
    with torch.inference_mode():
        members = [member(new)["anomaly_map"] for member in fitted.members.values()]
        scaled = [
            (level - scale.mean) / scale.deviation
            for level, scale in zip(members, fitted.scales, strict=True)
        ]
        outputs = fitted(new)
    assert [tuple(scale.mean.shape) for scale in fitted.scales] == [(64, 64), (64, 64)]
    torch.testing.assert_close(outputs["anomaly_map"], sum(scaled) / 2)


class Louder(torch.nn.Module):
    """A member whose map has another scale."""

    def __init__(self, member):
        super().__init__()
        self.member = member

    def forward(self, images):
        return {"anomaly_map": 1000 * self.member(images)["anomaly_map"] - 7}


def test_the_scale_of_a_members_map_changes_no_score(fitted):
    new = random_images(3, seed=1)
    first, second = fitted.members.values()
    model = EnsembleModel({"first": Louder(first), "second": second}, fitted.top_fraction)
    model.standardise(HELD_OUT, CPU)
    with torch.inference_mode():
        torch.testing.assert_close(model(new), fitted(new), rtol=1e-3, atol=1e-3)


def test_an_ensemble_that_is_not_fitted_refuses_to_score():
    with pytest.raises(TrainingError, match="must be fitted before"):
        SPEC.build(parameters("gaussian")).eval()(random_images(1))


# The fit


def test_each_member_is_the_model_that_it_is_alone(fitted, tmp_path):
    told = parameters("patchcore", "gaussian")
    for name, own in told.of_members().items():
        member = fitted.members[name]
        alone = models.spec(name).build(own)
        alone.teacher.load_state_dict(member.teacher.state_dict())  # the random weights
        models.spec(name).fit(alone, own, FitContext(loader(), HELD_OUT, tmp_path, CPU))
        for key, value in alone.state_dict().items():
            assert torch.equal(member.state_dict()[key], value), key


class Killed(BaseException):
    """Stands for a signal: nothing in the library catches it."""


class Passes(list):
    """Batches that count how often they are gone through; the given pass is interrupted."""

    count, interrupted = 0, 0

    def __iter__(self):
        self.count += 1
        yield self[0]
        if self.count == self.interrupted:
            raise Killed
        yield from self[1:]


@pytest.mark.parametrize(
    ("split", "interrupted"), [("fit", 1 + NUM_EPOCHS + 1), ("validation", NUM_EPOCHS + 3)]
)
def test_a_fit_killed_after_a_member_ends_with_the_same_bytes(tmp_path, split, interrupted):
    """In the pass for the second member, or in that for the ensemble's scales.

    The first member has been trained by then, and is not trained again.
    """
    told = parameters("stfpm", "patchcore")
    batches = [{"image": part} for part in random_images(6).split(4)]
    whole, expected = fit(told, tmp_path / "whole", batches)
    passes = {"fit": Passes(batches), "validation": Passes(HELD_OUT)}
    passes[split].interrupted = interrupted
    with pytest.raises(Killed):
        fit(told, tmp_path / "killed", passes["fit"], passes["validation"])
    again = Passes(batches)
    resumed, result = fit(told, tmp_path / "killed", again)
    assert again.count == 2  # to standardise the teacher's channels, and for the second member
    assert result == expected
    one, other = (saved(tmp_path / "model.pt", model) for model in (whole, resumed))
    assert one == other


def saved(path, model):
    torch.save(snapshot("ensemble", model), path)
    return path.read_bytes()


def test_the_history_is_that_of_the_member_that_has_one(tmp_path):
    for members in (("gaussian", "stfpm"), ("stfpm", "gaussian")):
        _, result = fit(parameters(*members), tmp_path / members[0])
        assert [path.name for path in (tmp_path / members[0]).iterdir()] == ["stfpm"]  # its state
        assert [row["epoch"] for row in result.history] == list(range(1, NUM_EPOCHS + 1))
    assert fit(parameters("gaussian"), tmp_path)[1].history == []


def test_a_file_restores_members_and_scores(tmp_path, fitted):
    saved(tmp_path / "model.pt", fitted)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content["hyperparameters"] == {
        "members": {name: model.hyperparameters for name, model in fitted.members.items()},
        "top_fraction": 0.01,
        "in_channels": 3,
        "map_sizes": [[64, 64], [64, 64]],
        "image_size": [64, 64],
    }
    restored, new = restore(content), random_images(2, seed=1)
    assert not any(isinstance(x, torch.nn.BatchNorm2d) for x in restored.modules())
    with torch.inference_mode():
        torch.testing.assert_close(restored(new), fitted(new), rtol=1e-2, atol=1e-2)


# Parameters


def test_members_get_the_shared_values_and_have_their_own_defaults():
    told = parameters("stfpm", "gaussian", top_fraction=0.2, seed=3, layers=["layer2"])
    of_members = told.of_members()
    assert list(of_members) == told.parts() == ["stfpm", "gaussian"]
    for name, own in of_members.items():
        shared = {"backbone", "weights", "batch_size", "top_fraction", "seed", "layers"}
        assert own.model_dump(include=shared) == told.model_dump(include=shared)
        rest = {"num_epochs", "hard_fraction", "shrinkage", "max_channels"}
        assert own.model_dump(include=rest) == models.parameters(name)().model_dump(include=rest)
    assert {own.precision for own in of_members.values()} == {"float32"}


def test_without_named_layers_each_member_has_its_own():
    model = SPEC.build(parameters("patchcore", "gaussian"))
    layers = [member.teacher.layers for member in model.members.values()]
    assert layers == [["layer2", "layer3"], ["layer2", "layer3", "layer4"]]


@pytest.mark.parametrize(
    "members",
    [["gaussian", "gaussian"], ["ensemble"], ["gaussian", "ensemble"], ["gaussian2"], []],
    ids=str,
)
def test_members_must_be_different_other_models_and_there_must_be_one(members):
    with pytest.raises(ValidationError, match=r"members\n  "):
        parameters(*members)


def test_a_refusal_names_the_models_that_there_are():
    with pytest.raises(ValidationError, match="different models of efficientad, gaussian, patchc"):
        parameters("gaussian2")


def test_the_check_is_that_of_the_members():
    parameters("gaussian", "patchcore").check()
    with pytest.raises(BackboneError, match="must be a timm model, got 'resnet19'"):
        parameters("gaussian", backbone="resnet19").check()
    with pytest.raises(BackboneError, match="must be levels of test_resnet, got layer9"):
        parameters("gaussian", layers=["layer9"]).check()
