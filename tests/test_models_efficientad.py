"""EfficientAD: losses, networks, scale, a training step, teachers and their distillation."""

import copy
import math

import pytest
import torch
from builders.models import batches as in_batches
from builders.models import context, generator, random_images
from pydantic import ValidationError
from torch import nn

from anomaly_detection import models
from anomaly_detection.features.weights import BackboneError
from anomaly_detection.models.efficientad import (
    Autoencoder,
    EfficientADModel,
    EfficientADTrainer,
    hard_feature_loss,
    patch_description_network,
)
from anomaly_detection.models.efficientad import trainer as training
from anomaly_detection.models.efficientad.distillation import Distillation, at_patches
from anomaly_detection.models.efficientad.networks import resized
from anomaly_detection.models.efficientad.scale import Pixels, QuantileScale
from anomaly_detection.models.efficientad.teachers import (
    PatchTeacher,
    PyramidTeacher,
    read_teacher,
)

SPEC = models.spec("efficientad")


def batches(count, seed=0):
    return in_batches(random_images(count, seed=seed), 1)


def parameters(**changes):
    values = {"backbone": "test_resnet", "weights": "random", "precision": "float32"}
    return models.parameters("efficientad")(**values | changes)


def new_model(**options):
    torch.manual_seed(0)
    return EfficientADModel(backbone="test_resnet", weights="random", **options)


def new_trainer(model, auxiliary=None, **options):
    trainer = EfficientADTrainer(model, auxiliary, device="cpu", **options)
    trainer.train_loader, trainer.num_epochs = batches(4), 1
    return trainer


# Losses


def test_the_hard_loss_is_the_mean_from_the_quantile_on():
    """Of each image. Squared differences 1, 4, ..., 100: 0.8 is between the 8th and the 9th."""
    student = torch.arange(1.0, 11).view(1, 1, 2, 5) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    loss = hard_feature_loss(torch.zeros_like(student), student, quantile=0.8)
    assert loss.tolist() == pytest.approx([(81 + 100) / 2, 9 * (81 + 100) / 2])


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(40, 16, 16), (3, 5, 7)])
def test_the_hard_loss_equals_its_definition(quantile, shape):
    """All differences that are at least as large as the quantile (section 3.2)."""
    teacher, student = torch.randn(2, 1, *shape, generator=generator(1), dtype=torch.float64)
    differences = (teacher - student).square()
    expected = differences[differences >= differences.quantile(quantile)].mean()
    loss = hard_feature_loss(teacher, student, quantile)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


# Networks


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize(("has_padding", "side"), [(False, 56), (True, 64)])
def test_features_of_256_pixels(size, has_padding, side):
    net = patch_description_network(size, 7, has_padding).to("meta")
    assert net(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 7, side, side)


def test_each_feature_sees_33_pixels():
    net = patch_description_network("small", 2)
    images = torch.rand(1, 3, 65, 65, requires_grad=True)
    features = net(images)
    assert features.shape[2:] == (9, 9)
    (gradient,) = torch.autograd.grad(features[0, :, 3, 5].sum(), images)
    for other, start in ((2, 4 * 3), (1, 4 * 5)):  # rows, columns
        seen = gradient[0].abs().sum(dim=(0, other)).nonzero().flatten()
        assert seen.tolist() == list(range(start, start + 33))


