"""The training loop, its hooks and callbacks; see test_trainer_checkpoints for what it writes."""

import math
import re
import subprocess
from functools import partial

import pytest
import torch
from builders.trainers import (
    HOOKS,
    LineTrainer,
    MomentumTrainer,
    Recorder,
    fitted,
    line_model,
    loader,
    make,
    resumed,
    sgd,
)
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from anomaly_detection.trainer import (
    BaseTrainer,
    Callback,
    EarlyStopping,
    GradientClipping,
    LearningRateLogger,
    TrainingError,
)
from anomaly_detection.trainer.batches import number_of_images, on_device
from stages.live import DVCLiveLogger

SGD, FROZEN = sgd(line_model()), sgd(line_model().requires_grad_(False))


def test_hooks_are_called_in_the_documented_order():
    recorder = Recorder()

    class Scheduler:
        def step(self):
            recorder.calls.append(("scheduler",))

    class Trainer(LineTrainer):
        def configure_optimizers(self):
            return super().configure_optimizers() | {"scheduler": Scheduler()}

        def training_step(self, batch, batch_idx):
            recorder.calls.append(("training_step",))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            recorder.calls.append(("validation_step",))
            return super().validation_step(batch, batch_idx)

        def save_checkpoint(self, epoch, metrics):
            recorder.calls.append(("checkpoint", epoch))

    make(Trainer, callbacks=[recorder]).fit(loader(), loader(2), num_epochs=2)

    def epoch(number):
        return [
            ("on_train_epoch_start", number),
            ("on_train_batch_start", 0),
            ("training_step",),
            ("on_before_optimizer_step",),
            ("on_train_batch_end", 0),
            ("on_train_batch_start", 1),
            ("training_step",),
            ("on_before_optimizer_step",),
            ("on_train_batch_end", 1),
            ("on_train_epoch_end", number),
            ("on_validation_epoch_start", number),
            ("on_validation_batch_start", 0),
            ("validation_step",),
            ("on_validation_batch_end", 0),
            ("on_validation_epoch_end", number),
            ("scheduler",),
            ("checkpoint", number),
        ]

    assert recorder.calls == [("on_fit_start",), *epoch(0), *epoch(1), ("on_fit_end",)]
    assert {call[0] for call in recorder.calls} >= set(HOOKS)


def test_the_trainers_own_hook_comes_before_the_callbacks_in_list_order():
    calls = []
    trainer = make(callbacks=[Callback(), Callback()])
    for name, hooks in zip(("own", "a", "b"), (trainer, *trainer.callbacks), strict=True):
        hooks.on_fit_start = partial(calls.append, name)
    trainer.fit(loader())
    assert calls == ["own", "a", "b"]


def test_hooks_receive_what_they_promise():
    seen = {"losses": []}

    class Trainer(LineTrainer):
        def on_train_batch_end(self, batch, batch_idx, outputs, loss):
            seen["losses"].append((outputs["loss"].item(), loss))

        def on_train_epoch_end(self, epoch, train_loss):
            seen["train_loss"] = train_loss

        def on_validation_epoch_end(self, epoch, val_metrics):
            seen["val_metrics"] = val_metrics

    trainer = fitted(Trainer)
    assert all(output == loss for output, loss in seen["losses"])
    assert seen["train_loss"] == pytest.approx(sum(loss for _, loss in seen["losses"]) / 2)
    assert trainer.history == [
        {
            "epoch": 1,
            "train_loss": seen["train_loss"],
            "val_loss": seen["val_metrics"]["loss"],
            "learning_rate": 0.1,
        }
    ]


def test_hooks_and_optimizers_find_loaders_and_budget():
    seen = []

    class Looks(LineTrainer):
        def configure_optimizers(self):
            self.on_fit_start()
            return super().configure_optimizers()

        def on_fit_start(self):
            seen.append((self.train_loader, self.val_loader, self.num_epochs, self.num_steps))

    one, other = loader(), loader()
    make(Looks).fit(one, other, 2, num_steps=3)
    make(Looks).fit(one)
    assert seen == [(one, other, 2, 3)] * 2 + [(one, None, 1, None)] * 2


@pytest.mark.parametrize("base", [BaseTrainer, Callback])
def test_a_misspelled_hook_is_an_error_when_the_class_is_made(base):
    with pytest.raises(TypeError, match="on_train_epoch_ends is not a hook; did you mean on_train"):
        type("Wrong", (base,), {"on_train_epoch_ends": lambda self: None})


