import pytest
import torch
import torch.nn.functional as F

from anomaly_detection import models
from anomaly_detection.data import create_dataloader
from anomaly_detection.models import FitContext, load_model, restore, snapshot
from anomaly_detection.models.maps import image_scores
from anomaly_detection.models.stfpm import (
    AnomalyMapGenerator,
    STFPMLoss,
    STFPMModel,
    STFPMTrainer,
    feature_distance,
)

EAST = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
NORTH = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return STFPMModel("resnet18", weights="random")


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(("student", "expected"), [(5 * EAST, 0.0), (NORTH, 1.0), (-EAST, 2.0)])
def test_distance_depends_on_direction_only(student, expected):
    assert feature_distance(EAST, student).item() == pytest.approx(expected)


def test_distance_is_one_minus_cosine():
    teacher, student = torch.randn(2, 3, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    reference = 1 - F.cosine_similarity(teacher, student, dim=1)
    assert torch.allclose(feature_distance(teacher, student), reference, atol=1e-6)


def test_distance_is_float32_also_of_bfloat16_features():
    assert feature_distance(EAST.bfloat16(), NORTH.bfloat16()).dtype == torch.float32


def test_distance_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"same shape, got \(1, 2, 1, 1\) and \(1, 2, 2, 1\)"):
        feature_distance(EAST, torch.cat([EAST, EAST], dim=2))


def test_loss_is_the_sum_over_levels_of_the_mean_distance():
    # Fine level: distances 0, 1, 2, 1 (mean 1); coarse level: distance 2.
    fine_student = torch.cat([EAST, NORTH, -EAST, -NORTH], dim=3)
    teacher = {"fine": EAST.expand(1, 2, 1, 4), "coarse": EAST}
    student = {"fine": fine_student, "coarse": -EAST}
    assert STFPMLoss()(teacher, student).item() == pytest.approx(1.0 + 2.0)


def test_loss_does_not_depend_on_batch_size():
    teacher, student = torch.randn(2, 3, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    once = STFPMLoss()({"a": teacher}, {"a": student})
    twice = STFPMLoss()({"a": teacher.repeat(2, 1, 1, 1)}, {"a": student.repeat(2, 1, 1, 1)})
    assert once.item() == pytest.approx(twice.item(), abs=1e-6)


def test_map_is_the_product_of_the_levels():
    # Distances: fine 0 1 / 2 1, coarse 2, constant when enlarged.
    fine_student = torch.cat(
        [torch.cat([EAST, NORTH], dim=3), torch.cat([-EAST, -NORTH], dim=3)], dim=2
    )
    teacher = {"fine": EAST.expand(1, 2, 2, 2), "coarse": EAST}
    student = {"fine": fine_student, "coarse": -EAST}
    anomaly_map = AnomalyMapGenerator()(teacher, student, (2, 2))
    assert anomaly_map.flatten().tolist() == pytest.approx([0.0, 2.0, 4.0, 2.0])


def test_map_is_enlarged_bilinearly_to_the_image():
    # One row of distances 0 and 2, doubled without aligned corners: 0, 0.5, 1.5, 2.
    student = {"a": torch.cat([EAST, -EAST], dim=3)}
    anomaly_map = AnomalyMapGenerator()({"a": EAST.expand(1, 2, 1, 2)}, student, (1, 4))
    assert anomaly_map.flatten().tolist() == pytest.approx([0.0, 0.5, 1.5, 2.0])


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 4.0), (0.5, 3.5), (1.0, 2.5)])
def test_score_is_the_mean_of_the_highest_pixels(fraction, expected):
    assert image_scores(torch.tensor([[[[1.0, 4.0], [3.0, 2.0]]]]), fraction).item() == expected


def test_score_of_the_model_is_that_of_its_map(model, images):
    model.eval().top_fraction = 0.1
    with torch.inference_mode():
        outputs = model(images)
    assert torch.equal(outputs["pred_score"], image_scores(outputs["anomaly_map"], 0.1))


