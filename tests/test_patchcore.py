import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare
from sklearn.neighbors import NearestNeighbors
from torch import nn

from anomaly_detection.data import create_dataloader
from anomaly_detection.models import FitContext, restore, snapshot, spec
from anomaly_detection.models.files import InPrecision
from anomaly_detection.models.maps import resize_maps
from anomaly_detection.models.patchcore import (
    PatchCoreModel,
    Reservoir,
    farthest_points,
    join_levels,
    nearest_distances,
    project,
)
from anomaly_detection.models.patchcore.config import Parameters
from anomaly_detection.models.patchcore.model import CHUNK_SIZE
from anomaly_detection.trainer import TrainingError

SPEC = spec("patchcore")
BACKBONE = "test_efficientnet"  # timm's smallest


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count, size=64, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=generator(seed)).byte()


def parameters(**changes):
    values = {"backbone": BACKBONE, "weights": "random", "bank_size": 40, "max_patches": 150}
    return Parameters(**{**values, **changes})


def new_model(parameters):
    torch.manual_seed(0)  # the random weights
    model = SPEC.build(parameters)
    torch.seed()  # on which no fit may depend
    return model


def batches(images, size=4):
    return [{"image": part} for part in images.split(size)]


def context(loader):
    held_out = batches(random_images(3, seed=9))
    return FitContext(loader, held_out, Path("unused"), torch.device("cpu"))


def fit(images, loader=None, **changes):
    """A fitted model; 64 patches come from each image of 64 x 64."""
    told = parameters(**changes)
    model = new_model(told)
    SPEC.fit(model, told, context(batches(images) if loader is None else loader))
    return model


def patches_of(model, images):
    with torch.no_grad():
        return model.extract(images).permute(0, 2, 3, 1).flatten(0, 2)


def plain_expansion(patches, bank):
    squares = patches.square().sum(1)[:, None] - 2 * patches @ bank.T + bank.square().sum(1)
    return squares.clamp(min=0).sqrt().amin(dim=1)


def exact(patches, bank):
    """Brute force in float64 by scikit-learn."""
    neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank.double().numpy())
    index = neighbours.kneighbors(patches.double().numpy(), return_distance=False)[:, 0]
    return torch.linalg.vector_norm(patches.double() - bank.double()[index], dim=1)


@pytest.fixture(scope="module")
def images():
    return random_images(6)


@pytest.fixture(scope="module")
def fitted(images):
    return fit(images)


class OfFeatures(nn.Module):
    """Stands for a backbone whose features are the images."""

    def forward(self, images):
        return {"a": images}


# Features of patches


def test_a_patch_is_the_mean_over_its_neighbours_in_the_image():
    level = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    expected = [[3.0, 3.5, 4.0], [4.5, 5.0, 5.5], [6.0, 6.5, 7.0]]  # corners of 4, edges of 6
    assert join_levels({"a": level})[0, 0].tolist() == expected


def test_levels_are_pooled_then_enlarged_to_the_finest_and_joined_by_channel():
    # The coarse one pooled: 0, 2, 3; twice as wide without aligned corners: 0 .5 1.5 2.25 2.75 3.
    fine = torch.full((1, 2, 1, 6), 7.0)
    coarse = torch.tensor([0.0, 0.0, 6.0]).view(1, 1, 1, 3)
    joined = join_levels({"fine": fine, "coarse": coarse})
    assert joined[0, :2].unique().tolist() == [7.0]
    assert joined[0, 2, 0].tolist() == pytest.approx([0.0, 0.5, 1.5, 2.25, 2.75, 3.0])


def test_features_of_16_bits_are_joined_in_float32():
    assert join_levels({"a": torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)}).dtype == torch.float32


def test_default_levels_are_those_at_strides_8_and_16(fitted):
    assert fitted.teacher.layers == ["blocks.2", "blocks.3"]
    assert fitted.extract(random_images(2)).shape == (2, 32 + 48, 8, 8)


# The sample


def test_all_sets_of_rows_are_equally_likely_to_be_kept():
    draws, chance = Counter(), generator()
    for _ in range(1500):
        reservoir = Reservoir(2, chance)
        for batch in torch.arange(6.0)[:, None].split([1, 3, 2]):
            reservoir.add(batch)
        draws[tuple(sorted(reservoir.sample()[:, 0].tolist()))] += 1
    assert set(draws) == set(combinations(map(float, range(6)), 2))
    assert chisquare(list(draws.values())).pvalue > 0.01


