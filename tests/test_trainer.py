import copy
import hashlib
import math
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from anomaly_detection.data import create_dataloader
from anomaly_detection.trainer import (
    BaseTrainer,
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    TrainingError,
    choose_device,
    choose_dtype,
    count_batch_norm_once,
    describe_hardware,
    save_atomically,
    seed_everything,
)
from anomaly_detection.trainer.loop import number_of_images
from anomaly_detection.trainer.numerics import synchronise_batch_norm

HOOKS = {
    "on_fit_start",
    "on_fit_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
}


class LineTrainer(BaseTrainer):
    """Fits y = a x; the loss of a batch is the mean squared error."""

    learning_rate = 0.1

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": self.loss_fn(self.model(x), y)}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": (self.model(x) - y).square()}

    def configure_optimizers(self):
        return {"optimizer": torch.optim.SGD(self.model.parameters(), self.learning_rate)}


def line_model(slope=0.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, slope)
    return model


def loader(num=4, batch_size=2, slope=2.0):
    x = torch.arange(1.0, num + 1)[:, None] / num
    return DataLoader(TensorDataset(x, slope * x), batch_size=batch_size)


def make(cls=LineTrainer, **options):
    return cls(line_model(), nn.MSELoss(), "cpu", **options)


class Recorder(Callback):
    def __init__(self):
        self.calls = []


for hook in HOOKS:

    def record(self, *args, hook=hook):
        self.calls.append((hook, *(arg for arg in args if isinstance(arg, int))))

    setattr(Recorder, hook, record)


def test_each_epoch_is_a_line_with_its_losses_speed_and_the_time_left(tmp_path, capsys):
    make(checkpoint_dir=tmp_path).fit(loader(), loader(2), num_epochs=2)
    first, second = capsys.readouterr().err.splitlines()
    losses = r"train loss \d\.\d+, validation loss \d\.\d+, \d+ images/s"
    assert re.fullmatch(rf"epoch 1/2: {losses}, 0 s left", first)
    assert re.fullmatch(rf"epoch 2/2: {losses}", second)
    resumed = make(checkpoint_dir=tmp_path)
    resumed.load_latest_checkpoint()
    resumed.fit(loader(), num_epochs=3)
    note, third = capsys.readouterr().err.splitlines()
    assert note == "going on after epoch 2 of an interrupted training"
    assert re.fullmatch(r"epoch 3/3: train loss \d\.\d+, \d+ images/s", third)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 1),
        {"path": ["a", "b", "c"], "image": torch.zeros(3, 1)},
        [torch.tensor(0.5), (torch.zeros(3, 1), torch.zeros(5))],
    ],
    ids=["tensor", "dict", "nested"],
)
def test_images_are_counted_in_batches_of_any_kind(batch):
    assert number_of_images(batch) == 3
    assert number_of_images(["a", 7]) == 0


def test_hooks_are_called_in_the_documented_order(tmp_path):
    recorder = Recorder()

    class Scheduler:
        def step(self):
            recorder.calls.append(("scheduler",))

        def state_dict(self):
            return {}

    class Trainer(LineTrainer):
        def configure_optimizers(self):
            return super().configure_optimizers() | {"scheduler": Scheduler()}

        def training_step(self, batch, batch_idx):
            recorder.calls.append(("training_step",))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            recorder.calls.append(("validation_step",))
            return super().validation_step(batch, batch_idx)

        def save_checkpoint(self, is_best=False):
            recorder.calls.append(("checkpoint",))

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
            ("checkpoint",),
        ]

    end = [("on_fit_end",), ("checkpoint",)]
    assert recorder.calls == [("on_fit_start",), *epoch(1), *epoch(2), *end]


