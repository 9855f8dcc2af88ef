"""PatchCore: patches, the sample of them, the coreset, distances, the bank."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from builders.models import batches, build, context, generator, random_images
from pydantic import ValidationError
from scipy.stats import chisquare
from sklearn.neighbors import NearestNeighbors
from torch import nn

from anomaly_detection.models import spec
from anomaly_detection.models.files import InPrecision
from anomaly_detection.models.maps import resize_maps
from anomaly_detection.models.patchcore import (
    PatchCoreModel,
    Reservoir,
    coreset,
    far_apart,
    farthest_points,
    first_round,
    image_names,
    join_levels,
    nearest_distances,
    project,
)
from anomaly_detection.models.patchcore.config import Parameters
from anomaly_detection.models.patchcore.model import CHUNK_SIZE
from anomaly_detection.models.patchcore.spec import NUM_PAIRS, differences, metric_of
from anomaly_detection.trainer import TrainingError

SPEC = spec("patchcore")
BACKBONE = "test_efficientnet"  # timm's smallest


def parameters(**changes):
    values = {"backbone": BACKBONE, "weights": "random", "bank_size": 40, "max_patches": 150}
    return Parameters(**values | changes)


def fit(loader, **changes):
    """A fitted model; 64 patches come from each image of 64 x 64."""
    told = parameters(**changes)
    model = build("patchcore", told)
    SPEC.fit(model, told, context(loader, validation=[]))
    return model


@pytest.fixture(scope="module")
def images():
    return random_images(6)


@pytest.fixture(scope="module")
def fitted(images):
    return fit(batches(images))


@pytest.fixture(scope="module")
def of_all(images):
    """A model whose bank has room for all patches."""
    return fit(batches(images), bank_size=1000, max_patches=1000)


def patches_of(model, images):
    with torch.no_grad():
        return model.extract(images).permute(0, 2, 3, 1).flatten(0, 2)


# Features of patches


def test_levels_are_pooled_then_enlarged_to_the_finest_and_joined_by_channel():
    """A patch is half itself, half the mean over those of its neighbours that are in the image."""
    level = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    # Means 3, 3.5, 4 and so on of 4 neighbours in corners, 6 at edges.
    expected = [[2.0, 2.75, 3.5], [4.25, 5.0, 5.75], [6.5, 7.25, 8.0]]
    assert join_levels({"a": level})[0, 0].tolist() == expected
    # The coarse one pooled: 0, 2, 9; twice as wide without aligned corners: 0 .5 1.5 3.75 7.25 9.
    fine = torch.full((1, 2, 1, 6), 7.0)
    coarse = torch.tensor([0.0, 0.0, 12.0]).view(1, 1, 1, 3)
    joined = join_levels({"fine": fine, "coarse": coarse})
    assert joined[0, :2].unique().tolist() == [7.0]
    assert joined[0, 2, 0].tolist() == pytest.approx([0.0, 0.5, 1.5, 3.75, 7.25, 9.0])


def test_features_of_16_bits_are_joined_in_float32():
    assert join_levels({"a": torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)}).dtype == torch.float32


def test_default_levels_are_those_at_strides_8_and_16(fitted):
    assert fitted.teacher_model.layers == ["blocks.2", "blocks.3"]
    assert fitted.extract(random_images(2)).shape == (2, 32 + 48, 8, 8)


# The sample


def filled(capacity, rows, sizes, chance=None):
    reservoir = Reservoir(capacity, chance or generator())
    for batch in rows.split(sizes):
        reservoir.add(batch)
    return reservoir


def test_all_sets_of_rows_are_equally_likely_to_be_kept_and_in_random_order():
    sets, firsts, chance = Counter(), Counter(), generator()
    for _ in range(1500):
        rows = filled(2, torch.arange(6.0)[:, None], [1, 3, 2], chance).sample()[:, 0].tolist()
        sets[tuple(sorted(rows))] += 1
        firsts[filled(4, torch.arange(4.0)[:, None], [1, 3], chance).sample()[0].item()] += 1
    assert set(sets) == set(combinations(map(float, range(6)), 2))
    assert set(firsts) == set(map(float, range(4)))
    for draws in (sets, firsts):
        assert chisquare(list(draws.values())).pvalue > 0.01


def test_fewer_rows_than_there_is_room_for_are_all_kept():
    rows = torch.arange(10.0).view(5, 2)
    assert sorted(filled(8, rows, 2).sample().tolist()) == rows.tolist()


def test_memory_of_the_sample_does_not_grow_with_the_number_of_rows():
    reservoir = filled(10, torch.ones(5000, 4), 50)
    assert reservoir.rows.untyped_storage().nbytes() == 10 * 4 * 4
    assert reservoir.keys.untyped_storage().nbytes() == 10 * 8
    assert reservoir.sample().shape == (10, 4)


def test_kept_rows_are_copies():
    batch = torch.zeros(3, 1)
    reservoir = filled(3, batch, 3)
    batch += 1
    assert reservoir.sample().tolist() == [[0], [0], [0]]


# The coreset


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # From 0 the farthest is 10; then 4 is 4 away from 0, then 7 is 3 from 10, then 1 from 0.
        ([[0], [1], [10], [4], [7]], [0, 2, 3, 4, 1]),
        # |(5, 5)| = 7.07 is more than |(7, 0)|, whose sum of coordinates would be less.
        ([[0, 0], [5, 5], [7, 0]], [0, 1]),
        # And less than |(0, 8)|, whose largest coordinate decides.
        ([[0, 0], [5, 5], [7, 0], [0, 8]], [0, 3]),
    ],
    ids=["line", "sum", "largest"],
)
def test_each_chosen_point_is_the_farthest_from_those_before(points, expected):
    assert farthest_points(torch.tensor(points).float(), len(expected)).tolist() == expected


def test_a_common_offset_does_not_change_the_coreset():
    points = torch.randint(0, 1000, (200, 3), generator=generator()).float()
    assert torch.equal(farthest_points(points, 50), farthest_points(points + 2.0**20, 50))


def test_no_point_is_chosen_twice_also_among_equal_ones():
    chosen = farthest_points(torch.tensor([[1.0], [1.0], [1.0], [5.0]]), 4).tolist()
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


def plain_expansion(patches, bank):
    squares = patches.square().sum(1)[:, None] - 2 * patches @ bank.T + bank.square().sum(1)
    return squares.clamp(min=0).sqrt().amin(dim=1)


def assert_exact(patches, bank):
    """Distances are those of brute force in float64 by scikit-learn, which are returned."""
    neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank.double().numpy())
    index = neighbours.kneighbors(patches.double().numpy(), return_distance=False)[:, 0]
    truth = torch.linalg.vector_norm(patches.double() - bank.double()[index], dim=1)
    torch.testing.assert_close(nearest_distances(patches, bank).double(), truth, rtol=1e-6, atol=0)
    return truth


def test_distance_is_that_from_the_nearest_patch_of_the_bank():
    bank = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    patches = torch.tensor([[0.0, 1.0], [3.0, 4.0], [6.0, 8.0], [-3.0, -4.0]])
    assert nearest_distances(patches, bank).tolist() == [1.0, 0.0, 5.0, 5.0]
    assert nearest_distances(bank[1:], bank[:1]).tolist() == [5.0]  # a bank of a single patch


@pytest.mark.parametrize("size", [2, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 500])
def test_distances_are_those_of_brute_force_whatever_the_number_of_chunks(size):
    assert_exact(*torch.randn(300 + size, 20, generator=generator()).split([300, size]))


def test_small_distances_survive_where_the_plain_expansion_cancels():
    # Two groups of patches 2000 apart, so that centring does not help either; in each, pairs so
    # near each other that only exact distances tell which is the nearest.
    bank = 3 * torch.randn(25, 8, generator=generator())
    bank = torch.cat([bank + offset for offset in (-1000, -999.9, 1000, 1000.1)])
    patches = bank + 0.01 * torch.randn(100, 8, generator=generator(1))
    assert (plain_expansion(patches, bank) / assert_exact(patches, bank) - 1).abs().max() > 1


def test_the_nearest_patch_is_found_under_a_large_offset():
    # Neighbours are 1 apart, and the squared norms, 3e9, are rounded to 256.
    bank = torch.arange(100.0)[:, None] + torch.full((1, 32), 10_000.0)
    distances = nearest_distances(bank + 0.25, bank)
    assert distances.tolist() == pytest.approx([0.25 * 32**0.5] * 100)
    assert (plain_expansion(bank + 0.25, bank) - distances).abs().max() > 1


def test_distances_from_far_away_are_exact():
    bank, patches = (torch.randn(n, 8, generator=generator(n)) for n in (200, 50))
    assert_exact(1e5 * patches, bank)


# Maps and scores


def of_scale_1(size, **options):
    """A model whose maps are the distances as they are."""
    return PatchCoreModel(BACKBONE, weights="random", map_sizes=[size], **options).eval()


class Images(nn.Module):
    """Stands for a backbone whose features are the images."""

    def forward(self, images):
        return {"a": images}


def of_the_images(size, bank):
    model = of_scale_1(size)
    model.teacher_model, model.normalised, model.bank = Images(), lambda images: images, bank
    model.metric = torch.eye(bank.shape[1])
    return model


@pytest.mark.parametrize(("top_fraction", "score"), [(0.0, 5.0), (0.5, 4.5), (1.0, 3.0)])
def test_map_is_the_distance_enlarged_to_the_image_and_the_score_its_highest_values(
    monkeypatch, top_fraction, score
):
    # Distances 5 and 1 of the two patches; twice as wide without aligned corners: 5, 4, 2, 1.
    model = of_scale_1((1, 2), top_fraction=top_fraction)
    features = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)
    monkeypatch.setattr(model, "extract", lambda images: features)
    model.bank, model.metric = torch.zeros(1, 2), torch.eye(2)
    outputs = model(torch.zeros(1, 3, 1, 4, dtype=torch.uint8))
    assert outputs["anomaly_map"].tolist() == [[[pytest.approx([5.0, 4.0, 2.0, 1.0])]]]
    assert outputs["pred_score"].tolist() == pytest.approx([score])


def test_each_distance_stands_where_its_patch_is():
    model = of_the_images((7, 9), torch.zeros(1, 3))
    images = torch.zeros(2, 3, 7, 9)
    images[1, 0, 1, 5] = 0.9  # half of which the pooling spreads over 3 x 3 positions
    maps = model(images)["anomaly_map"]
    assert maps.shape == (2, 1, 7, 9)
    assert maps[0].max() == 0
    expected = torch.zeros(7, 9)
    expected[0, 4:7] = 0.075  # of only 2 x 3 neighbours
    expected[1:3, 4:7] = 0.05
    expected[1, 5] += 0.45
    torch.testing.assert_close(maps[1, 0], expected)


def test_distances_are_standardised_by_those_from_the_patches_of_other_images(fitted, images):
    (scale,) = fitted.scales
    assert scale.mean.shape == (8, 8)
    with torch.inference_mode():
        (distances,) = fitted.maps(images)
        expected = resize_maps(((distances - scale.mean) / scale.deviation)[:, None], (64, 64))
        torch.testing.assert_close(fitted(images)["anomaly_map"], expected)
        (held_out,) = fitted.held_out_maps({"image": images}, torch.device("cpu"))
    assert scale.mean.mean().item() == pytest.approx(held_out.mean().item(), rel=1e-4)
    assert distances.mean() < 0.95 * held_out.mean()
    patches = patches_of(fitted, images).unflatten(0, (6, 64)) @ fitted.metric
    for name, own, found in zip(image_names({"image": images}), patches, held_out, strict=True):
        others = fitted.bank[[owner != name for owner in fitted.owners]]
        assert len(others) < len(fitted.bank)
        torch.testing.assert_close(found.flatten(), nearest_distances(own, others))


def test_tiles_of_an_image_share_its_name():
    tiles = {"image": random_images(3), "sha256": ["a", "b", "a"]}
    assert image_names(tiles) == ["a", "b", "a"]
    one, two = (image_names({"image": random_images(2, seed=seed)}) for seed in (0, 1))
    assert len({*one, *two}) == 4
    assert image_names({"image": random_images(2)}) == one


def test_a_bank_of_one_image_keeps_its_own_patches_to_scale_with():
    assert fit(batches(random_images(1)))(random_images(2))["pred_score"].isfinite().all()


# The metric


def test_the_metric_makes_differences_of_normal_patches_alike_in_all_directions():
    # Variances 16 and 0, mean 8; with as much added, 24 and 8: deviations 4.9 and 2.8.
    pairs = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])
    metric = metric_of(pairs)
    scale = 16**0.5  # so that the mean squared difference, 16, would be kept if all were alike
    expected = torch.tensor([[scale / 24**0.5, 0.0], [0.0, scale / 8**0.5]])
    torch.testing.assert_close(metric, expected)
    turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    for point in torch.randn(5, 2, generator=generator()):
        expected = torch.linalg.vector_norm(point @ metric)
        found = torch.linalg.vector_norm(point @ turned @ metric_of(pairs @ turned))
        torch.testing.assert_close(found, expected)


def test_pairs_are_patches_and_their_nearest_ones_of_other_images():
    patches, owners = torch.tensor([[0.0], [5.0], [6.0]]), torch.tensor([0, 0, 1])
    bank, bank_owners = torch.tensor([[0.5], [4.0], [9.0]]), torch.tensor([0, 1, 1])
    found = differences(patches, owners, bank, bank_owners)
    assert found.flatten().tolist() == [-4.0, 1.0, 5.5]
    assert differences(patches[:2], owners[:2], bank[:1], bank_owners[:1]).tolist() == [[0], [0]]


def test_a_metric_of_equal_images_is_finite():
    assert metric_of(torch.zeros(3, 4)).isfinite().all()


def test_a_bank_of_several_chunks_is_exported_for_any_batch():
    model = of_scale_1((8, 8), bank_shape=(CHUNK_SIZE + 9, 80))
    model.bank.normal_(generator=generator())
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (random_images(2),), dynamic_shapes=dynamic).module()
    for count in (1, 5):
        images = random_images(count, seed=3)
        torch.testing.assert_close(exported(images), model(images))


def test_the_search_stays_in_float32_under_autocast():
    bank = torch.linspace(0, 1, 400)[:, None].expand(-1, 3).contiguous()
    outputs = InPrecision(of_the_images((1, 1), bank), torch.bfloat16)(bank[:, :, None, None])
    assert outputs["pred_score"].tolist() == [0.0] * 400


# The fit


def test_a_large_bank_has_every_patch_of_every_image(of_all, images):
    """So that known images have no distance, and others have."""
    expected = torch.cat([patches_of(of_all, batch["image"]) for batch in batches(images)])
    assert of_all.bank.shape == (6 * 64, 80)
    expected = sorted((expected @ of_all.metric).tolist())
    torch.testing.assert_close(
        torch.tensor(sorted(of_all.bank.tolist())), torch.tensor(expected), rtol=1e-3, atol=1e-3
    )
    others = random_images(2, seed=1)
    assert of_all.maps(images)[0].max() < 1e-4
    assert of_all.maps(others)[0].min() > 0.01
    assert of_all(images)["pred_score"].max() < of_all(others)["pred_score"].min()


def test_the_bank_has_patches_of_the_images_that_differ(fitted, images):
    assert fitted.bank.shape == (40, 80)
    assert fitted.hyperparameters["bank_shape"] == [40, 80]
    patches = patches_of(fitted, images) @ fitted.metric
    assert nearest_distances(fitted.bank, patches).max() < 1e-3
    assert torch.pdist(fitted.bank).min() > 0


def test_the_bank_covers_the_images_better_than_a_random_one():
    """Half of the images are alike, and a random bank has too few patches of the others."""
    images = torch.cat([random_images(1).repeat(20, 1, 1, 1), random_images(2, seed=1)])
    model = fit(batches(images), bank_size=120, max_patches=2000)
    patches = patches_of(model, images) @ model.metric
    drawn = patches[torch.randperm(len(patches), generator=generator())[:120]]
    covered, by_chance = (nearest_distances(patches, bank).mean() for bank in (model.bank, drawn))
    assert covered < 0.8 * by_chance


def test_another_seed_chooses_another_bank(fitted, images):
    assert not torch.equal(fit(batches(images), seed=1).bank, fitted.bank)


def test_the_first_round_keeps_one_patch_in_eight_but_as_many_as_the_bank_needs(monkeypatch):
    monkeypatch.setattr(coreset, "GROUP", 50)
    patches = torch.randn(180, 4, generator=generator())
    chosen = first_round(patches, 0, generator())
    assert (chosen // 50).bincount().tolist() == [6, 6, 6, 3]  # of groups of 50, 50, 50, 30
    assert len(first_round(patches, 100, generator())) >= 100
    assert first_round(patches, 500, generator()).tolist() == list(range(180))


def test_a_rare_patch_is_in_the_bank():
    """A uniform sample would lose it: it is one of 3,000."""
    patches = torch.randn(3000, 4, generator=generator())
    patches[1234] = 50.0
    assert 1234 in first_round(patches, 0, generator()).tolist()
    assert 1234 in far_apart(patches, 10, generator()).tolist()


def test_the_fit_keeps_no_more_than_max_patches(monkeypatch, images):
    held = []
    sample = Reservoir.sample
    monkeypatch.setattr(
        Reservoir, "sample", lambda self: held.append(len(self.keys)) or sample(self)
    )
    assert len(fit(batches(images), max_patches=50).bank) == 40
    assert held == [50, NUM_PAIRS]


def test_features_that_are_not_finite_and_no_images_are_refused(monkeypatch, images):
    with pytest.raises(TrainingError, match="at least one image, got none"):
        fit([])
    monkeypatch.setattr(
        PatchCoreModel,
        "extract",
        lambda self, images: torch.full((len(images), 4, 2, 2), torch.inf),
    )
    with pytest.raises(TrainingError, match=r"must be finite, .* float32\."):
        fit(batches(images))


def test_a_bank_larger_than_the_sample_is_refused():
    assert parameters(bank_size=150, max_patches=150).bank_size == 150
    with pytest.raises(ValidationError, match=r"must be at most patchcore\.max_patches"):
        parameters(bank_size=151, max_patches=150)