def test_the_order_of_the_sample_is_random():
    firsts, chance = Counter(), generator()
    for _ in range(1500):
        reservoir = Reservoir(4, chance)
        for batch in torch.arange(4.0)[:, None].split([1, 3]):
            reservoir.add(batch)
        firsts[reservoir.sample()[0].item()] += 1
    assert chisquare([firsts[i] for i in range(4)]).pvalue > 0.01


def test_fewer_rows_than_there_is_room_for_are_all_kept():
    rows = torch.arange(10.0).view(5, 2)
    reservoir = Reservoir(8, generator())
    for batch in rows.split(2):
        reservoir.add(batch)
    assert sorted(reservoir.sample().tolist()) == rows.tolist()


def test_memory_does_not_grow_with_the_number_of_rows():
    reservoir = Reservoir(10, generator())
    for _ in range(100):
        reservoir.add(torch.ones(50, 4))
    assert reservoir.rows.untyped_storage().nbytes() == 10 * 4 * 4
    assert reservoir.keys.untyped_storage().nbytes() == 10 * 8
    assert reservoir.sample().shape == (10, 4)


def test_kept_rows_are_copies():
    batch = torch.zeros(3, 1)
    reservoir = Reservoir(3, generator())
    reservoir.add(batch)
    batch += 1
    assert reservoir.sample().tolist() == [[0], [0], [0]]


# The coreset


def test_each_chosen_point_is_the_farthest_from_those_before():
    # From 0 the farthest is 10; then 4 is 4 away from 0, then 7 is 3 from 10, then 1 is 1 from 0.
    points = torch.tensor([0.0, 1.0, 10.0, 4.0, 7.0])[:, None]
    assert farthest_points(points, 5).tolist() == [0, 2, 3, 4, 1]


def test_distances_of_the_coreset_are_euclidean():
    # From (0, 0): |(5, 5)| = 7.07 is more than |(7, 0)|, whose sum of coordinates would be less,
    # and less than |(0, 8)|, whose largest coordinate decides.
    points = torch.tensor([[0.0, 0.0], [5.0, 5.0], [7.0, 0.0]])
    assert farthest_points(points, 2).tolist() == [0, 1]
    assert farthest_points(torch.cat([points, torch.tensor([[0.0, 8.0]])]), 2).tolist() == [0, 3]


def test_a_common_offset_does_not_change_the_coreset():
    points = torch.randint(0, 1000, (200, 3), generator=generator()).float()
    assert torch.equal(farthest_points(points, 50), farthest_points(points + 2.0**20, 50))


def test_no_point_is_chosen_twice_also_among_equal_ones():
    points = torch.tensor([[1.0], [1.0], [1.0], [5.0]])
    chosen = farthest_points(points, 4).tolist()
    assert chosen[:2] == [0, 3]
    assert sorted(chosen) == [0, 1, 2, 3]


def test_the_coreset_covers_at_most_twice_as_badly_as_the_best_one():
    points = torch.rand(14, 2, generator=generator())
    distances = torch.cdist(points, points)

    def radius(chosen):
        return distances[chosen].amin(dim=0).max()

    best = min(radius(torch.tensor(chosen)) for chosen in combinations(range(14), 3))
    assert best <= radius(farthest_points(points, 3)) <= 2 * best


def test_projection_keeps_distances_on_average():
    points = torch.randn(200, 500, generator=generator())
    ratios = torch.pdist(project(points, generator(1))).square() / torch.pdist(points).square()
    assert project(points, generator(1)).shape == (200, 64)
    assert ratios.mean().item() == pytest.approx(1, abs=0.02)
    assert ratios.std().item() == pytest.approx((2 / 64) ** 0.5, abs=0.02)


def test_points_of_few_dimensions_are_not_projected():
    points = torch.randn(5, 64, generator=generator())
    assert project(points, generator()) is points


# Distances


