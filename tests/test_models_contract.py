"""What every model must do, by the contract of docs/adding-a-model.md."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from builders.images import prepare, write_category, write_image
from builders.models import (
    Killed,
    Watched,
    build,
    context,
    random_images,
    saved,
    toy_model,
    write_autoencoder,
)
from PIL import Image
from torch import nn
from torchvision import tv_tensors

from anomaly_detection import Detector, models
from anomaly_detection.data import PreparedDataset, create_dataloader
from anomaly_detection.data.transforms import Normalise
from anomaly_detection.evaluator import evaluate, predict_scores
from anomaly_detection.export import export_detector
from anomaly_detection.inference import DetectorError, save_detector
from anomaly_detection.models import restore, snapshot
from anomaly_detection.models.maps import image_scores
from anomaly_detection.trainer import Callback, TrainingError, seed_everything

NAMES = ["autoencoder", "efficientad", "ensemble", "gaussian", "patchcore", "stfpm"]
BUILT_IN = NAMES[1:]
NUM_EPOCHS = 3  # of those that have any; an epoch is 3 batches
SIZE = 32
FRACTIONS = {"validation_fraction": 0.2, "calibration_fraction": 0.2}
PYRAMID = {"backbone": "test_resnet", "weights": "random", "batch_size": 4}
SMALL = {  # parameters that make a fit quick and leave a choice to each
    "autoencoder": {"num_epochs": NUM_EPOCHS, "batch_size": 4},
    "efficientad": {"num_steps": 3 * NUM_EPOCHS, "precision": "float32"} | PYRAMID,
    "ensemble": {"members": ["gaussian", "stfpm"]} | PYRAMID,
    "gaussian": {"max_channels": 20} | PYRAMID,
    "patchcore": {"bank_size": 20, "max_patches": 30} | PYRAMID,
    "stfpm": {"num_epochs": NUM_EPOCHS, "precision": "float32"} | PYRAMID,
}
ONE_EPOCH = {
    "autoencoder": {"num_epochs": 1},
    "efficientad": {"num_steps": 3},
    "stfpm": {"num_epochs": 1},
}

TEACHER = re.compile(r"\bteacher(_model)?\.")


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    with toy_model(tmp_path_factory.mktemp("models")):
        yield


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


def of_models(*names):
    return pytest.mark.parametrize("name", names, indirect=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_category(root / "widget", size=SIZE, num_train=20)
    return prepare(root, image_size=SIZE, **FRACTIONS)


@pytest.fixture(scope="module")
def loader(prepared):
    """The test images."""
    return create_dataloader(PreparedDataset(prepared, "test"))


def parameters_of(name, **changes):
    return models.parameters(name)(**SMALL[name] | changes)


def context_for(prepared: Path, state: Path, told, **options):
    fit = PreparedDataset(prepared, "fit")
    others = random_images(3, fit.image_size, channels=fit.channels)  # not of the product
    return context(
        create_dataloader(fit, told.batch_size, shuffle=True, seed=told.seed),
        create_dataloader(PreparedDataset(prepared, "validation"), told.batch_size),
        state,
        auxiliary=create_dataloader([{"image": image} for image in others], 2, shuffle=True),
        in_channels=fit.channels,
        **options,
    )


def fitted(name, told, context):
    """A model after its fit, and the fit's result, as the train stage makes them."""
    seed_everything(told.seed)
    model = models.spec(name).build(told, context.in_channels)
    return model, models.spec(name).fit(model, told, context)


@pytest.fixture(scope="module")
def made(name, prepared, tmp_path_factory):
    """Each model, fitted once, in eval mode; and the fit's result."""
    told = parameters_of(name)
    model, result = fitted(name, told, context_for(prepared, tmp_path_factory.mktemp(name), told))
    return model.eval(), result


def test_the_toy_model_takes_under_a_hundred_lines(tmp_path):
    paths = list(write_autoencoder(tmp_path).glob("*.py"))
    assert {path.name for path in paths} == {"__init__.py", "config.py", "model.py", "spec.py"}
    assert 0 < sum(bool(x.strip()) for path in paths for x in path.open()) < 100


def test_the_contract_is_asked_of_every_model():
    assert models.names() == NAMES


# Fits