def test_the_trainers_own_hook_comes_before_the_callbacks_in_list_order():
    calls = []

    class Named(Callback):
        def __init__(self, name):
            self.name = name

        def on_fit_start(self):
            calls.append(self.name)

    class Trainer(LineTrainer):
        def on_fit_start(self):
            calls.append("own")

    make(Trainer, callbacks=[Named("a"), Named("b")]).fit(loader(), num_epochs=1)
    assert calls == ["own", "a", "b"]


def test_hooks_receive_what_they_promise():
    seen = {}

    class Trainer(LineTrainer):
        def on_train_batch_end(self, batch, batch_idx, outputs, loss):
            seen.setdefault("losses", []).append((outputs["loss"].item(), loss))

        def on_train_epoch_end(self, epoch, train_loss):
            seen["train_loss"] = train_loss

        def on_validation_epoch_end(self, epoch, val_metrics):
            seen["val_metrics"] = val_metrics

    trainer = make(Trainer)
    trainer.fit(loader(), loader(), num_epochs=1)
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


@pytest.mark.parametrize("base", [BaseTrainer, Callback])
def test_a_misspelled_hook_is_an_error_when_the_class_is_made(base):
    with pytest.raises(TypeError, match="on_train_epoch_ends is not a hook; did you mean on_train"):
        type("Wrong", (base,), {"on_train_epoch_ends": lambda self: None})


def test_one_step_is_the_one_worked_out_by_hand():
    # x = 1, y = 2, slope 0: loss 4, gradient -4, new slope 0 + 0.1 * 4.
    trainer = make()
    trainer.fit(loader(num=1, batch_size=1), num_epochs=1)
    assert trainer.history[0]["train_loss"] == pytest.approx(4.0)
    assert trainer.model.weight.item() == pytest.approx(0.4)


def test_validation_loss_is_the_mean_over_images_and_not_over_batches():
    # x = 1/3, 2/3, 1 and y = 2 x, slope 0: squares 4/9, 16/9, 4, in batches of two and one.
    trainer = make()
    assert trainer.validate_epoch(loader(3)) == {"loss": pytest.approx(56 / 27)}


def test_a_single_batch_is_learnt_by_heart():
    trainer = make()
    history = trainer.fit(loader(4, 4), num_epochs=30)
    assert history[-1]["train_loss"] < 0.1 * history[0]["train_loss"]


def test_training_runs_in_train_mode_and_validation_in_eval_mode_without_gradients():
    modes = []

    class Trainer(LineTrainer):
        def training_step(self, batch, batch_idx):
            modes.append((self.model.training, torch.is_grad_enabled()))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            modes.append((self.model.training, torch.is_grad_enabled()))
            return super().validation_step(batch, batch_idx)

    make(Trainer).fit(loader(2), loader(2), num_epochs=2)
    assert modes == [(True, True), (False, False)] * 2