def test_distance_is_that_from_the_nearest_patch_of_the_bank():
    bank = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    patches = torch.tensor([[0.0, 1.0], [3.0, 4.0], [6.0, 8.0], [-3.0, -4.0]])
    assert nearest_distances(patches, bank).tolist() == [1.0, 0.0, 5.0, 5.0]


def test_a_bank_may_have_a_single_patch():
    assert nearest_distances(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).tolist() == [5.0]


@pytest.mark.parametrize("size", [2, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 500])
def test_distances_are_those_of_brute_force_whatever_the_number_of_chunks(size):
    patches, bank = torch.randn(300 + size, 20, generator=generator()).split([300, size])
    ours = nearest_distances(patches, bank)
    torch.testing.assert_close(ours.double(), exact(patches, bank), rtol=1e-6, atol=0)


def test_small_distances_survive_where_the_plain_expansion_cancels():
    # Two groups of patches 2000 apart, so that centring does not help either.
    bank = torch.randn(50, 8, generator=generator())
    bank = torch.cat([bank - 1000, bank + 1000])
    patches = bank + 0.01 * torch.randn(100, 8, generator=generator(1))
    truth = exact(patches, bank)
    assert (plain_expansion(patches, bank) / truth - 1).abs().max() > 1
    torch.testing.assert_close(nearest_distances(patches, bank).double(), truth, rtol=1e-6, atol=0)


def test_the_nearest_patch_is_found_under_a_large_offset():
    # Neighbours are 1 apart, and the squared norms, 3e9, are rounded to 256.
    bank = torch.arange(100.0)[:, None] + torch.full((1, 32), 10_000.0)
    patches = bank + 0.25
    distances = nearest_distances(patches, bank)
    assert distances.tolist() == pytest.approx([0.25 * 32**0.5] * 100)
    assert (plain_expansion(patches, bank) - distances).abs().max() > 1


def test_distances_from_far_away_are_exact():
    bank = torch.randn(200, 8, generator=generator())
    patches = 1e5 * torch.randn(50, 8, generator=generator(1))
    ours = nearest_distances(patches, bank)
    torch.testing.assert_close(ours.double(), exact(patches, bank), rtol=1e-6, atol=0)


# Maps and scores


def new_model_of_scale_1(size, **options):
    """Its maps are the distances as they are."""
    return PatchCoreModel(BACKBONE, weights="random", map_sizes=[size], **options).eval()


@pytest.mark.parametrize(("top_fraction", "score"), [(0.0, 5.0), (0.5, 4.5), (1.0, 3.0)])
def test_map_is_the_distance_enlarged_to_the_image_and_the_score_its_highest_values(
    monkeypatch, top_fraction, score
):
    # Distances 5 and 1 of the two patches; twice as wide without aligned corners: 5, 4, 2, 1.
    model = new_model_of_scale_1((1, 2), top_fraction=top_fraction)
    features = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)
    monkeypatch.setattr(model, "extract", lambda images: features)
    model.bank = torch.zeros(1, 2)
    outputs = model(torch.zeros(1, 3, 1, 4, dtype=torch.uint8))
    assert outputs["anomaly_map"].tolist() == [[[pytest.approx([5.0, 4.0, 2.0, 1.0])]]]
    assert outputs["pred_score"].tolist() == pytest.approx([score])


def test_each_distance_stands_where_its_patch_is():
    model = new_model_of_scale_1((7, 9))
    model.teacher, model.normalisation = OfFeatures(), nn.Identity()
    model.bank = torch.zeros(1, 3)
    images = torch.zeros(2, 3, 7, 9)
    images[1, 0, 1, 5] = 0.9  # which the pooling spreads over 3 x 3 positions
    maps = model(images)["anomaly_map"]
    assert maps.shape == (2, 1, 7, 9)
    assert maps[0].max() == 0
    expected = torch.zeros(7, 9)
    expected[0, 4:7] = 0.15  # of only 2 x 3 neighbours
    expected[1:3, 4:7] = 0.1
    torch.testing.assert_close(maps[1, 0], expected)