@pytest.mark.parametrize(
    ("hook", "steps", "epochs"),
    [
        ("on_train_epoch_start", 0, 1),
        ("on_train_batch_start", 1, 1),
        ("on_train_batch_end", 1, 1),
        ("on_train_epoch_end", 2, 1),
        ("on_validation_batch_start", 2, 1),
        ("on_validation_epoch_end", 2, 1),
    ],
)
def test_stop_iteration_in_a_hook_ends_training_cleanly(tmp_path, hook, steps, epochs):
    def stop(self, *args):
        raise StopIteration

    stops, recorder = type("Stops", (LineTrainer,), {hook: stop}), Recorder()
    trainer = fitted(stops, 5, checkpoint_dir=tmp_path, callbacks=[recorder])
    assert recorder.count("on_train_batch_end") == steps
    assert len(trainer.history) == epochs
    assert recorder.calls[-1] == ("on_fit_end",)
    assert (tmp_path / f"epoch_{epochs - 1}.pth").exists()


def test_one_step_is_the_one_worked_out_by_hand():
    # x = 1, y = 2, slope 0: loss 4, gradient -4, new slope 0 + 0.1 * 4.
    trainer = make()
    trainer.fit(loader(1, batch_size=1))
    assert trainer.history[0]["train_loss"] == pytest.approx(4.0)
    assert trainer.model.weight.item() == pytest.approx(0.4)


def test_validation_loss_is_the_mean_over_images_and_not_over_batches():
    # x = 1/3, 2/3, 1 and y = 2 x, slope 0: squares 4/9, 16/9, 4, in batches of two and one.
    assert make().validate_epoch(loader(3)) == {"loss": pytest.approx(56 / 27)}


def test_a_single_batch_is_learnt_by_heart():
    history = make().fit(loader(4, batch_size=4), num_epochs=30)
    assert history[-1]["train_loss"] < 0.1 * history[0]["train_loss"]


def test_training_runs_in_train_mode_and_validation_in_eval_mode_without_gradients():
    modes = []

    class Trainer(LineTrainer):
        def on_train_batch_start(self, batch, batch_idx):
            modes.append(("train", self.model.training, torch.is_grad_enabled()))

        def on_validation_batch_start(self, batch, batch_idx):
            modes.append(("validation", self.model.training, torch.is_grad_enabled()))

    make(Trainer).fit(loader(2), loader(2), num_epochs=2)
    assert modes == [("train", True, True), ("validation", False, False)] * 2


def test_a_budget_in_steps_may_end_within_an_epoch():
    trainer, data = make(), loader(6)
    trainer.fit(data, num_epochs=9, num_steps=4)
    batches = [x.square().mean().item() for x, _ in data]
    slope = 0.0
    for square in [*batches, batches[0]]:
        slope += 0.1 * 2 * square * (2 - slope)
    assert (trainer.current_epoch, trainer.step) == (1, 4)
    assert trainer.model.weight.item() == pytest.approx(slope)
    assert [row["epoch"] for row in trainer.history] == [1, 2]


@pytest.mark.parametrize(
    "budget", [{"num_epochs": 2, "num_steps": 99}, {"num_epochs": 9, "num_steps": 6}]
)
def test_training_ends_with_the_epochs_or_the_steps_whichever_is_sooner(budget):
    trainer = make()
    trainer.fit(loader(6), **budget)
    assert (trainer.step, len(trainer.history)) == (6, 2)


def test_a_budget_counts_steps_of_the_optimizer_and_not_batches():
    recorder = Recorder()
    trainer = make(accumulate_batches=2, callbacks=[recorder])
    trainer.fit(loader(8), num_epochs=9, num_steps=3)
    assert recorder.count("on_before_optimizer_step") == trainer.step == 3
    assert recorder.count("on_train_batch_end") == 6


def test_accumulated_batches_step_like_one_large_batch():
    small, large = make(accumulate_batches=2), make()
    small.fit(loader(4, batch_size=2), num_epochs=3)
    large.fit(loader(4, batch_size=4), num_epochs=3)
    assert small.model.weight.item() == pytest.approx(large.model.weight.item())


def test_the_last_group_of_accumulated_batches_may_be_smaller():
    gradients = []

    class Trainer(LineTrainer):
        def on_before_optimizer_step(self):
            gradients.append(self.model.weight.grad.item())

    make(Trainer, accumulate_batches=2).fit(loader(3, batch_size=1))
    # Slope 0, x = 1/3 and 2/3: the mean of -4 x^2; then x = 1 alone with the new slope.
    mean = -4 * (1 / 9 + 4 / 9) / 2
    assert gradients == pytest.approx([mean, -2 * (2 + 0.1 * mean)])


