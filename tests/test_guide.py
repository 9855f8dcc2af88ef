"""Programs as a reader of the guides would write them; docs/guide.md has the names."""

import math
import runpy
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from builders.images import write_category
from builders.projects import ROOT, in_folder
from torch import nn

from anomaly_detection.config import load_config, load_experiment_config
from anomaly_detection.data import (
    MVTecDataset,
    create_dataloader,
    get_test_transforms,
    get_train_transforms,
)
from anomaly_detection.evaluator import evaluate
from anomaly_detection.features.weights import BackboneError
from anomaly_detection.metrics import (
    compute_auroc,
    compute_auroc_per_class,
    plot_confusion_matrix,
    plot_roc_curve,
)
from anomaly_detection.models.stfpm import (
    AnomalyMapGenerator,
    STFPMLoss,
    STFPMModel,
    STFPMTrainer,
    compute_anomaly_map,
)
from anomaly_detection.trainer import BaseTrainer

LAYERS = ["layer1", "layer2", "layer3"]


class LinearTrainer(BaseTrainer):
    """The smallest trainer."""

    def training_step(self, batch, batch_idx):
        x, y = (part.to(self.device) for part in batch)
        return {"loss": self.loss_fn(self.model(x), y)}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return {"outputs": self.model(x), "targets": y}

    def configure_optimizers(self):
        return {"optimizer": torch.optim.Adam(self.model.parameters(), lr=0.01)}


def linear(trainer: type[BaseTrainer], folder, **options) -> BaseTrainer:
    torch.manual_seed(0)
    return trainer(nn.Linear(10, 1), nn.MSELoss(), "cpu", folder, **options)


def batches(count: int = 2) -> list:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 10, generator=generator)
    return [(part, part.sum(dim=1, keepdim=True)) for part in x]