@pytest.mark.parametrize(("side", "stride"), [(64, 4), (96, 8), (128, 8), (256, 4), (256, 8)])
def test_a_padded_network_covers_the_image(side, stride):
    net = patch_description_network("small", 2, True, stride).to("meta")
    features = net(torch.empty(1, 3, side, side, device="meta"))
    assert features.shape[2:] == (side // stride, side // stride)


def test_the_autoencoder_has_the_resolutions_of_table_8():
    autoencoder = Autoencoder(5).to("meta")
    sides = []
    for convolution in [*autoencoder.encoder, autoencoder.bottleneck]:
        convolution.register_forward_hook(lambda *args: sides.append(args[2].shape[-1]))
    for convolution in [*autoencoder.decoder, autoencoder.last[0]]:
        convolution.register_forward_pre_hook(lambda *args: sides.append(args[1][0].shape[-1]))
    features = autoencoder(torch.empty(1, 3, 256, 256, device="meta"), (56, 56))
    assert features.shape == (1, 5, 56, 56)
    assert sides == [128, 64, 32, 16, 8, 1, 3, 8, 15, 32, 63, 127, 56]


@pytest.mark.parametrize("sizes", [((3, 5), (8, 7)), ((9, 8), (4, 8)), ((1, 1), (3, 2))])
def test_matrix_products_resize_as_interpolate_does(sizes):
    before, after = sizes
    features = torch.randn(2, 3, *before)
    expected = nn.functional.interpolate(features, after, mode="bilinear")
    torch.testing.assert_close(resized(features, after), expected)


# Scale


def test_the_quantiles_become_0_and_a_tenth():
    pixels = Pixels()
    for maps in torch.arange(1001.0).flip(0)[:1000].view(10, 1, 10, 10).split(3):
        pixels.add(maps)
    rest = Pixels()
    rest.add(torch.zeros(1, 1, 1, 1))  # 0 to 1000, each once
    pixels.merge(rest)
    assert (pixels.count, pixels.is_finite) == (11, True)
    scale = QuantileScale((1, 3))
    scale.estimate(pixels)
    maps = torch.tensor([[[900.0, 995.0, 1090.0]]])
    assert scale(maps).flatten().tolist() == pytest.approx([0, 0.1, 0.2], abs=1e-6)


def test_quantiles_are_interpolated_as_usual():
    values = torch.randn(5, 1, 7, 9, generator=generator())
    pixels, scale = Pixels(), QuantileScale((7, 9))
    pixels.add(values)
    scale.estimate(pixels)
    assert scale.low.item() == pytest.approx(values.quantile(0.9).item())
    high = scale.low + scale.width
    assert high.item() == pytest.approx(values.quantile(0.995).item())


def test_equal_pixels_give_no_infinity():
    pixels, scale = Pixels(), QuantileScale((2, 2))
    pixels.add(torch.ones(3, 1, 2, 2))
    scale.estimate(pixels)
    assert scale(torch.ones(1, 2, 2)).tolist() == [[[0, 0], [0, 0]]]
    assert not scale(torch.full((1, 2, 2), 3.0)).isnan().any()


# Model


def test_maps_are_the_squared_differences_and_the_score_is_the_mean_maps_maximum():
    """A teacher of 1, a student of 3 and 2, an autoencoder of -2: differences 4 and 16."""
    model = new_model(map_sizes=[(8, 8), (8, 8)]).eval()
    teacher = model.features(model.normalisation(random_images(1)))
    assert teacher.shape == (1, model.channels, 8, 8)
    ones = torch.ones_like(teacher)
    model.teacher.register_forward_hook(lambda *_: ones)
    model.student.register_forward_hook(lambda *_: torch.cat([3 * ones, 2 * ones], dim=1))
    model.autoencoder.register_forward_hook(lambda *_: -2 * ones)
    local, whole = model.maps(random_images(1))
    assert local.unique().tolist() == [4]
    assert whole.unique().tolist() == [16]
    outputs = model(random_images(1))  # scales of 0 and 1: a tenth of each
    assert outputs["pred_score"].tolist() == [pytest.approx((0.4 + 1.6) / 2)]
    assert outputs["anomaly_map"].shape == (1, 1, 64, 64)


def test_maps_without_padding_are_continued_to_the_border():
    model = EfficientADModel("patches", channels=3)
    maps = torch.arange(16.0).view(1, 4, 4)
    reached = model._to_the_border(maps, torch.empty(1, 3, 48, 48))
    assert reached.shape == (1, 12, 12)
    assert torch.equal(reached[:, 4:8, 4:8], maps)
    assert reached[0, 0].tolist() == [0] * 4 + [0, 1, 2, 3] + [3] * 4


def test_fewer_channels_are_an_orthonormal_projection():
    teacher = new_model(channels=5).teacher
    matrix = teacher.projection[..., 0, 0]
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(5), rtol=0, atol=1e-5)
    images = torch.randn(1, 3, 64, 64)
    (features,) = teacher.pyramid(images).values()
    expected = torch.einsum("dc,nchw->ndhw", matrix, features)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-5, atol=1e-4)


def test_more_channels_than_there_are_get_refused():
    with pytest.raises(BackboneError, match=r"channels must be at most \d+, .* got 999"):
        new_model(channels=999)
    with pytest.raises(BackboneError, match=r"must be at most 40, .* got 41"):
        models.parameters("efficientad")(channels=41).check()
    models.parameters("efficientad")(channels=40).check()


def test_nothing_of_a_model_stays_behind_on_another_device():
    maps = new_model().to("meta").maps(torch.zeros(2, 3, 64, 64, device="meta"))
    assert [tuple(x.shape) for x in maps] == [(2, 8, 8), (2, 8, 8)]


# Training


@pytest.fixture
def plain(monkeypatch):
    """Known changes instead of random ones."""
    monkeypatch.setattr(training, "recoloured", lambda images: 0.9 * images)
    monkeypatch.setattr(training, "varied", lambda images: images.flip(3))