def test_distances_are_standardised_by_held_out_images(fitted):
    new = random_images(2, seed=1)
    (scale,) = fitted.scales
    assert scale.mean.shape == (8, 8)
    with torch.inference_mode():
        (distances,) = fitted.maps(new)
        expected = resize_maps(((distances - scale.mean) / scale.deviation)[:, None], (64, 64))
        torch.testing.assert_close(fitted(new)["anomaly_map"], expected)
        (held_out,) = fitted.maps(random_images(3, seed=9))
        (seen,) = fitted.maps(random_images(6))
    assert scale.mean.mean().item() == pytest.approx(held_out.mean().item(), rel=0.01)
    assert seen.mean() < 0.95 * scale.mean.mean()


def test_outputs_have_the_sizes_of_the_contract(fitted):
    outputs = fitted(random_images(3))
    assert set(outputs) == {"pred_score", "anomaly_map"}
    assert outputs["pred_score"].shape == (3,)
    assert outputs["anomaly_map"].shape == (3, 1, 64, 64)


def test_images_of_another_size_are_refused(fitted):
    with pytest.raises(ValueError, match=r"\(N, 3, 64, 64\) .* got \(1, 3, 63, 63\)"):
        fitted(random_images(1, size=63))  # whose maps have the right size


def test_outputs_do_not_depend_on_the_batch(fitted):
    images = random_images(5, seed=1)
    together = fitted(images)
    for i, image in enumerate(images):
        alone = fitted(image[None])
        for key in together:
            torch.testing.assert_close(alone[key][0], together[key][i], rtol=1e-4, atol=1e-4)


def test_training_mode_leaves_the_backbone_in_eval_mode_and_the_outputs_as_they_are(images):
    model = fit(images)
    expected = model.eval()(images)
    for key, values in model.train()(images).items():
        assert torch.equal(values, expected[key])
    assert not any(module.training for module in model.teacher.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_is_not_fitted_refuses_to_score(images):
    with pytest.raises(TrainingError, match="must be fitted before"):
        new_model(parameters()).eval()(images)


def test_export_gives_the_same_outputs_for_any_batch(fitted):
    torch.manual_seed(0)
    model = new_model_of_scale_1((8, 8), bank_shape=(CHUNK_SIZE + 9, 80))
    model.bank.normal_(generator=generator())
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (random_images(2),), dynamic_shapes=dynamic).module()
    for count in (1, 5):
        images = random_images(count, seed=3)
        torch.testing.assert_close(exported(images), model(images))


# The fit


def test_a_large_bank_has_every_patch_of_every_image(images):
    model = fit(images, bank_size=1000, max_patches=1000)
    expected = torch.cat([patches_of(model, batch["image"]) for batch in batches(images)])
    assert model.bank.shape == (6 * 64, 80)
    assert sorted(model.bank.tolist()) == sorted(expected.tolist())


def test_images_of_the_bank_have_no_distance_and_others_have(images):
    model = fit(images, bank_size=1000, max_patches=1000)
    assert model.maps(images)[0].max() < 1e-4
    assert model.maps(random_images(2, seed=1))[0].min() > 0.01
    known, unknown = (model(x)["pred_score"] for x in (images, random_images(2, seed=1)))
    assert known.max() < unknown.min()


def test_the_bank_has_patches_of_the_images_that_differ(fitted, images):
    assert fitted.bank.shape == (40, 80)
    assert nearest_distances(fitted.bank, patches_of(fitted, images)).max() < 1e-4
    assert torch.pdist(fitted.bank).min() > 0


def test_the_bank_covers_the_images_better_than_a_random_one(fitted, images):
    drawn = fit(images, bank_size=40, max_patches=40)
    patches = patches_of(fitted, images)
    covered = [nearest_distances(patches, model.bank).max() for model in (fitted, drawn)]
    assert covered[0] < covered[1]


def test_the_fit_is_one_pass_in_the_order_of_the_first_epoch(images):
    class Loader(list):
        epochs, passes = (), 0

        @property
        def sampler(self):
            return self

        def set_epoch(self, epoch):
            self.epochs += (epoch,)

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    loader = Loader(batches(images))
    fit(images, loader)
    assert (loader.epochs, loader.passes) == ((1,), 1)


def test_the_fit_keeps_no_more_than_max_patches(monkeypatch, images):
    held = []
    monkeypatch.setattr(
        Reservoir, "sample", lambda self: held.append(self.rows.shape) or self.rows.clone()
    )
    fit(images, bank_size=40, max_patches=50)
    assert held == [(50, 80)]