def test_a_second_fit_gives_the_same_bytes(name, made, prepared, tmp_path):
    told = parameters_of(name)
    model, result = fitted(name, told, context_for(prepared, tmp_path / "state", told))
    assert saved(name, model, tmp_path / "a") == saved(name, made[0], tmp_path / "a")
    assert result == made[1]


class Epochs(Callback):
    """Keeps the epochs that are trained; the given one is interrupted after its first batch."""

    def __init__(self, interrupted=None):
        self.interrupted, self.trained = interrupted, []

    def on_train_epoch_start(self, epoch):
        self.trained.append(epoch)

    def on_train_batch_end(self, batch, batch_idx, outputs, loss):
        if self.trainer.current_epoch == self.interrupted:
            raise Killed


def test_a_fit_killed_again_and_again_ends_with_the_same_bytes(name, made, prepared, tmp_path):
    """In the first pass over either split, which for a model without epochs is the only one; then
    in the first epoch, and in a later one."""
    told = parameters_of(name)
    whole = context_for(prepared, tmp_path / "state", told)
    kills = [
        {split: Watched(getattr(whole, split), interrupted=1)} for split in ("fit", "validation")
    ]
    if made[1].history:
        kills += [{"callbacks": [Epochs(interrupted=epoch)]} for epoch in (0, 2)]
    for kill in kills:
        with pytest.raises(Killed):
            fitted(name, told, replace(whole, **kill))
    epochs = Epochs()
    model, result = fitted(name, told, replace(whole, callbacks=[epochs]))
    assert saved(name, model, tmp_path / "a") == saved(name, made[0], tmp_path / "a")
    assert result == made[1]
    assert epochs.trained == [row["epoch"] - 1 for row in result.history][2:]


def test_another_seed_gives_other_scores(name, prepared, loader, tmp_path):
    """Not only because of another backbone: this one has its weights from a file."""
    changes, scores = {}, []
    if "weights" in models.parameters(name).model_fields:
        backbone = timm.create_model(PYRAMID["backbone"])
        torch.save(backbone.state_dict(), tmp_path / "weights.pth")
        changes["weights"] = str(tmp_path / "weights.pth")
    for number, seed in enumerate((0, 0, 1)):
        told = parameters_of(name, seed=seed, **ONE_EPOCH.get(name, {}), **changes)
        model, _ = fitted(name, told, context_for(prepared, tmp_path / str(number), told))
        scores.append(predict_scores(model.eval(), loader))
    assert np.array_equal(scores[0], scores[1])
    assert scores[2] != pytest.approx(scores[0], rel=1e-3, abs=1e-3)


def test_memory_does_not_grow_with_the_number_of_images(name, made, prepared, tmp_path):
    """What a fit leaves behind in the model is bounded by its parameters, not by the images."""
    told = parameters_of(name, **ONE_EPOCH.get(name, {}))
    few = context_for(prepared, tmp_path, told)
    few.fit.dataset.positions = few.fit.dataset.positions[:4]
    few = replace(few, fit=create_dataloader(few.fit.dataset, told.batch_size, shuffle=True))
    states = [model.state_dict() for model in (made[0], fitted(name, told, few)[0])]
    sizes = [sum(tensor.nbytes for tensor in state.values()) for state in states]
    assert sizes[0] == sizes[1]


def test_the_history_has_a_row_for_each_epoch_or_none_at_all(made):
    result = made[1]
    epochs = [row["epoch"] for row in result.history]
    assert epochs == list(range(1, len(epochs) + 1))
    assert result.best_epoch in epochs or not epochs
    assert result.precision in ("float32", "bfloat16", "float16")
    json.dumps(result.history, allow_nan=False)


@of_models(*(x for x in BUILT_IN if x != "stfpm"))  # which has a map of its features
def test_a_model_that_is_not_fitted_refuses_to_score(name):
    with pytest.raises(TrainingError, match="must be fitted before"):
        build(name, parameters_of(name)).eval()(random_images(1, SIZE))


@of_models(*BUILT_IN)
def test_a_backbone_is_frozen_and_its_batch_norm_sleeps(name, made):
    told = parameters_of(name)
    seed_everything(told.seed)
    before = models.spec(name).build(told).state_dict()
    model = copy.deepcopy(made[0]).train()
    after = model.state_dict()
    for key in filter(TEACHER.search, before):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0, msg=key)
    parameters = [x for key, x in model.named_parameters() if TEACHER.search(key)]
    assert parameters
    assert not any(x.requires_grad for x in parameters)
    modules = [x for key, x in model.named_modules() if TEACHER.search(key)]
    norms = [x for x in modules if isinstance(x, nn.BatchNorm2d)]
    assert norms
    assert not any(x.training for x in norms)


