"""What every model must do, by the contract of docs/adding-a-model.md."""

import copy
import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from builders.images import write_category
from builders.toy import write_autoencoder
from PIL import Image

from anomaly_detection import Detector, models
from anomaly_detection.data import PreparedDataset, create_dataloader, prepare_category
from anomaly_detection.evaluation.run import evaluate, predict_scores
from anomaly_detection.export import export_detector
from anomaly_detection.inference import DetectorError, save_detector
from anomaly_detection.models import FitContext, restore, snapshot
from anomaly_detection.models.maps import image_scores
from anomaly_detection.trainer import Callback, save_atomically, seed_everything

NAMES = ["autoencoder", "efficientad", "ensemble", "gaussian", "patchcore", "stfpm"]
BUILT_IN = NAMES[1:]
BACKBONE = {"backbone": "test_resnet", "weights": "random", "batch_size": 8}
SMALL = {  # parameters that make a fit a matter of seconds
    "autoencoder": {"num_epochs": 4, "batch_size": 8},
    "efficientad": {"num_steps": 9, "precision": "float32"} | BACKBONE,
    "ensemble": {"members": ["gaussian", "stfpm"]} | BACKBONE,
    "gaussian": BACKBONE,
    "patchcore": BACKBONE,
    "stfpm": {"num_epochs": 4, "precision": "float32"} | BACKBONE,
}
QUICK = {"efficientad": {"batch_size": 2, "num_steps": 100}}
FEWER_CHOICES = {  # where otherwise nothing would be left out
    "gaussian": {"max_channels": 20},
    "patchcore": {"bank_size": 50, "max_patches": 60},
}


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """The toy model beside the library's."""
    folder = tmp_path_factory.mktemp("models")
    write_autoencoder(folder)
    models.__path__.append(str(folder))
    yield
    models.__path__.remove(str(folder))
    for name in [x for x in sys.modules if x.startswith("anomaly_detection.models.autoencoder")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_category(root / "widget", num_train=30)
    prepare_category(
        root,
        "widget",
        root / "prepared",
        image_size=64,
        bit_depth=16,
        validation_fraction=0.2,
        calibration_fraction=0.2,
        seed=0,
    )
    return root / "prepared"


def parameters_of(name, **changes):
    return models.parameters(name)(**SMALL[name] | changes)


def context_for(prepared: Path, state: Path, parameters, **options) -> FitContext:
    fit = PreparedDataset(prepared, "fit")
    return FitContext(
        fit=create_dataloader(fit, parameters.batch_size, shuffle=True, seed=parameters.seed),
        validation=create_dataloader(
            PreparedDataset(prepared, "validation"), parameters.batch_size
        ),
        auxiliary=create_dataloader(others(fit.channels), 2, shuffle=True),
        state=state,
        in_channels=fit.channels,
        **{"device": torch.device("cpu")} | options,
    )


def others(channels: int = 3) -> list[dict]:
    """Images that do not show the product."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, channels, 64, 64), generator=generator).byte()
    return [{"image": image} for image in images]


def fitted(name, prepared, state, parameters=None, **options):
    """A model after its fit, and the fit's result, as the train stage makes them."""
    parameters = parameters or parameters_of(name)
    context = context_for(prepared, state, parameters, **options)
    seed_everything(parameters.seed)
    model = models.spec(name).build(parameters, context.in_channels)
    return model, models.spec(name).fit(model, parameters, context)


@pytest.fixture(scope="module")
def made(prepared, tmp_path_factory):
    """Each model, fitted once."""
    return {name: fitted(name, prepared, tmp_path_factory.mktemp(name)) for name in NAMES}


def saved(name, model, path: Path) -> bytes:
    save_atomically(snapshot(name, model), path)
    return path.read_bytes()


def test_the_toy_model_takes_under_a_hundred_lines(tmp_path):
    folder = write_autoencoder(tmp_path)
    lines = [x for path in folder.glob("*.py") for x in path.read_text().splitlines() if x.strip()]
    assert {path.name for path in folder.glob("*.py")} == {
        "__init__.py",
        "config.py",
        "model.py",
        "spec.py",
    }
    assert 0 < len(lines) < 100


def test_the_contract_is_asked_of_every_model():
    assert models.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_second_fit_gives_the_same_bytes(name, made, prepared, tmp_path):
    model, result = fitted(name, prepared, tmp_path / "state")
    assert saved(name, model, tmp_path / "a") == saved(name, made[name][0], tmp_path / "b")
    assert result == made[name][1]


class Killed(BaseException):
    """Stands for a signal: nothing in the library catches it."""


class KillAfter(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, batch, batch_idx, outputs, loss):
        if self.trainer.epoch > self.epoch:
            raise Killed


class Broken:
    """A loader that is interrupted after its first batch."""

    def __init__(self, loader):
        self.loader, self.dataset = loader, loader.dataset
        self.sampler = loader.sampler

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        yield next(iter(self.loader))
        raise Killed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", ["fit", "validation"])
def test_a_killed_pass_over_the_images_leaves_the_same_bytes(
    name, broken, made, prepared, tmp_path
):
    """Of the first pass over either split: for a model without epochs, the only one."""
    parameters, state = parameters_of(name), tmp_path / "state"
    seed_everything(parameters.seed)
    model = models.spec(name).build(parameters)
    context = context_for(prepared, state, parameters)
    context = replace(context, **{broken: Broken(getattr(context, broken))})
    with pytest.raises(Killed):
        models.spec(name).fit(model, parameters, context)
    model, result = fitted(name, prepared, state)
    assert saved(name, model, tmp_path / "a") == saved(name, made[name][0], tmp_path / "b")
    assert result == made[name][1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_killed_fit_ends_with_the_same_bytes(name, epoch, made, prepared, tmp_path):
    if not made[name][1].history:
        pytest.skip("has no epochs")
    parameters, state = parameters_of(name), tmp_path / "state"
    seed_everything(parameters.seed)
    model = models.spec(name).build(parameters)
    context = context_for(prepared, state, parameters, callbacks=[KillAfter(epoch)])
    with pytest.raises(Killed):
        models.spec(name).fit(model, parameters, context)
    model, result = fitted(name, prepared, state)
    assert saved(name, model, tmp_path / "a") == saved(name, made[name][0], tmp_path / "b")
    assert result == made[name][1]


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_gives_other_scores(name, prepared, tmp_path):
    """Not only because of another backbone: this one has its weights from a file."""
    changes = dict(FEWER_CHOICES.get(name, {}))
    if "weights" in models.parameters(name).model_fields:
        backbone = timm.create_model(SMALL[name]["backbone"])
        torch.save(backbone.state_dict(), tmp_path / "weights.pth")
        changes["weights"] = str(tmp_path / "weights.pth")
    loader = create_dataloader(PreparedDataset(prepared, "test"))
    scores = []
    for seed in (0, 0, 1):
        parameters = parameters_of(name, seed=seed, **changes)
        model, _ = fitted(name, prepared, tmp_path / str(len(scores)), parameters)
        scores.append(predict_scores(model.eval(), loader))
    assert np.array_equal(scores[0], scores[1])
    assert scores[2] != pytest.approx(scores[0], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_history_has_a_row_for_each_epoch_or_none_at_all(name, made):
    _, result = made[name]
    assert [row["epoch"] for row in result.history] == list(range(1, len(result.history) + 1))
    assert (result.best_epoch in [row["epoch"] for row in result.history]) or not result.history
    assert result.precision in ("float32", "bfloat16", "float16")
    json.dumps(result.history, allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_the_shapes_of_the_contract_and_are_finite(name, made):
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = made[name][0].eval()(images.byte())
    assert outputs["pred_score"].shape == (3,)
    assert outputs["anomaly_map"].shape == (3, 1, 64, 64)
    assert all(torch.isfinite(values).all() for values in outputs.values())


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_what_is_judged_counts(name, made, prepared):
    model = made[name][0].eval()
    images = next(iter(create_dataloader(PreparedDataset(prepared, "test"))))["image"]
    judged = torch.zeros(len(images), 1, 64, 64, dtype=torch.uint8)
    judged[:, :, :32, 16:] = 255
    everywhere = torch.full_like(judged, 255)
    with torch.inference_mode():
        plain, whole, part = (
            model(torch.cat([images, *channel], dim=1)) for channel in ([], [everywhere], [judged])
        )
    torch.testing.assert_close(whole, plain)
    maps = plain["anomaly_map"][:, :, :32, 16:]
    torch.testing.assert_close(part["anomaly_map"][:, :, :32, 16:], maps)
    assert part["anomaly_map"].sum().item() == pytest.approx(maps.sum().item(), rel=1e-4)
    torch.testing.assert_close(part["pred_score"], image_scores(maps, model.top_fraction))


@pytest.fixture(scope="module")
def with_near_infrared(tmp_path_factory) -> Path:
    """Images of four channels of 16 bits; half of the test's have a spot in the fourth alone."""
    root, rng = tmp_path_factory.mktemp("near_infrared"), np.random.default_rng(0)
    for i in range(24):
        values = rng.normal(30_000, 1_000, (64, 64, 4)).astype(np.uint16)
        kind = "train/good" if i < 16 else "test/good" if i < 20 else "test/warm"
        if kind == "test/warm":
            values[20:40, 30:50, 3] += 30_000
        path = root / "widget" / kind / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, values, photometric="rgb", extrasamples=["unspecified"])
    options = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "seed": 0}
    prepare_category(
        root, "widget", root / "prepared", image_size=64, bit_depth=16, resize="fit", **options
    )
    return root / "prepared"


@pytest.mark.parametrize("name", NAMES)
def test_four_channels_of_16_bits_are_seen_and_restored(name, with_near_infrared, tmp_path):
    model, _ = fitted(name, with_near_infrared, tmp_path / "state")
    test = PreparedDataset(with_near_infrared, "test")
    assert test.pictures().shape[1:] == (5, 64, 64)  # the last one says what is judged
    loader = create_dataloader(test)
    metrics, scores, *_ = evaluate(model.eval(), loader)
    assert metrics["image_auroc"] == 1
    saved(name, model, tmp_path / "model.pth")
    restored = restore(torch.load(tmp_path / "model.pth", weights_only=True))
    assert predict_scores(restored, loader) == pytest.approx(scores, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_older_file_is_of_a_model_for_three_channels_and_any_size(name, made, prepared):
    content = snapshot(name, made[name][0])
    told = copy.deepcopy(content["hyperparameters"])
    for values in (told, *told.get("members", {}).values()):
        del values["in_channels"]
        values.pop("image_size", None)  # the toy model does not check it
    loader = create_dataloader(PreparedDataset(prepared, "test"))
    expected = predict_scores(made[name][0].eval(), loader)
    older = restore(content | {"hyperparameters": told})
    assert predict_scores(older, loader) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_fitted_on_a_gpu_judges_alike_on_a_cpu(name, prepared, tmp_path):
    gpu = torch.device("cuda")
    model, _ = fitted(name, prepared, tmp_path, device=gpu)
    loader = create_dataloader(PreparedDataset(prepared, "test"))
    scores = predict_scores(model.to(gpu).eval(), loader, gpu)
    assert predict_scores(model.cpu(), loader) == pytest.approx(scores, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_no_score_depends_on_the_other_images_of_its_batch(name, made, prepared):
    test, model = PreparedDataset(prepared, "test"), made[name][0].eval()
    together, alone = (predict_scores(model, create_dataloader(test, size)) for size in (12, 1))
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_defects_score_higher_than_normal_images(name, prepared, tmp_path):
    """With the model's defaults, but for what would take minutes."""
    loader = create_dataloader(PreparedDataset(prepared, "test"))
    parameters = models.parameters(name)(**QUICK.get(name, {"batch_size": 8}))
    model, _ = fitted(name, prepared, tmp_path, parameters)
    metrics, *_ = evaluate(model.eval(), loader)
    assert metrics["image_auroc"] > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_a_file_restores_the_scores(name, made, prepared, tmp_path):
    loader = create_dataloader(PreparedDataset(prepared, "test"))
    saved(name, made[name][0], tmp_path / "model.pth")
    restored = restore(torch.load(tmp_path / "model.pth", weights_only=True))
    assert not restored.training
    expected = predict_scores(made[name][0], loader)
    assert predict_scores(restored, loader) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_number_of_images(name, prepared, tmp_path):
    """What a fit leaves behind in the model is bounded by its parameters, not by the images."""
    parameters = parameters_of(name, **FEWER_CHOICES.get(name, {}))
    sizes = []
    for count in (6, 18):
        few = context_for(prepared, tmp_path / str(count), parameters)
        few.fit.dataset.positions = few.fit.dataset.positions[:count]
        few = replace(
            few, fit=create_dataloader(few.fit.dataset, parameters.batch_size, shuffle=True)
        )
        model = models.spec(name).build(parameters)
        models.spec(name).fit(model, parameters, few)
        sizes.append(sum(tensor.nbytes for tensor in model.state_dict().values()))
    assert sizes[0] == sizes[1]


@pytest.fixture(scope="module", params=NAMES)
def detector(request, made, prepared, tmp_path_factory):
    """A detector's file, with scores and verdicts of the evaluation by the images' paths."""
    name = request.param
    content = snapshot(name, made[name][0])
    model = restore(content)
    calibration = predict_scores(model, create_dataloader(PreparedDataset(prepared, "calibration")))
    test = PreparedDataset(prepared, "test")
    threshold = float(np.sort(calibration)[-2])
    _, scores, _, verdicts = evaluate(model, create_dataloader(test), threshold=threshold)
    path = tmp_path_factory.mktemp("detector") / "widget.pt"
    save_detector(
        path,
        model=content,
        threshold=threshold,
        calibration_scores=calibration.tolist(),
        preprocessing={"bit_depth": 16, "image_size": 64},
        precision="float32",
        parameters={},
        provenance={},
    )
    found = zip(test.rows, scores, verdicts, strict=True)
    return path, {row["path"]: (score, verdict) for row, score, verdict in found}


def test_a_detector_gives_the_verdicts_of_the_evaluation_from_the_files(detector, prepared):
    path, expected = detector
    loaded = Detector.load(path)
    for name, (score, verdict) in expected.items():
        prediction = loaded.predict(prepared.parent / "widget" / name)
        assert prediction.score == pytest.approx(float(score), rel=1e-4, abs=1e-3)
        assert prediction.verdict == ("anomalous" if verdict else "normal")
        above = (loaded.calibration_scores >= np.float32(prediction.score)).sum()
        assert prediction.p_value == (1 + above) / (len(loaded.calibration_scores) + 1)
        assert prediction.anomaly_map.shape == (64, 64)


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory):
    """The detector in both formats."""
    folder = tmp_path_factory.mktemp("export") / "widget"
    export_detector(detector[0], ["onnx", "openvino"], folder, np.zeros((0, 3, 64, 64)))
    return folder


@pytest.mark.parametrize("file", ["model.onnx", "model.xml"])
def test_an_export_gives_the_outputs_of_pytorch(detector, exported, prepared, file):
    """For any number of images at a time, and without the batch's size playing a part."""
    reference = Detector.load(detector[0]).runtime
    runtime = Detector.load(exported / file).runtime
    pictures = np.array(PreparedDataset(prepared, "test").pictures())
    expected = reference(pictures)
    assert expected.is_anomalous.any()
    assert not expected.is_anomalous.all()
    for count in (1, 2, 5):
        parts = np.array_split(pictures, range(count, len(pictures), count))
        found = [np.concatenate(values) for values in zip(*map(runtime, parts), strict=True)]
        for name, ours, theirs in zip(expected._fields, found, expected, strict=True):
            assert ours.dtype == theirs.dtype, name
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3, err_msg=name)


def test_an_export_gives_the_verdicts_of_the_evaluation_from_the_files(
    detector, exported, prepared
):
    reference = Detector.load(detector[0])
    for path in (exported, exported / "model.xml", exported / "model.json"):
        loaded = Detector.load(path)
        for name, (_, verdict) in detector[1].items():
            file = prepared.parent / "widget" / name
            prediction, expected = loaded.predict(file), reference.predict(file)
            assert prediction.verdict == ("anomalous" if verdict else "normal")
            assert prediction.p_value == expected.p_value
            assert prediction.threshold == expected.threshold


def test_a_detectors_file_holds_no_optimizer_and_no_random_state(detector):
    content = torch.load(detector[0], weights_only=True)
    assert set(content) == {
        "format",
        "version",
        "model",
        "threshold",
        "calibration_scores",
        "preprocessing",
        "precision",
        "parameters",
        "provenance",
    }
    assert set(content["model"]) == {"name", "hyperparameters", "state_dict"}


def test_a_picture_is_judged_like_its_file(detector, tmp_path):
    """Also one of 16 bits, and one that the camera held upright."""
    loaded = Detector.load(detector[0])
    deep = np.random.default_rng(0).integers(0, 2**16, (50, 40)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    upright = Image.Exif()
    upright[0x0112] = 6
    Image.fromarray((deep >> 8).astype(np.uint8)).save(tmp_path / "turned.png", exif=upright)
    for name in ("deep.png", "turned.png"):
        with Image.open(tmp_path / name) as picture:
            assert loaded.predict(picture).score == loaded.predict(tmp_path / name).score


@pytest.mark.parametrize("name", BUILT_IN)
def test_images_that_a_model_was_not_fitted_to_are_refused(name, made, prepared):
    model = restore(snapshot(name, made[name][0]))
    images = PreparedDataset(prepared, "test").__getitems__([0, 1])["image"]
    floats = images.float() / 255
    with torch.inference_mode():
        expected = model(images)["pred_score"]
        torch.testing.assert_close(model(floats)["pred_score"], expected)
        for wrong, text in (
            (images[..., 1:, 1:], r"shape \(N, 3, 64, 64\) .* got \(2, 3, 63, 63\)"),
            (images[:, :1], r"got \(2, 1, 64, 64\)"),
            (images.repeat(1, 2, 1, 1), r"got \(2, 6, 64, 64\)"),
            (images[0], r"got \(3, 64, 64\)"),
            (images.long(), r"uint8, uint16 or floats in \[0, 1\], got int64\."),
            (images.float(), r"got \d+ to \d+; divide them by their full scale\."),
            ((floats - 0.5) / 0.5, r"got -[\d.]+ to [\d.]+; the model normalises them itself\."),
            (floats / 0, "got nan to nan|got inf to inf"),
        ):
            with pytest.raises(ValueError, match=text):
                model(wrong)


def test_what_is_no_picture_is_refused(detector):
    loaded = Detector.load(detector[0])
    with pytest.raises(ValueError, match="must be a path, a picture or pixels, got list"):
        loaded.predict([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"uint8 of shape .* got float64 of \(4, 4\)"):
        loaded.predict(np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"got uint8 of \(0, 4\)"):
        loaded.predict(np.zeros((0, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="neither scaled nor normalised"):
        loaded.predict(np.full((4, 4, 3), -1.5, dtype=np.float32))


def change(content, **values):
    content.update(values)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda content: change(content, format="other"), "another kind of file"),
        (lambda content: change(content, version=99), "must be of version 3 or older, got 99"),
        (lambda content: content.pop("precision"), "KeyError: 'precision'"),
        (lambda content: content["model"].update(name="gaussian2"), "No module named"),
        (lambda content: content["model"]["state_dict"].popitem(), "RuntimeError"),
    ],
)
def test_a_detector_that_cannot_be_used_is_one_clear_line(detector, tmp_path, damage, text):
    content = torch.load(detector[0], weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "damaged.pt")
    with pytest.raises(DetectorError, match=text) as error:
        Detector.load(tmp_path / "damaged.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 100, 2000])
def test_a_truncated_detector_is_one_clear_line(detector, tmp_path, length):
    (tmp_path / "short.pt").write_bytes(detector[0].read_bytes()[:length])
    with pytest.raises(DetectorError, match="must be a detector, but cannot be loaded") as error:
        Detector.load(tmp_path / "short.pt")
    assert "\n" not in str(error.value)


def test_a_detector_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DetectorError, match="no such file"):
        Detector.load(tmp_path / "gone.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_runs_through_the_pipeline_by_its_name_alone(name, tmp_path):
    from builders.projects import Project, read_json

    project = Project(tmp_path / "project")
    write_autoencoder(project.folder / "anomaly_detection" / "models")
    project.change("data", categories=["bolt"])
    project.change("training", num_epochs="auto", batch_size="auto")
    project.change("efficientad", num_steps=40)
    project.commit("a model more")
    project.dvc("exp", "run", "-S", f"model.name={name}")
    training = read_json(project.folder / "metrics" / "bolt" / "train.json")
    assert training["model"] == name
    assert (
        training["parameters"]["training"]["batch_size"]
        == models.parameters(name).model_fields["batch_size"].default
    )
    detector = project.run(
        "python",
        "-c",
        "import csv, sys; from anomaly_detection import Detector\n"
        "detector = Detector.load('detectors/bolt.pt')\n"
        "for row in csv.DictReader(open('predictions/bolt/scores.csv')):\n"
        "    print(row['path'], detector.predict('parts/bolt/' + row['path']).verdict)",
    ).stdout.splitlines()
    with (project.folder / "predictions" / "bolt" / "scores.csv").open() as file:
        expected = [
            f"{row['path']} {'anomalous' if row['pred_label'] == '1' else 'normal'}"
            for row in csv.DictReader(file)
        ]
    assert detector == expected
    page = (project.folder / "report" / "index.html").read_text()
    assert name in page