@pytest.mark.parametrize(
    ("hook", "steps", "epochs"),
    [
        ("on_fit_start", 0, 0),
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

    counter = Recorder()
    trainer = make(
        type("Stops", (LineTrainer,), {hook: stop}), checkpoint_dir=tmp_path, callbacks=[counter]
    )
    trainer.fit(loader(), loader(), num_epochs=5)
    called = [call[0] for call in counter.calls]
    assert called.count("on_train_batch_end") == steps
    assert trainer.epoch == epochs
    assert called[-1] == "on_fit_end"
    assert (tmp_path / f"epoch_{epochs}.pth").exists()


def test_early_stopping_waits_for_patience_epochs_without_improvement():
    class Scripted(LineTrainer):
        losses = iter([3.0, 2.0, 2.0, 1.95, 2.5, 1.0])

        def compute_metrics(self, outputs):
            return {"loss": next(self.losses)}

    stopper = EarlyStopping(patience=3, min_delta=0.1)
    trainer = make(Scripted, callbacks=[stopper])
    trainer.fit(loader(), loader(), num_epochs=6)
    assert trainer.epoch == 5


def test_early_stopping_names_the_metrics_that_there_are():
    class Scores(LineTrainer):
        def compute_metrics(self, outputs):
            return {"score": 1.0}

        def _is_better(self, metrics, best):
            return True

    with pytest.raises(TrainingError, match=r"monitor one of \['score'\], got 'loss'"):
        make(Scores, callbacks=[EarlyStopping(2)]).fit(loader(), loader(), num_epochs=2)


def test_early_stopping_can_maximise():
    stopper = EarlyStopping(patience=1, monitor="auroc", mode="max")
    stopper.on_validation_epoch_end(1, {"auroc": 0.5})
    stopper.on_validation_epoch_end(2, {"auroc": 0.6})
    with pytest.raises(StopIteration):
        stopper.on_validation_epoch_end(3, {"auroc": 0.55})


@pytest.mark.parametrize(
    ("options", "text"),
    [({"patience": 0}, "patience must be at least 1"), ({"patience": 1, "mode": "up"}, "'up'")],
)
def test_early_stopping_refuses_wrong_values(options, text):
    with pytest.raises(ValueError, match=text):
        EarlyStopping(**options)


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(tmp_path):
    class Scripted(LineTrainer):
        losses = iter([3.0, 1.0, 2.0])

        def compute_metrics(self, outputs):
            return {"loss": next(self.losses)}

    trainer = make(Scripted, checkpoint_dir=tmp_path)
    trainer.fit(loader(), loader(), num_epochs=3)
    best = torch.load(tmp_path / "best_model.pth", weights_only=True)
    assert best["epoch"] == 2
    assert best["best_metrics"] == {"loss": 1.0}


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        ({}, {"best_model", "epoch_5"}),
        ({"last": 2}, {"best_model", "epoch_4", "epoch_5"}),
        ({"last": None, "best": False}, {f"epoch_{i}" for i in range(1, 6)}),
        ({"last": 0}, {"best_model"}),
        ({"last": 1, "every": 2}, {"best_model", "epoch_2", "epoch_4", "epoch_5"}),
        ({"last": 0, "every": 2, "best": False}, {"epoch_2", "epoch_4"}),
    ],
)
def test_only_the_checkpoints_of_the_policy_stay(tmp_path, policy, names):
    trainer = make(checkpoint_dir=tmp_path, checkpoints=ModelCheckpoint(**policy))
    trainer.fit(loader(), loader(), num_epochs=5)
    assert {path.stem for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("policy", [{"last": -1}, {"every": 0}])
def test_a_policy_refuses_wrong_numbers(policy):
    with pytest.raises(ValueError, match="last must be at least 0 and every at least 1"):
        ModelCheckpoint(**policy)


class WithState(LineTrainer):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        return {
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        }


def test_training_continues_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    whole = make(WithState)
    whole.fit(loader(), loader(), num_epochs=5)
    make(WithState, checkpoint_dir=tmp_path).fit(loader(), loader(), num_epochs=3)
    resumed = make(WithState)
    resumed.load_checkpoint(tmp_path / "epoch_3.pth")
    assert resumed.epoch == 3
    resumed.fit(loader(), loader(), num_epochs=5)
    assert resumed.history == whole.history
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_the_same_training_writes_the_same_bytes(tmp_path):
    digests = set()
    for folder in ("a", "b"):
        seed_everything(0)
        make(checkpoint_dir=tmp_path / folder).fit(loader(), loader(), num_epochs=2)
        content = (tmp_path / folder / "best_model.pth").read_bytes()
        digests.add(hashlib.md5(content).hexdigest())
    assert len(digests) == 1


def test_a_plateau_scheduler_cannot_step_with_the_optimizer():
    class Trainer(LineTrainer):
        def configure_optimizers(self):
            configured = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(configured["optimizer"])
            return configured | {"scheduler": scheduler, "interval": "step"}

    with pytest.raises(TrainingError, match="interval must be 'epoch' for ReduceLROnPlateau"):
        make(Trainer).fit(loader(), loader(), num_epochs=1)


def test_plateau_scheduler_sees_the_validation_loss():
    class Plateau(LineTrainer):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.model.parameters(), 1.0)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "scheduler": plateau}

        def compute_metrics(self, outputs):
            return {"loss": 1.0}

    trainer = make(Plateau)
    trainer.fit(loader(), loader(), num_epochs=3)
    assert [row["learning_rate"] for row in trainer.history] == pytest.approx([1.0, 1.0, 0.1])