# Scores


def test_outputs_have_the_shapes_of_the_contract_and_are_finite(made):
    with torch.inference_mode():
        outputs = made[0](random_images(3, SIZE))
    assert outputs["pred_score"].shape == (3,)
    assert outputs["anomaly_map"].shape == (3, 1, SIZE, SIZE)
    assert all(torch.isfinite(values).all() for values in outputs.values())


@of_models(*BUILT_IN)
def test_only_what_is_judged_counts(made, loader):
    model, images = made[0], next(iter(loader))["image"]
    part = (..., slice(SIZE // 2), slice(SIZE // 4, None))
    judged = torch.zeros(len(images), 1, SIZE, SIZE, dtype=torch.uint8)
    judged[part] = 255
    everywhere = torch.full_like(judged, 255)
    with torch.inference_mode():
        plain, whole, some = (
            model(torch.cat([images, *channel], dim=1)) for channel in ([], [everywhere], [judged])
        )
    torch.testing.assert_close(whole, plain)
    maps = plain["anomaly_map"][part]
    torch.testing.assert_close(some["anomaly_map"][part], maps)
    assert some["anomaly_map"].sum().item() == pytest.approx(maps.sum().item(), rel=1e-4)
    torch.testing.assert_close(some["pred_score"], image_scores(maps, model.top_fraction))


def test_no_output_depends_on_the_other_images_of_the_batch(made, loader):
    alone = create_dataloader(loader.dataset, 1)
    scores = predict_scores(made[0], loader)
    assert scores == pytest.approx(predict_scores(made[0], alone), rel=1e-4, abs=1e-3)
    with torch.inference_mode():
        together = made[0](next(iter(loader))["image"])["anomaly_map"]
        maps = torch.cat([made[0](batch["image"])["anomaly_map"] for batch in alone])
    torch.testing.assert_close(together, maps, rtol=1e-3, atol=1e-3)


def test_defects_score_higher_than_normal_images(name, prepared, loader, tmp_path):
    """With the model's defaults, but for what would take minutes."""
    quick = {"num_steps": 50} if name == "efficientad" else {"batch_size": 8}
    told = models.parameters(name)(**quick)
    model, _ = fitted(name, told, context_for(prepared, tmp_path, told))
    metrics, *_ = evaluate(model.eval(), loader)
    assert metrics["image_auroc"] > 0.8


@pytest.fixture(scope="module")
def with_near_infrared(tmp_path_factory) -> Path:
    """Images of four channels of 16 bits; half of the test's have a spot in the fourth alone."""
    root, rng = tmp_path_factory.mktemp("near_infrared"), np.random.default_rng(0)
    for i in range(24):
        values = rng.normal(30_000, 1_000, (SIZE, SIZE, 4)).astype(np.uint16)
        kind = "train/good" if i < 16 else "test/good" if i < 20 else "test/warm"
        if kind == "test/warm":
            values[8:24, 10:26, 3] += 30_000
        path = root / "widget" / kind / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, values, photometric="rgb", extrasamples=["unspecified"])
    return prepare(root, image_size=SIZE, resize="fit", **FRACTIONS)


def test_four_channels_of_16_bits_are_seen_and_restored(name, with_near_infrared, tmp_path):
    told = parameters_of(name)
    model, _ = fitted(name, told, context_for(with_near_infrared, tmp_path / "state", told))
    test = PreparedDataset(with_near_infrared, "test")
    assert test.pictures().shape[1:] == (5, SIZE, SIZE)  # the last one says what is judged
    loader = create_dataloader(test)
    metrics, scores, *_ = evaluate(model.eval(), loader)
    assert metrics["image_auroc"] == 1
    saved(name, model, tmp_path / "model.pth")
    restored = restore(torch.load(tmp_path / "model.pth", weights_only=True))
    assert predict_scores(restored, loader) == pytest.approx(scores, rel=1e-3, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_fitted_on_a_gpu_judges_alike_on_a_cpu(name, prepared, loader, tmp_path):
    gpu, told = torch.device("cuda"), parameters_of(name)
    model, _ = fitted(name, told, context_for(prepared, tmp_path, told, device=gpu))
    scores = predict_scores(model.to(gpu).eval(), loader, gpu)
    assert predict_scores(model.cpu(), loader) == pytest.approx(scores, rel=1e-2, abs=1e-2)


@of_models(*BUILT_IN)
def test_images_that_a_model_was_not_fitted_to_are_refused(name, made, loader):
    model = restore(snapshot(name, made[0]))
    images = next(iter(loader))["image"][:2]
    floats = Normalise()(tv_tensors.Image(images[0]))[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(floats), model(images[:1]), rtol=1e-3, atol=1e-3)
        for wrong, text in (
            (images[..., 1:, 1:], r"shape \(N, 3, 32, 32\) .* got \(2, 3, 31, 31\)"),
            (images[:, :1], r"got \(2, 1, 32, 32\)"),
            (images.repeat(1, 2, 1, 1), r"got \(2, 6, 32, 32\)"),
            (images[0], r"got \(3, 32, 32\)"),
            (images.long(), r"uint8, uint16 or normalised floats, got int64\."),
            (images.float(), r"must be normalised .* got \d+ to \d+; use `get_test_transforms`"),
            (floats / 0, "got (nan|-?inf) to (nan|inf)"),
        ):
            with pytest.raises(ValueError, match=text):
                model(wrong)


# Files


def test_a_file_restores_the_outputs(name, made, loader, tmp_path):
    saved(name, made[0], tmp_path / "model.pth")
    restored = restore(torch.load(tmp_path / "model.pth", weights_only=True))
    assert not restored.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in restored.modules())
    expected = predict_scores(made[0], loader)
    assert predict_scores(restored, loader) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    images = next(iter(loader))["image"]
    with torch.inference_mode():
        torch.testing.assert_close(restored(images), made[0](images), rtol=1e-3, atol=1e-3)


def test_an_older_file_is_of_a_model_for_three_channels_and_any_size(name, made, loader):
    content = snapshot(name, made[0])
    told = copy.deepcopy(content["hyperparameters"])
    for values in (told, *told.get("members", {}).values()):
        del values["in_channels"]
        values.pop("image_size", None)  # the toy model does not check it
    older = restore(content | {"hyperparameters": told})
    expected = predict_scores(made[0], loader)
    assert predict_scores(older, loader) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.fixture(scope="module")
def detector(name, made, prepared, loader, tmp_path_factory):
    """A detector's file, with scores and verdicts of the evaluation by the images' paths."""
    content = snapshot(name, made[0])
    model = restore(content)
    calibration = predict_scores(model, create_dataloader(PreparedDataset(prepared, "calibration")))
    threshold = float(np.sort(predict_scores(model, loader))[3:5].mean())
    _, scores, _, predictions = evaluate(model, loader, threshold=threshold)
    path = tmp_path_factory.mktemp("detector") / "widget.pt"
    save_detector(
        path,
        model=content,
        threshold=threshold,
        calibration_scores=calibration.tolist(),
        preprocessing={"bit_depth": 16, "image_size": SIZE},
        precision="float32",
        parameters={},
        provenance={},
    )
    files = [prepared.parents[1] / "widget" / row["path"] for row in loader.dataset.rows]
    return path, list(zip(files, scores, predictions["pred_label"], strict=True))


def test_a_detector_gives_the_verdicts_of_the_evaluation_from_the_files(detector):
    loaded = Detector.load(detector[0])
    for file, score, verdict in detector[1]:
        prediction = loaded.predict(file)
        assert prediction.score == pytest.approx(float(score), rel=1e-4, abs=1e-3)
        assert prediction.verdict == ("anomalous" if verdict else "normal")
        above = (loaded.calibration_scores >= np.float32(prediction.score)).sum()
        assert prediction.p_value == (1 + above) / (len(loaded.calibration_scores) + 1)
        assert prediction.anomaly_map.shape == (SIZE, SIZE)


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory):
    """The detector in both formats."""
    folder = tmp_path_factory.mktemp("export") / "widget"
    export_detector(detector[0], ["onnx", "openvino"], folder, np.zeros((0, 3, SIZE, SIZE)))
    return folder


