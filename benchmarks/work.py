"""Run one task in its own process, and print its cost as a line of JSON.

    python -m benchmarks.work NAME FOLDER SETTINGS

FOLDER holds the category `raw`, from `benchmarks.images`, and `prepared`; SETTINGS is JSON with
`backbone`, `weights`, `image_size`, `batch_size`, `evaluation_precision` and `epochs`.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stages import run  # isort: skip, before PyTorch: it makes idle threads sleep

import joblib
import numpy as np
import torch
from torch import Tensor, nn

from anomaly_detection.data.layouts import scan_category
from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.mvtec import read_sample
from anomaly_detection.data.prepare import prepare_category
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.data.transforms import get_test_transforms
from anomaly_detection.evaluator import evaluate
from anomaly_detection.export import export_detector
from anomaly_detection.inference import Detector, save_detector
from anomaly_detection.metrics import compute_auroc
from anomaly_detection.models import restore, snapshot
from anomaly_detection.models.stfpm import STFPMModel, STFPMTrainer
from anomaly_detection.trainer import Callback, choose_device, choose_dtype, dtype_name

Result = dict[str, float]


class Epochs(Callback):
    """Record when each epoch began, and when training ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, epoch: int) -> None:
        """Note it."""
        self.times.append(time.perf_counter())

    def on_fit_end(self) -> None:
        """Note it."""
        self.times.append(time.perf_counter())


def training(folder: Path, settings: dict[str, Any]) -> Result:
    """Whole epochs of `STFPMTrainer.fit`, with checkpoints; the first epoch is a warm-up."""
    clock = Epochs()
    loader = _loader(folder, "fit", settings, shuffle=True)
    with tempfile.TemporaryDirectory() as checkpoints:
        trainer = _trainer(settings, checkpoint_dir=checkpoints, callbacks=[clock])
        trainer.fit(loader, num_epochs=1 + settings["epochs"])
    items = settings["epochs"] * len(loader.dataset)
    return {"seconds": clock.times[-1] - clock.times[1], "items": items}


