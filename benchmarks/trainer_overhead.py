"""One epoch of the trainer against a bare loop: same tensors, same model, alternating.

    python -m benchmarks.trainer_overhead [CATEGORY] [RUNS]

What the trainer has and the bare loop has not: hooks, callbacks, the check of the loss, progress,
checkpoints after each epoch, DVCLive's files. Needs data/prepared/CATEGORY from `dvc repro`.
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path

from stages import run  # isort: skip, before PyTorch: it makes idle threads sleep

import torch

from anomaly_detection.callbacks import DVCLiveLogger, EarlyStopping
from anomaly_detection.data import PreparedDataset, create_dataloader
from anomaly_detection.models.stfpm import STFPMModel, STFPMTrainer
from anomaly_detection.seed import seed_everything


def bare_epoch(trainer: STFPMTrainer, batches: list[dict]) -> None:
    """The same steps with nothing around them."""
    model, optimizer = trainer.model.train(), trainer.optimizer
    for batch in batches:
        loss = trainer.loss_fn(*model(batch["image"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole_epoch(trainer: STFPMTrainer, batches: list[dict]) -> None:
    """One more epoch of the trainer, with its checkpoint."""
    trainer.fit(batches, num_epochs=trainer.epoch + 1)


def main(category: str = "mono", runs: str = "7") -> None:
    """Print seconds of both, and the ratios pair by pair."""
    seed_everything(0)
    dataset = PreparedDataset(Path("data/prepared") / category, "fit")
    batches = list(create_dataloader(dataset, 32))
    model = STFPMModel()
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            STFPMTrainer(
                copy.deepcopy(model),
                device="auto",
                checkpoint_dir=folder,
                callbacks=[EarlyStopping(5), DVCLiveLogger(Path(folder) / "live")],
            )
            for _ in range(2)
        ]
        seconds: dict[str, list[float]] = {"bare": [], "trainer": []}
        for pair in range(int(runs) + 1):
            for name, epoch, trainer in zip(
                seconds, (bare_epoch, whole_epoch), trainers, strict=True
            ):
                trainer._set_up(batches, None)
                start = time.perf_counter()
                epoch(trainer, batches)
                if pair:  # the first is for warming up
                    seconds[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds["bare"], seconds["trainer"], strict=True)]
    threads = torch.get_num_threads()
    print(f"{len(dataset)} images of {dataset.image_size} pixels, {threads} threads, {runs} pairs")
    for name, values in {**seconds, "ratio": ratios}.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:8} median {middle:.3f}   from {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    run(main)
