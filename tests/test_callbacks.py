import subprocess

import pytest
import torch
from test_trainer import LineTrainer, WithState, loader, make
from torch import nn

from anomaly_detection.trainer import (
    Callback,
    EarlyStopping,
    GradientClipping,
    LearningRateLogger,
)
from stages.live import DVCLiveLogger


def test_gradient_clipping_bounds_the_step():
    # x = 1, y = 2, slope 0: gradient -4, clipped to -1; the step is 0.1 * 1 instead of 0.1 * 4.
    trainer = make(callbacks=[GradientClipping(1.0)])
    trainer.fit(loader(num=1, batch_size=1), num_epochs=1)
    assert trainer.model.weight.item() == pytest.approx(0.1)


def test_clipping_after_the_optimizers_step_does_nothing():
    class TooLate(Callback):
        def on_train_batch_end(self, batch, batch_idx, outputs, loss):
            nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)

    trainer = make(callbacks=[TooLate()])
    trainer.fit(loader(num=1, batch_size=1), num_epochs=1)
    assert trainer.model.weight.item() == pytest.approx(0.4)


def test_gradient_clipping_refuses_a_norm_that_is_not_positive():
    with pytest.raises(ValueError, match="must be greater than 0, got 0"):
        GradientClipping(0)


def test_learning_rates_are_those_that_the_epochs_trained_with():
    rates = LearningRateLogger()
    make(WithState, callbacks=[rates]).fit(loader(), loader(), num_epochs=5)
    assert rates.learning_rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_accumulated_batches_step_like_one_large_batch():
    small = make(accumulate_batches=2)
    small.fit(loader(4, batch_size=2), num_epochs=3)
    large = make()
    large.fit(loader(4, batch_size=4), num_epochs=3)
    assert small.model.weight.item() == pytest.approx(large.model.weight.item())


def test_the_last_group_of_accumulated_batches_may_be_smaller():
    steps = []

    class Counts(Callback):
        def on_before_optimizer_step(self):
            steps.append(self.trainer.model.weight.grad.item())

    trainer = make(accumulate_batches=2, callbacks=[Counts()])
    trainer.fit(loader(3, batch_size=1), num_epochs=1)
    # Slope 0, x = 1/3 and 2/3: the mean of -4 x^2; then x = 1 alone with the new slope.
    slope = 0.1 * 4 * (1 / 9 + 4 / 9) / 2
    assert steps == pytest.approx([-4 * (1 / 9 + 4 / 9) / 2, -2 * (2 - slope)])


def test_callbacks_resume_with_what_they_remember(tmp_path):
    class Flat(LineTrainer):
        def compute_metrics(self, outputs):
            return {"loss": 1.0}

    def callbacks():
        return [EarlyStopping(patience=3), LearningRateLogger()]

    make(Flat, checkpoint_dir=tmp_path, callbacks=callbacks()).fit(loader(), loader(), num_epochs=2)
    resumed = make(Flat, callbacks=callbacks())
    resumed.load_checkpoint(tmp_path / "epoch_2.pth")
    resumed.fit(loader(), loader(), num_epochs=10)
    assert resumed.epoch == 4
    assert resumed.callbacks[1].learning_rates == [0.1] * 4


def test_callbacks_find_their_states_in_another_order_and_beside_new_ones(tmp_path):
    trainer = make(checkpoint_dir=tmp_path, callbacks=[EarlyStopping(5), LearningRateLogger()])
    trainer.fit(loader(), loader(), num_epochs=2)
    resumed = make(callbacks=[GradientClipping(1.0), LearningRateLogger(), EarlyStopping(5)])
    resumed.load_checkpoint(tmp_path / "epoch_2.pth")
    assert resumed.callbacks[1].learning_rates == [0.1, 0.1]
    assert resumed.callbacks[2].best == trainer.history[-1]["val_loss"]
    fresh = make(callbacks=[EarlyStopping(5)])
    make(checkpoint_dir=tmp_path / "none").fit(loader(), loader())
    fresh.load_checkpoint(tmp_path / "none" / "epoch_1.pth")
    assert fresh.callbacks[0].best == float("inf")


def test_two_callbacks_of_one_class_keep_their_states_apart(tmp_path):
    def callbacks():
        return [EarlyStopping(5), LearningRateLogger(), EarlyStopping(5, mode="max")]

    trainer = make(checkpoint_dir=tmp_path, callbacks=callbacks())
    trainer.fit(loader(), loader(), num_epochs=2)
    first, last = (row["val_loss"] for row in trainer.history)
    assert last < first
    states = torch.load(tmp_path / "epoch_2.pth", weights_only=True)["callback_state_dicts"]
    assert states == {
        "EarlyStopping": {"best": last, "waited": 0},
        "LearningRateLogger": {"learning_rates": [0.1, 0.1]},
        "EarlyStopping-2": {"best": -first, "waited": 1},
    }
    resumed = make(callbacks=callbacks())
    resumed.load_checkpoint(tmp_path / "epoch_2.pth")
    assert (resumed.callbacks[0].best, resumed.callbacks[2].best) == (last, -first)


def test_a_training_that_was_stopped_does_not_go_on_after_a_resume(tmp_path):
    class Stops(LineTrainer):
        def on_validation_epoch_end(self, epoch, val_metrics):
            if epoch == 2:
                raise StopIteration

    make(Stops, checkpoint_dir=tmp_path).fit(loader(), loader(), num_epochs=5)
    resumed = make(Stops)
    resumed.load_checkpoint(tmp_path / "epoch_2.pth")
    assert len(resumed.fit(loader(), loader(), num_epochs=5)) == 2


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

    trainer = make(callbacks=[DVCLiveLogger("live"), Watches()])
    trainer.fit(loader(), loader(), num_epochs=3)
    for name in ("train_loss", "val_loss", "learning_rate"):
        values = [row[name] for row in trainer.history]
        assert read_column(tmp_path / f"live/plots/metrics/{name}.tsv") == (name, values)
    assert seen == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} <= {"live", ".git"}


def test_dvclive_holds_all_epochs_after_a_resume(tmp_path):
    make(checkpoint_dir=tmp_path, callbacks=[DVCLiveLogger(tmp_path / "a")]).fit(
        loader(), loader(), num_epochs=2
    )
    resumed = make(callbacks=[DVCLiveLogger(tmp_path / "b")])
    resumed.load_checkpoint(tmp_path / "epoch_2.pth")
    resumed.fit(loader(), loader(), num_epochs=3)
    losses = [row["train_loss"] for row in resumed.history]
    assert read_column(tmp_path / "b/plots/metrics/train_loss.tsv")[1] == losses


def test_an_out_of_memory_error_says_what_to_change():
    class Full(LineTrainer):
        def training_step(self, batch, batch_idx):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(Exception, match=r"Tried to allocate .* lower training.batch_size"):
        make(Full).fit(loader(), num_epochs=1)