def bare_training(folder: Path, settings: dict[str, Any]) -> Result:
    """The same steps on tensors in memory, without the trainer."""
    device = choose_device()
    model = _model(settings).to(device).train()
    trainer = STFPMTrainer(model, checkpoint_dir=None, precision="auto")  # for its loss
    optimizer, dtype = torch.optim.AdamW(model.student_model.parameters()), trainer.dtype
    batches = _batches(folder, "fit", settings, device)
    for epoch in range(1 + settings["epochs"]):
        if epoch == 1:
            start = time.perf_counter()
        for images in batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = trainer.loss_fn(*model(images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    _synchronise(device)
    items = settings["epochs"] * sum(map(len, batches))
    return {"seconds": time.perf_counter() - start, "items": items}


def evaluation(folder: Path, settings: dict[str, Any]) -> Result:
    """Scores, maps and all metrics on the test images, which have masks."""
    device = choose_device()
    model = _detector(settings, device)
    loader = _loader(folder, "test", settings)
    evaluate(model, [next(iter(loader))], device, threshold=1.0)
    compute_auroc([0.0, 1.0], [0, 1])  # imports scikit-learn
    start = time.perf_counter()
    evaluate(model, loader, device, threshold=1.0)
    return {"seconds": time.perf_counter() - start, "items": len(loader.dataset)}


def bare_forward(folder: Path, settings: dict[str, Any]) -> Result:
    """Scores and maps only, for images in memory."""
    device = choose_device()
    model = _detector(settings, device)
    batches = _batches(folder, "test", settings, device)
    with torch.inference_mode():
        model(batches[0])
    start = time.perf_counter()
    with torch.inference_mode():
        for images in batches:
            model(images)
    _synchronise(device)
    return {"seconds": time.perf_counter() - start, "items": sum(map(len, batches))}


def one_image(folder: Path, settings: dict[str, Any]) -> Result:
    """From the bytes of a file to the verdict, image by image."""
    device = choose_device()
    model = _detector(settings, device)
    transform = get_test_transforms(settings["image_size"])
    samples = [x for x in scan_category(folder, "raw")[1] if x.split == "test"][:24]
    rejected = []
    for i, sample in enumerate(samples):
        if i == 4:
            start = time.perf_counter()
        image = read_sample(sample, transform)["image"]
        with torch.inference_mode():
            rejected.append(model(image[None].to(device))["pred_score"].item() > 1)
    return {"seconds": time.perf_counter() - start, "items": len(samples) - 4}


def exported_image(folder: Path, settings: dict[str, Any]) -> Result:
    """From a file to the verdict, image by image, by the ONNX export in onnxruntime."""
    with tempfile.TemporaryDirectory() as name:
        file, exports = Path(name) / "detector.pt", Path(name) / "exports"
        save_detector(
            file,
            model=_snapshot(settings),
            threshold=1.0,
            calibration_scores=[0.0],
            preprocessing={"image_size": settings["image_size"], "bit_depth": 16},
            precision="float32",
            parameters={},
            provenance={},
        )
        export_detector(file, ["onnx"], exports, np.empty(0))
        detector = Detector.load(exports)
        paths = sorted((folder / "raw" / "test").rglob("*.png"))[:24]
        for i, path in enumerate(paths):
            if i == 4:
                start = time.perf_counter()
            detector.predict(path)
        return {"seconds": time.perf_counter() - start, "items": len(paths) - 4}


def prepare(folder: Path, settings: dict[str, Any]) -> Result:
    """Decoding, resizing, hashing, splitting and writing."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        start = time.perf_counter()
        prepare_raw(folder, Path(output) / "prepared", settings["image_size"])
    return {"seconds": time.perf_counter() - start, "items": len(scan_category(folder, "raw")[1])}


def decoding(folder: Path, settings: dict[str, Any]) -> Result:
    """Decode images and masks on all cores, and discard them."""
    samples = scan_category(folder, "raw")[1]
    start = time.perf_counter()
    read = joblib.delayed(lambda sample: read_sample(sample)["label"])
    joblib.Parallel(n_jobs=-1, prefer="threads")(map(read, samples))
    return {"seconds": time.perf_counter() - start, "items": len(samples)}


def first_step(folder: Path, settings: dict[str, Any]) -> Result:
    """The clock time at which the first training step ended; the caller knows the start."""

    class Stop(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            print(json.dumps({"done": time.time()}), flush=True)
            sys.exit()

    trainer = _trainer(settings, callbacks=[Stop()])
    trainer.fit(_loader(folder, "fit", settings, shuffle=True))
    raise AssertionError


def prepare_once(folder: Path, settings: dict[str, Any]) -> Result:
    """Write the arrays that the other tasks read."""
    prepare_raw(folder, folder / "prepared", settings["image_size"])
    return {}


def layers(folder: Path, settings: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the levels, for the peer."""
    return {"layers": _model(settings).hyperparameters["layers"]}


def prepare_raw(folder: Path, output: Path, image_size: int) -> None:
    """Prepare `folder`/raw as arrays."""
    fractions = {"validation_fraction": 0.01, "calibration_fraction": 0.01}
    prepare_category(
        folder, "raw", output, image_size=image_size, bit_depth=16, seed=0, **fractions
    )


def _model(settings: dict[str, Any]) -> STFPMModel:
    torch.manual_seed(0)
    return STFPMModel(settings["backbone"], weights=settings["weights"])


def _snapshot(settings: dict[str, Any]) -> dict[str, Any]:
    model, side = _model(settings), settings["image_size"]
    noise = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    model.standardise([{"image": noise}], torch.device("cpu"))  # any scale will do
    return snapshot("stfpm", model)


def _detector(settings: dict[str, Any], device: torch.device) -> nn.Module:
    dtype = choose_dtype(settings["evaluation_precision"], device)
    return restore(_snapshot(settings), device, dtype)


def _trainer(settings: dict[str, Any], **options: Any) -> STFPMTrainer:
    """A trainer with the defaults of params.yaml."""
    return STFPMTrainer(_model(settings), precision="auto", feature_cache=4, **options)


def _loader(folder: Path, split: str, settings: dict[str, Any], **options: Any) -> Iterable:
    dataset = PreparedDataset(folder / "prepared", split, choose_device())
    return create_dataloader(dataset, settings["batch_size"], **options)


def _batches(
    folder: Path, split: str, settings: dict[str, Any], device: torch.device
) -> list[Tensor]:
    return [batch["image"].to(device) for batch in _loader(folder, split, settings)]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


WORK: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    work.__name__: work
    for work in (
        training,
        bare_training,
        evaluation,
        bare_forward,
        one_image,
        exported_image,
        prepare,
        prepare_once,
        decoding,
        first_step,
        layers,
    )
}


def main(name: str, folder: str, settings: str) -> None:
    """Do the task, and print seconds, number of images and precision."""
    values = json.loads(settings)
    result = WORK[name](Path(folder), values)
    precision = dtype_name(choose_dtype("auto", choose_device()))
    print(json.dumps(result | {"precision": precision}))


if __name__ == "__main__":
    run(main)