def test_top_fraction_must_be_a_share():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 2"):
        STFPMModel("resnet18", weights="random", top_fraction=2)


def test_training_mode_returns_features_of_strides_4_8_and_16(model, images):
    teacher, student = model.train()(images)
    assert list(teacher) == list(student) == ["layer1", "layer2", "layer3"]
    assert [tuple(x.shape) for x in student.values()] == [
        (4, 64, 16, 16),
        (4, 128, 8, 8),
        (4, 256, 4, 4),
    ]


def test_eval_mode_returns_scores_and_maps_of_the_images_size(model, images):
    with torch.inference_mode():
        outputs = model.eval()(images)
    assert outputs["pred_score"].shape == (4,)
    assert outputs["anomaly_map"].shape == (4, 1, 64, 64)
    assert outputs["anomaly_map"].min() >= 0
    assert torch.equal(outputs["pred_score"], outputs["anomaly_map"].amax(dim=(1, 2, 3)))


def test_teacher_stays_frozen_and_in_eval_mode(model, images):
    model.train()
    assert not any(module.training for module in model.teacher.modules())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    trainer = STFPMTrainer(model, device="cpu")
    loader = [{"image": images}]
    trainer.fit(loader, num_epochs=2)
    assert all(
        torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items()
    )


def test_every_student_parameter_is_trained(model, images):
    assert all(parameter.requires_grad for parameter in model.student.parameters())
    before = [parameter.clone() for parameter in model.student.parameters()]
    # Two steps, because ResNet's last BatchNorm of a block starts at zero.
    STFPMTrainer(model, device="cpu").fit([{"image": images}], num_epochs=2)
    after = model.student.parameters()
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_student_and_teacher_start_apart():
    torch.manual_seed(0)
    model = STFPMModel("resnet18", weights="random")
    pairs = zip(model.teacher.parameters(), model.student.parameters(), strict=True)
    assert not all(torch.equal(teacher, student) for teacher, student in pairs)


def test_scores_do_not_depend_on_the_batch(model, images):
    model.eval()
    with torch.inference_mode():
        together = model(images)["pred_score"]
        alone = torch.cat([model(image[None])["pred_score"] for image in images])
    assert torch.allclose(together, alone, rtol=1e-4)


def test_bytes_and_floats_give_the_same_scores(model, images):
    model.eval()
    with torch.inference_mode():
        assert torch.allclose(
            model(images)["pred_score"], model(images.float() / 255)["pred_score"], rtol=1e-5
        )


def test_normalisation_is_that_of_the_weights(model):
    white = model.normalisation(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(white[0, :, 0, 0], expected)


def test_a_single_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(4, 3, 8, 8), size=(64, 64), mode="bilinear")
    trainer = STFPMTrainer(STFPMModel(weights="bundled"), device="cpu")
    history = trainer.fit([{"image": images}], num_epochs=100)
    assert history[-1]["train_loss"] < 0.1 * history[0]["train_loss"]


@pytest.mark.parametrize(
    ("backbone", "weights"), [("resnet18", "random"), ("tf_efficientnet_lite0", "bundled")]
)
def test_gradient_checkpointing_changes_no_result(images, backbone, weights):
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = STFPMModel(backbone, weights=weights)
        model.set_gradient_checkpointing(enable)
        trainer = STFPMTrainer(model, device="cpu", learning_rate=0.01)
        loader = [{"image": images}]
        history = trainer.fit(loader, loader, num_epochs=2)
        results.append(([list(row.values()) for row in history], model.student.state_dict()))
    (losses, weights), (same_losses, same_weights) = results
    assert same_losses == [pytest.approx(row, rel=1e-5) for row in losses]
    for name, value in weights.items():
        assert torch.allclose(same_weights[name].double(), value.double(), atol=1e-5), name


def test_gradient_checkpointing_saves_activations(images):
    def saved_bytes(enable):
        model = STFPMModel("resnet18", weights="random")
        model.set_gradient_checkpointing(enable)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            STFPMLoss()(*model.train()(images))
        return sum(sizes)

    assert saved_bytes(True) < 0.75 * saved_bytes(False)