@pytest.mark.parametrize(
    ("interval", "accumulate_batches", "rates"),
    [
        ({"interval": "step"}, 1, [8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625]),
        ({"interval": "step"}, 2, [8, 4, 2, 1]),
        ({"interval": "epoch"}, 1, [8, 8, 8, 8, 4, 4, 4, 4]),
        ({}, 2, [8, 8, 4, 4]),
    ],
)
def test_a_scheduler_steps_every_epoch_or_with_every_step_of_the_optimizer(
    interval, accumulate_batches, rates
):
    class Halves(LineTrainer):
        def configure_optimizers(self):
            optimizer = sgd(self.model, 8e-3)
            halving = StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "scheduler": halving, **interval}

        def on_before_optimizer_step(self):
            seen.append(1e3 * self.optimizer.param_groups[0]["lr"])

    seen = []
    make(Halves, accumulate_batches=accumulate_batches).fit(loader(8), num_epochs=2)
    assert seen == pytest.approx(rates)


def test_a_plateau_scheduler_sees_the_validation_loss():
    class Plateau(LineTrainer):
        def configure_optimizers(self):
            optimizer = sgd(self.model, 1.0)
            plateau = ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "scheduler": plateau}

    trainer = fitted(Plateau, 3, losses=[1.0, 1.0, 1.0])
    assert [row["learning_rate"] for row in trainer.history] == pytest.approx([1.0, 1.0, 0.1])


def test_batches_of_any_kind_are_counted_and_moved_to_the_device():
    images = torch.zeros(3, 1)
    for batch in (
        images,
        {"path": ["a", "b", "c"], "image": images},
        [torch.tensor(0.5), (images, torch.zeros(5))],
    ):
        assert number_of_images(batch) == 3
    assert number_of_images(["a", 7]) == 0
    moved = on_device({"a": [images, "text"], "b": (images,)}, torch.device("meta"))
    assert moved["a"][1] == "text"
    assert moved["a"][0].is_meta
    assert moved["b"][0].is_meta


def test_other_devices_than_the_cpu_are_not_waited_for_between_batches():
    """A loss on the device `meta` has no value: to look at one is an error."""
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="meta"):
        make(device="meta", callbacks=[recorder]).fit(loader(6))
    assert recorder.count("on_train_batch_end") == 3


def test_each_epoch_is_a_line_with_its_losses_speed_and_the_time_left(tmp_path, capsys):
    make(checkpoint_dir=tmp_path).fit(loader(), loader(2), num_epochs=2)
    first, second = capsys.readouterr().err.splitlines()
    losses = r"train loss \d\.\d+, validation loss \d\.\d+, \d+ images/s"
    assert re.fullmatch(rf"epoch 1/2: {losses}, 0 s left", first)
    assert re.fullmatch(rf"epoch 2/2: {losses}", second)
    trainer = make(checkpoint_dir=tmp_path)
    trainer.resume()
    trainer.fit(loader(), num_epochs=3)
    note, third = capsys.readouterr().err.splitlines()
    assert note == "going on after epoch 2 of an interrupted training"
    assert re.fullmatch(r"epoch 3/3: train loss \d\.\d+, \d+ images/s", third)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, value):
    class Explodes(LineTrainer):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            if self.current_epoch == 1 and batch_idx == 1:
                outputs["loss"] = outputs["loss"] * value
            return outputs

    with pytest.raises(TrainingError, match=rf"got {value} in epoch 2, batch 1"):
        fitted(Explodes, 3, checkpoint_dir=tmp_path)
    assert torch.load(tmp_path / "epoch_0.pth", weights_only=True)["epoch"] == 0


def test_an_out_of_memory_error_says_what_to_change():
    class Full(LineTrainer):
        def training_step(self, batch, batch_idx):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(TrainingError, match=r"Tried to allocate .* lower training.batch_size"):
        fitted(Full)


@pytest.mark.parametrize(
    ("method", "result", "text"),
    [
        ("training_step", {"los": 1}, "training_step must return a dict with 'loss'"),
        ("training_step", 1.0, "training_step must return a dict with 'loss'"),
        ("compute_metrics", {"error": 1.0}, r"must have 'loss' .* got \['error'\]"),
        ("configure_optimizers", {}, "must return a dict with 'optimizer'"),
        ("configure_optimizers", SGD, "and optionally 'scheduler' and 'interval', got SGD"),
        ("configure_optimizers", {"optimizer": FROZEN}, "a parameter that requires a gradient"),
        ("configure_optimizers", {"optimizer": SGD, "interval": "x"}, "'epoch' or 'step', got 'x'"),
        (
            "configure_optimizers",
            {"optimizer": SGD, "scheduler": ReduceLROnPlateau(SGD), "interval": "step"},
            "interval must be 'epoch' for ReduceLROnPlateau",
        ),
    ],
)
def test_a_wrong_subclass_is_told_what_is_expected(method, result, text):
    with pytest.raises(TrainingError, match=text):
        fitted(type("Wrong", (LineTrainer,), {method: lambda self, *args: result}), 2)