def test_without_a_validation_loader_the_training_loss_chooses_the_best(tmp_path):
    trainer = make(checkpoint_dir=tmp_path)
    trainer.fit(loader(), num_epochs=2)
    assert trainer.best_metrics == {"loss": trainer.history[-1]["train_loss"]}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, value):
    class Explodes(LineTrainer):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            if self.epoch == 2 and batch_idx == 1:
                outputs["loss"] = outputs["loss"] * value
            return outputs

    trainer = make(Explodes, checkpoint_dir=tmp_path)
    with pytest.raises(TrainingError, match=rf"got {value} in epoch 2, batch 1"):
        trainer.fit(loader(), loader(), num_epochs=3)
    assert torch.load(tmp_path / "epoch_1.pth", weights_only=True)["epoch"] == 1


def test_other_devices_than_the_cpu_are_not_waited_for_between_batches():
    """A loss on the device `meta` has no value: to look at one is an error."""
    recorder = Recorder()
    trainer = LineTrainer(line_model(), nn.MSELoss(), "meta", callbacks=[recorder])
    with pytest.raises(RuntimeError, match="meta"):
        trainer.fit(loader(6))
    assert [call for call in recorder.calls if call[0] == "on_train_batch_end"] == [
        ("on_train_batch_end", i) for i in range(3)
    ]


@pytest.mark.parametrize(
    ("method", "result", "text"),
    [
        ("training_step", {"los": 1}, "training_step must return a dict with 'loss'"),
        ("training_step", 1.0, "training_step must return a dict with 'loss'"),
        ("configure_optimizers", {}, "must return a dict with 'optimizer'"),
        (
            "configure_optimizers",
            torch.optim.SGD(line_model().parameters(), 1),
            "dict with 'optimizer' and optionally 'scheduler' and 'interval', got SGD",
        ),
        (
            "configure_optimizers",
            {"optimizer": torch.optim.SGD(line_model().requires_grad_(False).parameters(), 1)},
            "must have a parameter that requires a gradient",
        ),
        (
            "configure_optimizers",
            {"optimizer": torch.optim.SGD(line_model().parameters(), 1), "interval": "batch"},
            "interval must be 'epoch' or 'step', got 'batch'",
        ),
        ("compute_metrics", {"error": 1.0}, r"must have 'loss' .* got \['error'\]"),
    ],
)
def test_a_wrong_subclass_is_told_what_is_expected(method, result, text):
    trainer = make(type("Wrong", (LineTrainer,), {method: lambda self, *args: result}))
    with pytest.raises(TrainingError, match=text):
        trainer.fit(loader(), loader(), num_epochs=1)


@pytest.mark.parametrize("which", ["training", "validation"])
def test_an_empty_loader_is_refused_before_the_first_step(which):
    loaders = [loader(), loader()]
    loaders[which == "validation"] = []
    with pytest.raises(TrainingError, match=f"the {which} loader must have at least one batch"):
        make().fit(*loaders, num_epochs=1)


def test_an_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match=r"best_model.pth must be writable: "):
        make(checkpoint_dir=tmp_path / "file").fit(loader(), num_epochs=1)


FILL_THE_DISK = """
import resource, sys
from pathlib import Path
import torch
from anomaly_detection.trainer import TrainingError, save_atomically
path = Path(sys.argv[1])
save_atomically({"epoch": 1}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_atomically({"epoch": 2, "weights": torch.zeros(100_000)}, path)
except TrainingError as error:
    print(error)
print(torch.load(path)["epoch"], [file.name for file in path.parent.iterdir()])
"""