@pytest.mark.parametrize("layers", [None, ["layer2", "layer1"]])
def test_a_file_alone_restores_the_scores(tmp_path, images, layers):
    model = STFPMModel("resnet18", layers, weights="random", top_fraction=0.1)
    trainer = STFPMTrainer(model, device="cpu", checkpoint_dir=tmp_path, metadata={"a": 1})
    trainer.fit([{"image": images}], num_epochs=1)
    content = torch.load(tmp_path / "best_model.pth", weights_only=True)
    assert content["metadata"] == {"a": 1}
    assert content["epoch"] == 1
    rebuilt = STFPMModel(**content["hyperparameters"])
    rebuilt.load_state_dict(content["model_state_dict"])
    torch.save({"model": snapshot("stfpm", rebuilt)}, tmp_path / "model.pth")
    restored = load_model(tmp_path / "model.pth")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in restored.modules())
    assert not restored.training
    with torch.inference_mode():
        expected = model.eval()(images)
        for name, values in restored(images).items():
            torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str
)
def test_inference_in_16_bits_gives_nearly_the_same_scores_in_float32(images, dtype, tolerance):
    torch.manual_seed(0)
    model = STFPMModel("resnet18", weights="random").eval()
    with torch.inference_mode():
        expected = model(images)["pred_score"]
        outputs = restore(snapshot("stfpm", model), "cpu", dtype)(images)
    assert {values.dtype for values in outputs.values()} == {torch.float32}
    assert not torch.equal(outputs["pred_score"], expected)
    torch.testing.assert_close(outputs["pred_score"], expected, rtol=tolerance, atol=0)


def test_the_same_seed_gives_the_same_training(tmp_path):
    def losses():
        torch.manual_seed(3)
        images = torch.randint(0, 256, (6, 3, 64, 64)).byte()
        dataset = [{"image": image, "path": ""} for image in images]
        loader = create_dataloader(dataset, 2, shuffle=True, seed=5)
        trainer = STFPMTrainer(STFPMModel("resnet18", weights="random"), device="cpu")
        return trainer.fit(loader, loader, num_epochs=2)

    assert losses() == losses()


def test_parameters_reach_the_model_and_the_optimizer(tmp_path, images):
    parameters = models.parameters("stfpm")(
        backbone="resnet18",
        weights="random",
        layers=["layer1"],
        top_fraction=0.5,
        num_epochs=3,
        learning_rate=0.3,
        momentum=0.8,
        weight_decay=0.01,
        early_stopping_patience=None,
        precision="float32",
    )
    spec = models.spec("stfpm")
    model = spec.build(parameters)
    assert isinstance(model, spec.model)
    assert model.hyperparameters == {
        "backbone": "resnet18",
        "layers": ["layer1"],
        "weights": "random",
        "top_fraction": 0.5,
    }
    batches = [{"image": images}]
    result = spec.fit(
        model, parameters, FitContext(batches, batches, tmp_path, torch.device("cpu"))
    )
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    best = torch.load(tmp_path / "best_model.pth", weights_only=True)
    (group,) = best["optimizer_state_dict"]["param_groups"]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.01)
    assert (result.best_epoch, result.best_metrics) == (best["epoch"], best["best_metrics"])
    assert result.precision == "float32"
    for name, value in model.state_dict().items():
        assert torch.equal(value, best["model_state_dict"][name]), name


def test_a_fit_stops_when_its_patience_runs_out(tmp_path, images):
    parameters = models.parameters("stfpm")(
        backbone="test_resnet",
        weights="random",
        num_epochs=50,
        learning_rate=1e-9,
        early_stopping_patience=1,
    )
    spec = models.spec("stfpm")
    batches = [{"image": images}]
    context = FitContext(batches, [{"image": 0 * images}], tmp_path, torch.device("cpu"))
    result = spec.fit(spec.build(parameters), parameters, context)
    assert len(result.history) < 50