@pytest.mark.parametrize("which", ["training", "validation"])
def test_an_empty_loader_is_refused_before_the_first_step(which):
    loaders = [loader(), loader()]
    loaders[which == "validation"] = []
    trainer = make()
    with pytest.raises(TrainingError, match=f"the {which} loader must have at least one batch"):
        trainer.fit(*loaders)
    assert trainer.step == 0


def test_early_stopping_waits_for_patience_epochs_without_improvement():
    stopper = EarlyStopping(patience=3, min_delta=0.1)
    trainer = fitted(num_epochs=6, losses=[3.0, 2.0, 2.0, 1.95, 2.5, 1.0], callbacks=[stopper])
    assert len(trainer.history) == 5


def test_early_stopping_can_maximise():
    stopper = EarlyStopping(patience=1, monitor="auroc", mode="max")
    stopper.on_validation_epoch_end(1, {"auroc": 0.5})
    stopper.on_validation_epoch_end(2, {"auroc": 0.6})
    with pytest.raises(StopIteration):
        stopper.on_validation_epoch_end(3, {"auroc": 0.55})


def test_early_stopping_refuses_wrong_values_and_names_the_metrics_that_there_are():
    with pytest.raises(ValueError, match="patience must be at least 1"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="'up'"):
        EarlyStopping(patience=1, mode="up")
    with pytest.raises(TrainingError, match=r"monitor one of \['loss'\], got 'score'"):
        fitted(callbacks=[EarlyStopping(2, monitor="score")])


def test_gradients_are_clipped_before_the_optimizers_step():
    class TooLate(Callback):
        def on_train_batch_end(self, batch, batch_idx, outputs, loss):
            nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)

    # x = 1, y = 2, slope 0: gradient -4, clipped to -1; the step is 0.1 * 1 instead of 0.1 * 4.
    for callback, slope in ((GradientClipping(1.0), 0.1), (TooLate(), 0.4)):
        trainer = make(callbacks=[callback])
        trainer.fit(loader(1, batch_size=1))
        assert trainer.model.weight.item() == pytest.approx(slope)


def test_gradient_clipping_refuses_a_norm_that_is_not_positive():
    with pytest.raises(ValueError, match="must be greater than 0, got 0"):
        GradientClipping(0)


def test_learning_rates_are_those_that_the_epochs_trained_with():
    rates = LearningRateLogger()
    fitted(MomentumTrainer, 5, callbacks=[rates])
    assert rates.learning_rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def read_column(path):
    header, *rows = path.read_text().splitlines()
    return header.split("\t")[1], [float(row.split("\t")[1]) for row in rows]


@pytest.mark.parametrize("with_git", [False, True])
def test_dvclive_writes_every_epoch_also_without_git_and_without_a_commit(
    tmp_path, monkeypatch, with_git
):
    monkeypatch.chdir(tmp_path)
    if with_git:
        subprocess.run(["git", "init", "-q"], check=True)
    seen = []

    class Watches(Callback):
        def on_train_epoch_start(self, epoch):
            path = tmp_path / "live/plots/metrics/train_loss.tsv"
            seen.append(len(read_column(path)[1]) if path.exists() else 0)

    trainer = fitted(num_epochs=3, callbacks=[DVCLiveLogger("live"), Watches()])
    for name in ("train_loss", "val_loss", "learning_rate"):
        values = [row[name] for row in trainer.history]
        assert read_column(tmp_path / f"live/plots/metrics/{name}.tsv") == (name, values)
    assert seen == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} <= {"live", ".git"}


def test_dvclive_holds_all_epochs_after_a_resume(tmp_path):
    fitted(num_epochs=2, checkpoint_dir=tmp_path, callbacks=[DVCLiveLogger(tmp_path / "a")])
    trainer = resumed(tmp_path / "epoch_1.pth", callbacks=[DVCLiveLogger(tmp_path / "b")])
    trainer.fit(loader(), loader(), num_epochs=3)
    losses = [row["train_loss"] for row in trainer.history]
    assert read_column(tmp_path / "b/plots/metrics/train_loss.tsv") == ("train_loss", losses)