def test_a_full_disk_is_a_clear_error_and_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "model.pth"
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, path], capture_output=True, text=True, check=True
    )
    error, state = done.stdout.splitlines()
    assert error.startswith(f"{path} must be writable: ")
    assert state == "1 ['model.pth']"


def test_ctrl_c_while_a_checkpoint_is_written_is_no_error_of_the_disk(tmp_path):
    path = tmp_path / "model.pth"
    save_atomically(1, path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    content = [torch.zeros(10**6) for _ in range(40)]
    before = signal.signal(signal.SIGALRM, interrupt)
    for seconds in (0.003, 0.01, 0.02, 0.03):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with pytest.raises(KeyboardInterrupt):
            save_atomically(content, path)
    signal.signal(signal.SIGALRM, before)
    assert torch.load(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


def test_nested_batches_go_to_the_device():
    trainer = make()
    batch = trainer._to_device({"a": [torch.ones(1), "text"], "b": (torch.ones(2),)})
    assert batch["a"][1] == "text"
    assert batch["b"][0].device == trainer.device


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_steps_lead_to_the_same_line(precision):
    torch.manual_seed(0)
    trainer = make(precision=precision)
    trainer.fit(loader(), loader(), num_epochs=40)
    assert trainer.model.weight.item() == pytest.approx(2.0, abs=0.05)
    assert trainer.model.weight.dtype == torch.float32


def test_trained_depthwise_convolutions_are_in_float32_forward_and_backward():
    torch.manual_seed(0)
    frozen, trained = (nn.Conv2d(4, 4, 3, groups=4) for _ in range(2))
    model = nn.Sequential(frozen.requires_grad_(False), trained)
    LineTrainer(model, device="cpu", precision="bfloat16")
    images = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        between = frozen(images)
        output = trained(between)
    output.sum().backward()
    expected = F.conv2d(between.float(), trained.weight, trained.bias, groups=4)
    assert between.dtype == output.dtype == torch.bfloat16
    assert torch.equal(output, expected.to(torch.bfloat16))
    (gradient,) = torch.autograd.grad(expected.sum(), trained.weight)
    assert torch.equal(trained.weight.grad, gradient)


def test_auto_precision_is_one_that_the_cpu_has():
    assert choose_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16


def test_a_device_that_is_not_here_is_a_clear_error():
    with pytest.raises(TrainingError, match=r"must be a device of this machine, got cuda:99"):
        choose_device("cuda:99")


def test_auto_device_is_usable():
    assert torch.ones(1, device=choose_device("auto")).item() == 1


class OneCycle(LineTrainer):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        num_steps = self.num_steps or self.num_epochs * len(self.train_loader)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, num_steps)
        return {"optimizer": optimizer, "scheduler": scheduler, "interval": "step"}


class Interrupts(Callback):
    """Ctrl-C when so many steps have been taken; never after none."""

    def __init__(self, step=0):
        self.step = step

    def on_train_batch_end(self, batch, batch_idx, outputs, loss):
        if self.trainer.step == self.step:
            raise KeyboardInterrupt


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_budget_in_steps_may_end_within_an_epoch():
    trainer = make()
    data = loader(6)
    trainer.fit(data, num_epochs=9, num_steps=4)
    batches = [x.square().mean().item() for x, _ in data]
    slope = 0.0
    for square in [*batches, batches[0]]:
        slope += 0.1 * 2 * square * (2 - slope)
    assert (trainer.epoch, trainer.step) == (2, 4)
    assert trainer.model.weight.item() == pytest.approx(slope)
    assert [row["epoch"] for row in trainer.history] == [1, 2]


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({"num_epochs": 2, "num_steps": 99}, 2, 6),
        ({"num_epochs": 9, "num_steps": 6}, 2, 6),
        ({"num_epochs": 2}, 2, 6),
    ],
)
def test_training_ends_with_the_epochs_or_the_steps_whichever_is_sooner(options, epochs, steps):
    trainer = make()
    trainer.fit(loader(6), **options)
    assert (trainer.epoch, trainer.step, len(trainer.history)) == (epochs, steps, epochs)