def test_the_smallest_trainer_trains_and_writes_a_checkpoint_for_each_epoch(tmp_path):
    trainer = linear(LinearTrainer, tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints").is_dir()
    assert (trainer.current_epoch, trainer.best_metric) == (0, None)
    before = trainer.model.weight.detach().clone()
    trainer.fit(batches(), batches(), 3)
    assert not torch.equal(trainer.model.weight, before)
    assert trainer.current_epoch == 2
    assert isinstance(trainer.optimizer, torch.optim.Adam)
    assert trainer.scheduler is None
    names = ["best_model.pth", "epoch_0.pth", "epoch_1.pth", "epoch_2.pth"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names


class Hooked(LinearTrainer):
    """Writes down which hooks are called with what."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = []

    def on_fit_start(self):
        self.calls.append(("fit_start",))

    def on_fit_end(self):
        self.calls.append(("fit_end",))

    def on_train_epoch_start(self, epoch):
        self.calls.append(("train_epoch_start", epoch))

    def on_train_epoch_end(self, epoch, train_loss):
        assert isinstance(train_loss, float)
        self.calls.append(("train_epoch_end", epoch))

    def on_validation_epoch_start(self, epoch):
        self.calls.append(("validation_epoch_start", epoch))

    def on_validation_epoch_end(self, epoch, val_metrics):
        assert val_metrics == {}
        self.calls.append(("validation_epoch_end", epoch))

    def on_train_batch_start(self, batch, batch_idx):
        self.batch = batch
        self.calls.append(("train_batch_start", batch_idx))

    def on_train_batch_end(self, batch, batch_idx, outputs, loss):
        assert batch is self.batch
        assert loss == outputs["loss"]
        self.calls.append(("train_batch_end", batch_idx))

    def on_validation_batch_start(self, batch, batch_idx):
        self.batch = batch
        self.calls.append(("validation_batch_start", batch_idx))

    def on_validation_batch_end(self, batch, batch_idx, outputs):
        assert batch is self.batch
        assert set(outputs) == {"outputs", "targets"}
        self.calls.append(("validation_batch_end", batch_idx))


def test_hooks_are_called_in_order_with_epochs_from_0_and_the_loader_s_batches(tmp_path):
    trainer = linear(Hooked, tmp_path)
    trainer.fit(batches(1), batches(1), 2)
    of_epoch = [
        [
            ("train_epoch_start", epoch),
            ("train_batch_start", 0),
            ("train_batch_end", 0),
            ("train_epoch_end", epoch),
            ("validation_epoch_start", epoch),
            ("validation_batch_start", 0),
            ("validation_batch_end", 0),
            ("validation_epoch_end", epoch),
        ]
        for epoch in (0, 1)
    ]
    assert trainer.calls == [("fit_start",), *of_epoch[0], *of_epoch[1], ("fit_end",)]


def test_epochs_run_by_hand(tmp_path):
    trainer = linear(LinearTrainer, tmp_path)
    first, second = trainer.train_epoch(batches()), trainer.train_epoch(batches())
    assert isinstance(first, float)
    assert second < first
    assert trainer.validate_epoch(batches()) == {}


class Scored(LinearTrainer):
    """Its validation score is the next of a list; a higher one is better."""

    scores = (0.2, 0.9, 0.5)

    def compute_metrics(self, outputs):
        assert len(outputs) == 2
        return {"score": self.scores[self.current_epoch]}

    def _is_better(self, current_metrics):
        return current_metrics["score"] > self.best_metric["score"]


def test_an_overridden_is_better_chooses_the_best_model(tmp_path):
    trainer = linear(Scored, tmp_path)
    trainer.fit(batches(), batches(), 3)
    assert trainer.best_metric == {"score": 0.9}
    best = torch.load(tmp_path / "best_model.pth", weights_only=True)
    assert (best["epoch"], best["metrics"]) == (1, {"score": 0.9})
    kept = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
    assert torch.equal(best["model_state_dict"]["weight"], kept["model_state_dict"]["weight"])


def test_without_a_choice_of_its_own_the_last_model_is_the_best(tmp_path):
    linear(LinearTrainer, tmp_path).fit(batches(), batches(), 2)
    assert torch.load(tmp_path / "best_model.pth", weights_only=True)["epoch"] == 1


def test_a_checkpoint_gives_back_model_optimizer_and_metrics(tmp_path):
    trainer = linear(Scored, tmp_path)
    trainer.fit(batches(), batches(), 2)
    content = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
    assert {"epoch", "model_state_dict", "optimizer_state_dict", "metrics"} <= set(content)
    other = linear(Scored, tmp_path / "other")
    other.train_epoch(batches())  # configures the optimizer
    assert other.load_checkpoint(tmp_path / "epoch_1.pth") == {"score": 0.9}
    assert torch.equal(other.model.weight, trainer.model.weight)
    steps = [x.optimizer.state_dict()["state"][0]["step"] for x in (other, trainer)]
    assert steps[0] == steps[1] == 4
    fresh = linear(Scored, tmp_path / "fresh")
    assert fresh.load_checkpoint(tmp_path / "best_model.pth") == {"score": 0.9}


def test_a_checkpoint_is_saved_by_hand(tmp_path):
    trainer = linear(Scored, tmp_path)
    trainer.train_epoch(batches())
    trainer.save_checkpoint(7, {"score": 0.3})
    assert torch.load(tmp_path / "epoch_7.pth", weights_only=True)["metrics"] == {"score": 0.3}
    trainer.save_checkpoint(8, {"score": 0.1})
    assert torch.load(tmp_path / "best_model.pth", weights_only=True)["epoch"] == 7


@pytest.mark.parametrize("missing", ["training_step", "validation_step", "configure_optimizers"])
def test_a_step_that_is_missing_is_named(missing):
    methods = {name: None for name in ("training_step", "validation_step", "configure_optimizers")}
    del methods[missing]
    incomplete = type("Incomplete", (BaseTrainer,), methods)
    with pytest.raises((TypeError, NotImplementedError), match=missing):
        incomplete(nn.Linear(1, 1), device="cpu", checkpoint_dir=None)


def test_metrics_take_scores_first_and_refuse_the_other_order(tmp_path):
    scores, labels = [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]
    assert compute_auroc(scores, labels) == 0.75
    per_class = compute_auroc_per_class(scores, labels, ["good", "good", "scratch", "dent"])
    assert per_class == {"scratch": 0.5, "dent": 1.0}
    with pytest.raises(ValueError, match=r"labels must be 0 or 1, got 0.1; scores come first"):
        compute_auroc(labels, scores)
    with pytest.raises(ValueError, match=r"labels must have both classes, 0 and 1, got only \[1\]"):
        compute_auroc(scores, [1, 1, 1, 1])
    plot_roc_curve(scores, labels, tmp_path / "roc.png")
    plot_confusion_matrix([0, 1, 1, 1], labels, save_path=tmp_path / "confusion.png")
    assert {path.name for path in tmp_path.iterdir()} == {"roc.png", "confusion.png"}


class MeanScore(nn.Module):
    """Scores an image by its mean; `noisy` does not look at it."""

    def __init__(self, as_dict: bool, noisy: bool = False):
        super().__init__()
        self.as_dict, self.noisy = as_dict, noisy

    def forward(self, images):
        scores = torch.rand(len(images)) if self.noisy else images.mean(dim=(1, 2, 3))
        return {"pred_score": scores, "anomaly_map": images[:, :1]} if self.as_dict else scores


def labelled(count: int) -> list[dict]:
    """Batches of images that are bright where they are anomalous: the left half."""
    labels = torch.arange(count) % 2
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 10
    images[labels == 1, :, :, :4] += 1
    masks = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    masks[labels == 1, :, :, :4] = 1
    rows = zip(images.split(3), labels.split(3), masks.split(3), strict=True)
    return [{"image": image, "label": label, "mask": mask} for image, label, mask in rows]


@pytest.mark.parametrize("as_dict", [True, False])
def test_the_evaluator_measures_perfect_scores(as_dict):
    metrics, scores, labels, predictions = evaluate(MeanScore(as_dict), labelled(8), "cpu")
    assert (metrics["image_auroc"], metrics["image_f1"]) == (1.0, 1.0)
    assert scores[labels == 0].max() <= metrics["threshold"] < scores[labels == 1].min()
    assert scores.shape == labels.shape == (8,)
    assert ("pixel_auroc" in metrics) == ("anomaly_map" in predictions) == as_dict
    if as_dict:
        assert metrics["pixel_auroc"] == 1.0
        assert predictions["anomaly_map"].shape == (8, 1, 8, 8)


def test_the_evaluator_measures_random_scores_and_warns_of_one_class():
    torch.manual_seed(0)
    metrics, *_ = evaluate(MeanScore(False, noisy=True), labelled(1000), "cpu")
    assert 0.45 < metrics["image_auroc"] < 0.55
    good = [{"image": torch.zeros(2, 3, 4, 4), "label": torch.zeros(2)}]
    with pytest.warns(UserWarning, match="image_auroc, .* not defined: there are no defective"):
        metrics, *_ = evaluate(MeanScore(False), good, "cpu")
    assert math.isnan(metrics["image_auroc"])


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The guide's backbone, as a file that an environment variable names."""
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.setenv("ANOMALY_DETECTION_WEIGHTS", str(tmp_path / "resnet18.pth"))
    return tmp_path / "resnet18.pth"


@pytest.fixture
def model(weights):
    return STFPMModel("resnet18", LAYERS)


def test_stfpm_starts_with_a_frozen_teacher_and_a_trainable_student(model):
    assert (model.backbone, model.layers) == ("resnet18", LAYERS)
    assert STFPMModel().layers == tuple(LAYERS)
    assert not any(x.requires_grad for x in model.teacher_model.parameters())
    assert all(x.requires_grad for x in model.student_model.parameters())
    model.train()
    assert not model.teacher_model.training
    assert model.student_model.training


def test_weights_that_are_not_here_are_one_line_that_says_what_to_put_where(
    tmp_path, monkeypatch, weights
):
    monkeypatch.delenv("ANOMALY_DETECTION_WEIGHTS")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        BackboneError, match=r"resnet18-\*\.pth.*ANOMALY_DETECTION_WEIGHTS"
    ) as error:
        STFPMModel("resnet18")
    assert "\n" not in str(error.value)
    cache = tmp_path / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    shutil.copy(weights, cache / "resnet18-f37072fd.pth")  # as torchvision names it
    expected = torch.load(weights, weights_only=True)["conv1.weight"]
    assert torch.equal(STFPMModel("resnet18").teacher_model.net.conv1.weight, expected)


def test_stfpm_gives_features_in_training_and_maps_in_evaluation(model):
    images = torch.randn(2, 3, 64, 64)
    teacher, student = model.train()(images)
    assert list(teacher) == list(student) == LAYERS
    assert [x.shape[1:] for x in student.values()] == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]
    loss = STFPMLoss()(teacher, student)
    assert loss.shape == ()
    assert loss >= 0
    assert STFPMLoss()(teacher, teacher) == pytest.approx(0, abs=1e-6)
    maps = compute_anomaly_map(teacher, student, (64, 64))
    assert maps.shape == (2, 1, 64, 64)
    assert (maps >= 0).all()
    torch.testing.assert_close(AnomalyMapGenerator()(teacher, student, (64, 64)), maps)
    with torch.no_grad():
        outputs = model.eval()(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert outputs["pred_score"].shape == (2,)
    assert outputs["anomaly_map"].shape == (2, 1, 64, 64)


def test_floats_of_the_transforms_and_integers_are_the_same_images(model, tmp_path):
    write_category(tmp_path / "data" / "widget", num_train=2, num_test=1)
    transforms = (get_test_transforms(64), None)
    floats, integers = (MVTecDataset(tmp_path / "data", "widget", "test", x) for x in transforms)
    assert floats[0]["image"].dtype == torch.float32
    with torch.no_grad():
        scores = [model.eval()(x[0]["image"][None])["pred_score"] for x in (floats, integers)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def test_stfpm_overfits_a_single_batch(model, tmp_path):
    torch.manual_seed(0)
    batch = {"image": torch.randn(2, 3, 64, 64), "label": torch.zeros(2)}
    trainer = STFPMTrainer(model, STFPMLoss(), "cpu", tmp_path, 0.01)
    losses = [trainer.train_epoch([batch]) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_stfpm_trainer_chooses_by_auroc_or_else_by_loss(model, tmp_path, optimizer):
    torch.manual_seed(0)
    good = [{"image": torch.randn(4, 3, 32, 32), "label": torch.zeros(4)}]
    mixed = [{"image": torch.randn(4, 3, 32, 32), "label": torch.tensor([0, 1, 0, 1])}]
    trainer = STFPMTrainer(model, checkpoint_dir=tmp_path, device="cpu", optimizer=optimizer)
    trainer.fit(good, mixed, 2)
    assert len(trainer.train_losses) == len(trainer.val_scores) == 2
    assert set(trainer.best_metric) == {"image_auroc", "loss"}
    assert trainer.best_metric["image_auroc"] == max(trainer.val_scores)
    assert set(trainer.validate_epoch(good)) == {"loss"}
    trainer.best_metric = {"loss": 1.0}
    assert trainer._is_better({"loss": 0.9})
    assert not trainer._is_better({"loss": 1.1})


def test_the_data_set_and_its_loaders(tmp_path):
    write_category(tmp_path / "widget", num_train=5, num_test=2)
    train = MVTecDataset(root_dir=tmp_path, category="widget", transform=get_train_transforms(64))
    test = MVTecDataset(tmp_path, "widget", "test", get_test_transforms())
    assert (len(train), len(test)) == (5, 6)
    item = test[0]
    assert {"image", "label", "mask", "path"} <= set(item)
    assert item["image"].shape == (3, 256, 256)
    loader = create_dataloader(train, batch_size=2, shuffle=True, num_workers=0)
    shapes = [batch["image"].shape for batch in loader]
    assert shapes == [(2, 3, 64, 64), (2, 3, 64, 64), (1, 3, 64, 64)]
    assert all((batch["label"] == 0).all() for batch in loader)


def test_the_configuration_has_the_sections_that_the_guide_reads():
    path = ROOT / "params.yaml"
    for config in (load_config(path), load_experiment_config("stfpm", "mvtec", path)):
        assert config["model"]["backbone"] == "tf_efficientnet_lite0"
        assert "layers" in config["model"]
        assert config["training"]["batch_size"] == 8
        assert config["training"]["num_epochs"] == 10
        assert config["training"]["learning_rate"] == 2e-3
        assert config["training"]["num_workers"] == 0
        assert config["training"]["device"] == "auto"
        assert config["evaluation"]["batch_size"] == 32
        assert config["mvtec_dir"] == "data/elpv"
        assert config["checkpoint_dir"] == "checkpoints"
        assert config.get("image_size", 256) == 256
        assert config.get("nothing", 5) == 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the guide's script has run on the built-in images."""
    folder = tmp_path_factory.mktemp("script")
    shutil.copy(ROOT / "params.yaml", folder)
    arguments = ["--category", "mono", "--epochs", "1", "--image-size", "32"]
    before = sys.argv
    sys.argv = ["train_stfpm.py", *arguments]
    try:
        with in_folder(folder):
            runpy.run_path(str(ROOT / "experiments/train_stfpm.py"), run_name="__main__")
    finally:
        sys.argv = before
    return folder


def test_the_training_script_runs_on_the_built_in_data(trained):
    written = {path.name for path in (trained / "checkpoints/stfpm-mono").iterdir()}
    assert written == {"best_model.pth", "epoch_0.pth", "roc.png"}
    checkpoint = torch.load(trained / "checkpoints/stfpm-mono/best_model.pth", weights_only=True)
    model = STFPMModel("tf_efficientnet_lite0", None)
    model.load_state_dict(checkpoint["model_state_dict"])
    test = MVTecDataset(trained / "data/elpv", "mono", "test", get_test_transforms(32))
    metrics, scores, *_ = evaluate(model, create_dataloader(test), "cpu")
    assert len(scores) == 430
    assert np.isfinite(scores).all()
    assert metrics["image_auroc"] > 0.5


@pytest.mark.parametrize(
    ("backbone", "layers", "size", "shapes"),
    [
        ("resnet34", ["layer2", "layer3"], 64, [(128, 8, 8), (256, 4, 4)]),
        ("convnext_atto", ["stages.1", "stages.2"], 64, [(80, 8, 8), (160, 4, 4)]),
        ("swin_tiny_patch4_window7_224", ["layers.1", "layers.2"], 64, [(192, 8, 8), (384, 4, 4)]),
        ("vit_tiny_patch16_224", ["blocks.2", "blocks.7"], 64, [(192, 4, 4)] * 2),
        ("vit_small_patch14_dinov2", ["blocks.5"], 56, [(384, 4, 4)]),
        ("vit_small_patch16_dinov3", None, 64, [(384, 4, 4)] * 2),
    ],
)
def test_any_backbone_of_timm_serves(backbone, layers, size, shapes):
    model = STFPMModel(backbone, layers, "random")
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    teacher, _ = model.train()(images)
    assert [x.shape[1:] for x in teacher.values()] == shapes
    assert list(teacher) == (layers or ["blocks.5", "blocks.8"])
    with torch.no_grad():
        assert model.eval()(images)["anomaly_map"].shape == (1, 1, size, size)


def test_a_size_that_a_backbone_does_not_take_is_refused_with_the_nearest_that_it_does():
    model = STFPMModel("vit_small_patch14_dinov2", ["blocks.5"], "random")
    with pytest.raises(BackboneError, match=r"got 256 pixels .* set data.image_size to 252\."):
        model(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