def test_a_step_equals_a_slow_formulation(plain):
    auxiliary = batches(1, seed=5)
    model = new_model(channels=6)
    model.autoencoder.dropout.p = 0
    slow = copy.deepcopy(model)
    trainer = new_trainer(model, auxiliary, learning_rate=1e-3, weight_decay=1e-2)
    batch = {"image": random_images(2)}

    trainer.on_fit_start()
    trainer.on_train_epoch_start(1)
    model.train()
    optimizer = trainer.configure_optimizers()["optimizer"]
    outputs = trainer.training_step(batch, 0)
    outputs["loss"].backward()
    optimizer.step()

    # The same from the paper's definitions, an image at a time, with Adam written out.
    images, others = batch["image"].float() / 255, auxiliary[0]["image"].float() / 255
    fitted = torch.cat([x["image"] for x in trainer.train_loader]).float() / 255
    features = slow.teacher(slow.normalisation(fitted))
    mean = features.mean(dim=(0, 2, 3))[:, None, None]
    deviation = features.std(dim=(0, 2, 3), correction=0)[:, None, None]

    def teacher(image):
        return (slow.teacher(slow.normalisation(image[None]))[0] - mean) / deviation

    def student(image):
        return slow.student(slow.normalisation(image[None]))[0]

    size = features.shape[2:]
    hard, first, second = [], [], []
    for image in images:
        differences = (teacher(image) - student(image)[:6]).square().flatten()
        hard.append(differences[differences >= differences.quantile(0.999)].mean())
        changed = 0.9 * image
        autoencoder = slow.autoencoder(slow.normalisation(changed[None]), size)[0]
        first.append((teacher(changed) - autoencoder).square().mean())
        second.append((autoencoder - student(changed)[6:]).square().mean())
    penalty = student(others[0].flip(2))[:6].square().mean()
    loss = sum(hard) / 2 + sum(first) / 2 + sum(second) / 2 + penalty
    assert outputs["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert outputs["penalty"].item() == pytest.approx(penalty.item(), rel=1e-4)

    trained = [*slow.student.parameters(), *slow.autoencoder.parameters()]
    gradients = torch.autograd.grad(loss, trained)
    after = [*model.student.parameters(), *model.autoencoder.parameters()]
    for old, gradient, new in zip(trained, gradients, after, strict=True):
        decayed = gradient + 1e-2 * old
        moved = 1e-3 * decayed / (decayed.abs() + 1e-8)  # the first step of Adam
        certain = decayed.abs() > 1e-4  # elsewhere rounding decides the sign
        assert torch.allclose(new[certain], (old - moved)[certain], atol=1e-5)
        assert not torch.equal(new, old)


def test_without_other_images_there_is_no_penalty():
    trainer = new_trainer(new_model())
    trainer.on_train_epoch_start(1)
    losses = {"loss", "student", "autoencoder", "agreement"}
    assert set(trainer.training_step({"image": random_images(1)}, 0)) == losses


def test_the_learning_rate_falls_after_95_percent_of_the_steps():
    trainer = new_trainer(new_model())
    trainer.num_epochs, trainer.num_steps = 100, 40
    trainer._set_up()
    rates = []
    for _ in range(40):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert rates == pytest.approx([1e-4] * 38 + [1e-5] * 2)


def test_a_change_of_colour_is_one_of_three():
    """Brightness scales, contrast moves about the grey mean, saturation leaves grey as it is."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 8) * 0.5 + 0.2
    grey = image.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    kinds = set()
    for _ in range(50):
        state = torch.get_rng_state()
        changed = training.recoloured(image)
        torch.set_rng_state(state)
        of_grey = training.recoloured(grey)
        ratio = changed / image
        if torch.allclose(ratio, ratio.mean(), atol=1e-4):
            kinds.add("brightness")
            assert 0.8 <= ratio.mean() <= 1.2
        elif torch.allclose(of_grey, grey, atol=1e-3):
            kinds.add("saturation")
        else:
            kinds.add("contrast")
    assert kinds == {"brightness", "contrast", "saturation"}


def test_the_order_of_other_images_depends_on_the_epoch_alone():
    taken = [next(training.endless(batches(3), epoch))["image"] for epoch in (1, 1)]
    assert torch.equal(*taken)


def test_a_fit_takes_the_steps_it_is_given(tmp_path):
    told = parameters(num_steps=7)
    images = context(batches(3), batches(2, seed=1), tmp_path, auxiliary=batches(2, seed=2))
    result = SPEC.fit(SPEC.build(told), told, images)
    assert [row["epoch"] for row in result.history] == [1, 2, 3]  # 3 + 3 + 1 steps


# Teachers from files


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("layout", ["numbers", "names", "model", "checkpoint"])
def test_public_layouts_are_read(size, layout, tmp_path):
    teacher = PatchTeacher(size, 12)
    tensors = list(teacher.net.state_dict().values())
    names = [f"conv{i + 1}.{x}" for i in range(len(tensors) // 2) for x in ("weight", "bias")]
    named = dict(zip(names, tensors, strict=True))
    content = {
        "numbers": teacher.net.state_dict(),
        "names": named,
        "model": {f"teacher.{key}": x for key, x in named.items()} | {"student.x": torch.ones(1)},
        "checkpoint": {"state_dict": {f"model.teacher.{key}": x for key, x in named.items()}},
    }[layout]
    torch.save(content, tmp_path / "teacher.pth")
    read = read_teacher(tmp_path / "teacher.pth")
    assert (read.size, read.channels) == (size, 12)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(read(images), teacher(images))


def test_a_model_with_a_teacher_from_a_file_has_its_weights(tmp_path):
    teacher = PatchTeacher("small", 12)
    torch.save(teacher.net.state_dict(), tmp_path / "teacher.pth")
    told = parameters(teacher=str(tmp_path / "teacher.pth"))
    told.check()
    assert told.files() == [tmp_path / "teacher.pth"]
    model = SPEC.build(told)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.teacher(images), teacher(images))
    assert model.hyperparameters["teacher"] == "patches"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": torch.ones(2, 3)}, "got 1 tensors: 2 x 3"),
        ({}, "got 0 tensors: none"),
        ({f"{i}.x": torch.ones(2) for i in range(8)}, r"got 8 tensors: 2, 2, 2, 2, \.\.\."),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(BackboneError, match=f"must be the state dict of a patch .*{message}"):
        read_teacher(tmp_path / "other.pth")


def test_no_file_and_no_state_dict_are_refused(tmp_path):
    with pytest.raises(BackboneError, match="features, distilled or a file, got 'featuers'"):
        parameters(teacher="featuers").check()
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(BackboneError, match="must be a PyTorch state dict, but cannot be loaded"):
        read_teacher(tmp_path / "text.pth")


@pytest.mark.parametrize(
    "values", [{"num_epochs": 3}, {"layers": ["a", "b"]}, {"size": "large"}, {"channels": 0}]
)
def test_bad_parameters_are_refused(values):
    with pytest.raises(ValidationError):
        parameters(**values)


def test_one_pixel_in_a_thousand_is_hard():
    """For 384 x 56 x 56 differences, the paper's, as many as its quantile leaves."""
    total = 384 * 56 * 56
    differences = torch.zeros(1, 384, 56, 56)
    count = total - math.ceil(0.999 * (total - 1))
    differences.view(-1)[:count] = 2.0
    assert hard_feature_loss(torch.zeros_like(differences), differences).item() == 4


# Distillation


def test_features_are_compared_where_both_describe_the_same_patch():
    """Of 128 pixels, 24 x 24 positions without padding are the inner ones of 32 x 32."""
    fine = torch.arange(32.0 * 32).view(1, 1, 32, 32)
    cut = at_patches(fine, torch.empty(1, 3, 128, 128), torch.empty(1, 1, 24, 24))
    assert torch.equal(cut, fine[:, :, 4:28, 4:28])


def test_nothing_of_a_distillation_stays_behind_on_another_device():
    pyramid = PyramidTeacher("test_resnet", None, "random", (8,), 4)
    model = Distillation(pyramid, "small").to("meta")
    assert model.differences(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 4, 8, 8)


def smooth(count, seed):
    coarse = torch.rand(count, 1, 3, 5, 5, generator=generator(seed)) * 255
    return [{"image": nn.functional.interpolate(x, size=48, mode="bicubic").byte()} for x in coarse]


def test_a_distilled_teacher_comes_closer_to_the_backbone_and_is_the_fits(tmp_path):
    told = parameters(teacher="distilled", channels=4, distillation_steps=60, num_steps=2)
    torch.manual_seed(0)
    images = context(smooth(6, 0), smooth(3, 1), tmp_path, auxiliary=smooth(2, 2))
    images = SPEC.prepared(told, images)
    (newest,) = (tmp_path / "pretraining").glob("epoch_*.pth")
    losses = [row["val_loss"] for row in torch.load(newest, weights_only=True)["state"]["history"]]
    assert min(losses) < 0.8 * losses[0]

    model = SPEC.build(told)
    SPEC.fit(model, told, images)
    new = torch.rand(1, 3, 48, 48)
    teacher = PatchTeacher("small", 4)
    teacher.net.load_state_dict(images.pretrained)
    assert torch.equal(model.teacher(new), teacher(new))
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert model.eval()(random_images(1, 48))["pred_score"].isfinite().all()


def test_only_a_distilled_teacher_is_pretrained_and_by_its_own_parameters():
    told = models.parameters("efficientad")
    assert told().pretraining() == {}
    distilled = told(teacher="distilled").pretraining()
    assert distilled["distillation_steps"] == 3000
    assert told(teacher="distilled", num_steps=5).pretraining() == distilled
    assert told(teacher="distilled", distillation_steps=5).pretraining() != distilled