def test_a_budget_counts_steps_of_the_optimizer_and_not_batches():
    recorder = Recorder()
    trainer = make(accumulate_batches=2, callbacks=[recorder])
    trainer.fit(loader(8), num_epochs=9, num_steps=3)
    called = [call[0] for call in recorder.calls]
    assert called.count("on_before_optimizer_step") == trainer.step == 3
    assert called.count("on_train_batch_end") == 6


def noisy(cls):
    """The trainer with noise in its steps, which draws numbers when it starts, too."""

    class Noisy(cls):
        def on_fit_start(self):
            torch.rand(3)

        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {"loss": outputs["loss"] * torch.rand(())}

    return Noisy


@pytest.mark.parametrize("cls", [WithState, OneCycle])
@pytest.mark.parametrize("budget", [{"num_epochs": 3}, {"num_epochs": 9, "num_steps": 8}])
@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_an_interrupted_training_ends_with_the_same_bytes(tmp_path, cls, budget, step):
    """Three batches in an epoch: the budget of eight steps ends within the third."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def trainer(folder, callback):
        seed_everything(0)
        trainer = make(noisy(cls), checkpoint_dir=folder, callbacks=[callback])
        trainer.load_latest_checkpoint()
        return trainer

    def data():
        return create_dataloader(loader(6).dataset, 2, shuffle=True, seed=1), loader()

    trainer(whole, Interrupts()).fit(*data(), **budget)
    with pytest.raises(KeyboardInterrupt):
        trainer(resumed, Interrupts(step)).fit(*data(), **budget)
    torch.rand(7)
    again = trainer(resumed, Interrupts())
    assert again.step == 3 * ((step - 1) // 3)
    again.fit(*data(), **budget)
    assert files(resumed) == files(whole)


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
            optimizer = torch.optim.SGD(self.model.parameters(), 8e-3)
            halving = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "scheduler": halving, **interval}

        def on_before_optimizer_step(self):
            seen.append(1e3 * self.optimizer.param_groups[0]["lr"])

    seen = []
    make(Halves, accumulate_batches=accumulate_batches).fit(loader(8), num_epochs=2)
    assert seen == pytest.approx(rates)


def test_what_is_changed_at_the_end_is_in_the_checkpoints_of_the_last_epoch(tmp_path):
    class Ends(LineTrainer):
        losses = iter([2.0, 1.0])

        def compute_metrics(self, outputs):
            return {"loss": next(self.losses)}

        def on_fit_end(self):
            nn.init.constant_(self.model.weight, 7.0)

    make(Ends, checkpoint_dir=tmp_path).fit(loader(), loader(), num_epochs=2)
    for name in ("epoch_2.pth", "best_model.pth"):
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        assert checkpoint["model_state_dict"]["weight"].item() == 7.0
        assert checkpoint["epoch"] == 2


def test_what_is_changed_at_the_end_leaves_the_best_model_of_an_earlier_epoch(tmp_path):
    class Ends(LineTrainer):
        losses = iter([1.0, 2.0])

        def compute_metrics(self, outputs):
            return {"loss": next(self.losses)}

        def on_fit_end(self):
            nn.init.constant_(self.model.weight, 7.0)

    make(Ends, checkpoint_dir=tmp_path).fit(loader(), loader(), num_epochs=2)
    best, last = (
        torch.load(tmp_path / name, weights_only=True)["model_state_dict"]["weight"].item()
        for name in ("best_model.pth", "epoch_2.pth")
    )
    assert best < 2
    assert last == 7.0


def test_hooks_and_optimizers_find_loaders_and_budget():
    seen = []

    class Looks(LineTrainer):
        def configure_optimizers(self):
            seen.append((self.train_loader, self.val_loader, self.num_epochs, self.num_steps))
            return super().configure_optimizers()

        def on_fit_start(self):
            seen.append((self.train_loader, self.val_loader, self.num_epochs, self.num_steps))

    one, other = loader(), loader()
    make(Looks).fit(one, other, 2, 3)
    make(Looks).fit(one)
    assert seen == [(one, other, 2, 3)] * 2 + [(one, None, 1, None)] * 2


def test_the_best_model_has_the_weights_of_its_epoch(tmp_path):
    class Scripted(LineTrainer):
        losses = iter([3.0, 1.0, 2.0])

        def compute_metrics(self, outputs):
            weights.append(self.model.weight.item())
            return {"loss": next(self.losses)}

    weights = []
    trainer = make(Scripted, checkpoint_dir=tmp_path)
    trainer.fit(loader(), loader(), num_epochs=3)
    assert trainer.model.weight.item() == weights[2]
    trainer.load_best_model()
    assert trainer.best_epoch == 2
    assert trainer.model.weight.item() == weights[1] != weights[2]


@pytest.mark.parametrize("with_folder", [True, False])
def test_a_best_model_that_is_not_saved_cannot_be_loaded(tmp_path, with_folder):
    folder = tmp_path if with_folder else None
    trainer = make(checkpoint_dir=folder, checkpoints=ModelCheckpoint(best=not with_folder))
    trainer.fit(loader())
    with pytest.raises(TrainingError) as error:
        trainer.load_best_model()
    assert str(error.value) == (
        f"the best model must have been saved, got checkpoint_dir {folder} and checkpoints.best "
        f"{not with_folder}."
    )


def batch_norm(**options):
    """A layer with other weights than those of a fresh one."""
    torch.manual_seed(0)
    norm = options.pop("cls", nn.BatchNorm2d)(3, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def test_gradient_checkpointing_counts_each_batch_once():
    images = torch.randn(4, 3, 5, 5, requires_grad=True)
    for norm in (batch_norm(), batch_norm(momentum=None), batch_norm(track_running_stats=False)):
        plain = copy.deepcopy(norm)
        count_batch_norm_once(norm)
        for _ in range(2):
            checkpoint(norm, images, use_reentrant=False).square().sum().backward()
            plain(images)
        torch.testing.assert_close(norm.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_gradient_checkpointing_leaves_frozen_statistics():
    norm = batch_norm().eval()
    count_batch_norm_once(norm)
    images = torch.randn(4, 3, 5, 5, requires_grad=True)
    checkpoint(norm, images, use_reentrant=False).square().sum().backward()
    assert norm.num_batches_tracked.item() == 0


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"momentum": None},
        {"track_running_stats": False},
        {"cls": BatchNormAct2d},
    ],
    ids=str,
)
def test_synchronised_batch_norm_of_one_process_is_pytorchs(options):
    plain, norm = batch_norm(**options), batch_norm(**options)
    synchronise_batch_norm(norm)
    for images in torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0)):
        pairs = [images.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(x) for layer, x in zip((plain, norm), pairs, strict=True)]
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(pairs[1].grad, pairs[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    torch.testing.assert_close(norm.eval()(images), plain.eval()(images))


def test_hardware_is_described_by_processor_and_instructions():
    hardware = describe_hardware(torch.device("cpu"))
    assert set(hardware) == {"cpu", "instructions"}
    assert hardware["cpu"]
    assert hardware["instructions"].split(", ")[0] == torch.backends.cpu.get_cpu_capability()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_learns_the_same_line():
    trainer = LineTrainer(line_model(), nn.MSELoss(), "auto")
    assert trainer.device.type == "cuda"
    trainer.fit(loader(), loader(), num_epochs=40)
    assert trainer.model.weight.item() == pytest.approx(2.0, abs=0.05)