@pytest.mark.parametrize("file", ["model.onnx", "model.xml"])
def test_an_export_gives_the_outputs_of_pytorch(detector, exported, loader, file):
    """For any number of images at a time, and without the batch's size playing a part."""
    pictures = np.array(loader.dataset.pictures())
    expected = Detector.load(detector[0]).runtime(pictures)
    assert expected.is_anomalous.any()
    assert not expected.is_anomalous.all()
    runtime = Detector.load(exported / file).runtime
    for count in (1, 2, 5):
        parts = np.array_split(pictures, range(count, len(pictures), count))
        found = [np.concatenate(values) for values in zip(*map(runtime, parts), strict=True)]
        for key, ours, theirs in zip(expected._fields, found, expected, strict=True):
            assert ours.dtype == theirs.dtype, key
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3, err_msg=key)


@pytest.mark.parametrize("file", ["", "model.xml", "model.json"])
def test_an_export_gives_the_verdicts_of_the_evaluation_from_the_files(detector, exported, file):
    reference, loaded = Detector.load(detector[0]), Detector.load(exported / file)
    for path, _, verdict in detector[1]:
        prediction, expected = loaded.predict(path), reference.predict(path)
        assert prediction.verdict == ("anomalous" if verdict else "normal")
        assert prediction.p_value == expected.p_value
        assert prediction.threshold == expected.threshold