def saved(path, model):
    torch.save(snapshot("patchcore", model), path)
    return path.read_bytes()


def test_the_same_parameters_and_images_give_the_same_bytes(tmp_path, images):
    data = [{"image": image} for image in images]
    loaders = [create_dataloader(data, 2, shuffle=True, seed=0) for _ in range(2)]
    list(loaders[1])  # as if a fit had been killed, with the loader in another epoch
    one, other = (saved(tmp_path / "a.pt", fit(images, loader)) for loader in loaders)
    assert one == other


def test_a_second_fit_of_the_same_model_starts_anew(images):
    told, model = parameters(), fit(random_images(4, seed=1))
    SPEC.fit(model, told, context(batches(images)))
    for name, value in fit(images).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_another_seed_chooses_another_bank(fitted, images):
    assert not torch.equal(fit(images, seed=1).bank, fitted.bank)


def test_the_global_generators_are_left_alone(images):
    told = parameters()
    model = new_model(told)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    SPEC.fit(model, told, context(batches(images)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]  # noqa: NPY002


def test_the_fit_computes_in_the_precision_that_it_tells_and_the_bank_is_float32(fitted, images):
    for precision in ("float32", "bfloat16"):
        told = parameters(precision=precision)
        model = new_model(told)
        assert SPEC.fit(model, told, context(batches(images))).precision == precision
        assert model.bank.dtype == torch.float32
        assert torch.equal(model.bank, fitted.bank) == (precision == "float32")


def test_default_precision_does_not_depend_on_the_hardware():
    assert Parameters().precision == "float32"


def test_the_search_stays_in_float32_under_autocast():
    model = new_model_of_scale_1((1, 1))
    model.teacher, model.normalisation = OfFeatures(), nn.Identity()
    model.bank = torch.linspace(0, 1, 400)[:, None].expand(-1, 3).contiguous()
    outputs = InPrecision(model, torch.bfloat16)(model.bank[:, :, None, None])
    assert outputs["pred_score"].tolist() == [0.0] * 400


def test_features_that_are_not_finite_are_refused(monkeypatch, images):
    monkeypatch.setattr(
        PatchCoreModel, "extract", lambda self, images: torch.full((1, 4, 2, 2), torch.inf)
    )
    with pytest.raises(TrainingError, match=r"must be finite, .* float32\."):
        fit(images)


def test_a_fit_without_images_is_refused(images):
    with pytest.raises(TrainingError, match="at least one image, got none"):
        fit(images, [])


def test_a_fit_without_validation_images_is_refused(images):
    told = parameters()
    nothing = FitContext(batches(images), [], Path("unused"), torch.device("cpu"))
    with pytest.raises(TrainingError, match="there must be some, got 0 images"):
        SPEC.fit(new_model(told), told, nothing)


# Files


def test_a_restored_model_gives_the_same_outputs(tmp_path, fitted, images):
    saved(tmp_path / "a.pt", fitted)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["hyperparameters"]["bank_shape"] == [40, 80]
    assert content["hyperparameters"]["map_sizes"] == [[8, 8]]
    assert content["hyperparameters"]["weights"] == "random"
    restored = restore(content)
    assert torch.equal(restored.bank, fitted.bank)
    torch.testing.assert_close(restored(images), fitted(images), rtol=1e-3, atol=1e-3)


def test_simplify_leaves_no_batch_norm_and_the_same_scores(fitted, images):
    model = fit(images)
    model.simplify()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(images), fitted(images), rtol=1e-3, atol=1e-3)


# Refusals


def test_a_bank_larger_than_the_sample_is_refused():
    assert parameters(bank_size=150, max_patches=150).bank_size == 150
    with pytest.raises(ValidationError, match=r"must be at most patchcore\.max_patches"):
        parameters(bank_size=151, max_patches=150)


def test_a_top_fraction_outside_of_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"top_fraction must be in \[0, 1\], got 2"):
        PatchCoreModel(BACKBONE, weights="random", top_fraction=2)


def test_bank_size_and_sample_stand_in_the_models_own_section():
    sections = parameters().by_section("patchcore")
    assert sections["patchcore"] == {"max_patches": 150, "bank_size": 40}
    assert set(sections["training"]) == {"batch_size", "precision", "seed"}