def test_a_detectors_file_holds_no_optimizer_and_no_random_state(detector):
    content = torch.load(detector[0], weights_only=True)
    own = {"format", "version", "model", "threshold", "calibration_scores", "preprocessing"}
    assert set(content) == own | {"precision", "parameters", "provenance"}
    assert set(content["model"]) == {"name", "hyperparameters", "model_state_dict"}


@of_models("stfpm")
def test_a_picture_is_judged_like_its_file(detector, tmp_path):
    """Also one of 16 bits, and one that the camera held upright."""
    loaded = Detector.load(detector[0])
    deep = np.random.default_rng(0).integers(0, 2**16, (50, 40)).astype(np.uint16)
    write_image(tmp_path / "deep.png", deep)
    upright = Image.Exif()
    upright[0x0112] = 6
    Image.fromarray((deep >> 8).astype(np.uint8)).save(tmp_path / "turned.png", exif=upright)
    for file in ("deep.png", "turned.png"):
        with Image.open(tmp_path / file) as picture:
            assert loaded.predict(picture).score == loaded.predict(tmp_path / file).score


@of_models("stfpm")
@pytest.mark.parametrize(
    ("pixels", "text"),
    [
        ([[1, 2], [3, 4]], "must be a path, a picture or pixels, got list"),
        (np.zeros((4, 4)), r"uint8 of shape .* got float64 of \(4, 4\)"),
        (np.zeros((0, 4), dtype=np.uint8), r"got uint8 of \(0, 4\)"),
        (np.full((4, 4, 3), -1.5, dtype=np.float32), "neither scaled nor normalised"),
    ],
    ids=["list", "float64", "empty", "normalised"],
)
def test_what_is_no_picture_is_refused(detector, pixels, text):
    with pytest.raises(ValueError, match=text):
        Detector.load(detector[0]).predict(pixels)


@of_models("stfpm")
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda content: content.update(format="other"), "another kind of file"),
        (lambda content: content.update(version=99), "version 4, got 99; update anomaly_detection"),
        (lambda content: content.update(version=3), "version 4, got 3; its model would give other"),
        (lambda content: content.pop("precision"), "KeyError: 'precision'"),
        (lambda content: content["model"].update(name="gaussian2"), "No module named"),
        (lambda content: content["model"]["model_state_dict"].popitem(), "RuntimeError"),
    ],
)
def test_a_detector_that_cannot_be_used_is_one_clear_line(detector, tmp_path, damage, text):
    content = torch.load(detector[0], weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "damaged.pt")
    with pytest.raises(DetectorError, match=rf"\A.*{text}.*\Z"):
        Detector.load(tmp_path / "damaged.pt")


@of_models("stfpm")
def test_a_truncated_or_missing_detector_is_one_clear_line(detector, tmp_path):
    path = tmp_path / "short.pt"
    with pytest.raises(DetectorError, match="no such file"):
        Detector.load(path)
    for length in (0, 100, 2000):
        path.write_bytes(detector[0].read_bytes()[:length])
        with pytest.raises(DetectorError, match=r"\A.*be a detector, but cannot be loaded.*\Z"):
            Detector.load(path)
