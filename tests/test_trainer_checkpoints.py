"""Checkpoints and what resumes from them, devices, precisions and numerics."""

import copy
import io
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders.faults import full_disk
from builders.trainers import (
    LineTrainer,
    MomentumTrainer,
    OneCycleTrainer,
    fitted,
    loader,
    make,
    resumed,
)
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from anomaly_detection.data import create_dataloader
from anomaly_detection.trainer import (
    Callback,
    EarlyStopping,
    GradientClipping,
    LearningRateLogger,
    ModelCheckpoint,
    TrainingError,
    choose_device,
    choose_dtype,
    count_batch_norm_once,
    describe_hardware,
    save_atomically,
    seed_everything,
)
from anomaly_detection.trainer.numerics import synchronise_batch_norm


def read(path):
    return torch.load(path, weights_only=True)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_best_model_is_that_of_the_lowest_validation_loss(tmp_path):
    weights = []

    class Trainer(LineTrainer):
        def on_validation_epoch_end(self, epoch, val_metrics):
            weights.append(self.model.weight.item())

    trainer = fitted(Trainer, 3, losses=[3.0, 1.0, 2.0], checkpoint_dir=tmp_path)
    best = read(tmp_path / "best_model.pth")
    assert (best["epoch"], trainer.best_epoch) == (1, 2)
    assert best["metrics"] == trainer.best_metric == {"loss": 1.0}
    assert trainer.model.weight.item() == weights[2]
    trainer.load_best_model()
    assert trainer.model.weight.item() == weights[1] != weights[2]


def test_without_a_validation_loader_the_training_loss_chooses_the_best(tmp_path):
    trainer = make(checkpoint_dir=tmp_path)
    trainer.fit(loader(), num_epochs=2)
    assert trainer.best_metric == {"loss": trainer.history[-1]["train_loss"]}


def test_a_model_that_changes_at_the_end_is_saved_by_hand(tmp_path):
    class EndsWithSlope7(LineTrainer):
        def on_fit_end(self):
            nn.init.constant_(self.model.weight, 7.0)
            self.save_checkpoint(self.current_epoch, {"loss": 0.0})

    fitted(EndsWithSlope7, 2, checkpoint_dir=tmp_path)
    for name in ("epoch_1.pth", "best_model.pth"):
        assert read(tmp_path / name)["model_state_dict"]["weight"].item() == 7.0


@pytest.mark.parametrize("with_folder", [True, False])
def test_a_best_model_that_is_not_saved_cannot_be_loaded(tmp_path, with_folder):
    folder = tmp_path if with_folder else None
    policy = ModelCheckpoint(best=not with_folder)
    trainer = fitted(checkpoint_dir=folder, checkpoints=policy)
    with pytest.raises(TrainingError) as error:
        trainer.load_best_model()
    assert str(error.value) == (
        f"the best model must have been saved, got checkpoint_dir {folder} and checkpoints.best "
        f"{not with_folder}."
    )


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        ({"last": 1}, {"best_model", "epoch_4"}),
        ({"last": 2}, {"best_model", "epoch_3", "epoch_4"}),
        ({"best": False}, {f"epoch_{i}" for i in range(5)}),
        ({"last": 0}, {"best_model"}),
        ({"last": 1, "every": 2}, {"best_model", "epoch_1", "epoch_3", "epoch_4"}),
        ({"last": 0, "every": 2, "best": False}, {"epoch_1", "epoch_3"}),
    ],
)
def test_only_the_checkpoints_of_the_policy_stay(tmp_path, policy, names):
    fitted(num_epochs=5, checkpoint_dir=tmp_path, checkpoints=ModelCheckpoint(**policy))
    assert {path.stem for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("policy", [{"last": -1}, {"every": 0}])
def test_a_policy_refuses_wrong_numbers(policy):
    with pytest.raises(ValueError, match="last must be at least 0 and every at least 1"):
        ModelCheckpoint(**policy)


def test_the_same_training_writes_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        seed_everything(0)
        fitted(num_epochs=2, checkpoint_dir=tmp_path / folder)
    assert files(tmp_path / "a") == files(tmp_path / "b")


class Interrupts(Callback):
    """Ctrl-C when so many steps have been taken; never after none."""

    def __init__(self, step=0):
        self.step = step

    def on_train_batch_end(self, batch, batch_idx, outputs, loss):
        if self.trainer.step == self.step:
            raise KeyboardInterrupt


def noisy(cls):
    """The trainer with noise in its steps, which draws numbers when it starts, too."""

    class Noisy(cls):
        def on_fit_start(self):
            torch.rand(3)

        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {"loss": outputs["loss"] * torch.rand(())}

    return Noisy


@pytest.mark.parametrize(
    ("cls", "precision"), [(MomentumTrainer, "float32"), (OneCycleTrainer, "float16")]
)
@pytest.mark.parametrize("budget", [{"num_epochs": 3}, {"num_epochs": 9, "num_steps": 8}])
@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_an_interrupted_training_ends_with_the_same_bytes(tmp_path, cls, precision, budget, step):
    """Three batches in an epoch: the budget of eight steps ends within the third."""

    def trainer(folder, interrupted_after=0):
        seed_everything(0)
        options = {"precision": precision, "callbacks": [Interrupts(interrupted_after)]}
        trainer = make(noisy(cls), checkpoint_dir=tmp_path / folder, **options)
        trainer.resume()
        return trainer

    def data():
        return create_dataloader(loader(6).dataset, 2, shuffle=True, seed=1), loader()

    trainer("whole").fit(*data(), **budget)
    with pytest.raises(KeyboardInterrupt):
        trainer("resumed", step).fit(*data(), **budget)
    torch.rand(7)
    again = trainer("resumed")
    assert again.step == 3 * ((step - 1) // 3)
    again.fit(*data(), **budget)
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_a_training_that_was_stopped_does_not_go_on_after_a_resume(tmp_path):
    fitted(num_epochs=5, losses=[1, 1], checkpoint_dir=tmp_path, callbacks=[EarlyStopping(1)])
    trainer = resumed(tmp_path / "epoch_1.pth")
    assert len(trainer.fit(loader(), loader(), num_epochs=5)) == 2


def test_callbacks_resume_with_what_they_remember(tmp_path):
    def options():
        callbacks = [EarlyStopping(patience=3), LearningRateLogger()]
        return {"losses": itertools.repeat(1.0), "callbacks": callbacks}

    fitted(num_epochs=2, checkpoint_dir=tmp_path, **options())
    trainer = resumed(tmp_path / "epoch_1.pth", **options())
    trainer.fit(loader(), loader(), num_epochs=10)
    assert len(trainer.history) == 4
    assert trainer.callbacks[1].learning_rates == [0.1] * 4


def test_callbacks_find_their_states_in_another_order_and_beside_new_ones(tmp_path):
    callbacks = [EarlyStopping(5), LearningRateLogger()]
    trainer = fitted(num_epochs=2, checkpoint_dir=tmp_path, callbacks=callbacks)
    others = [GradientClipping(1.0), LearningRateLogger(), EarlyStopping(5)]
    resumed(tmp_path / "epoch_1.pth", callbacks=others)
    assert others[1].learning_rates == [0.1, 0.1]
    assert others[2].best == trainer.history[-1]["val_loss"]
    fitted(checkpoint_dir=tmp_path / "none")
    new = EarlyStopping(5)
    resumed(tmp_path / "none" / "epoch_0.pth", callbacks=[new])
    assert new.best == float("inf")


def test_two_callbacks_of_one_class_keep_their_states_apart(tmp_path):
    def callbacks():
        return [EarlyStopping(5), LearningRateLogger(), EarlyStopping(5, mode="max")]

    fitted(num_epochs=2, losses=[2.0, 1.0], checkpoint_dir=tmp_path, callbacks=callbacks())
    assert read(tmp_path / "epoch_1.pth")["state"]["callbacks"] == {
        "EarlyStopping": {"best": 1.0, "waited": 0},
        "LearningRateLogger": {"learning_rates": [0.1, 0.1]},
        "EarlyStopping-2": {"best": -2.0, "waited": 1},
    }
    lowest, _, highest = resumed(tmp_path / "epoch_1.pth", callbacks=callbacks()).callbacks
    assert (lowest.best, highest.best) == (1.0, -2.0)


def test_an_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match=r"file must be a folder for checkpoints: "):
        fitted(checkpoint_dir=tmp_path / "file")


def test_a_full_disk_is_a_clear_error_and_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "model.pth"
    save_atomically({"epoch": 1}, path)
    with full_disk(50_000), pytest.raises(TrainingError) as error:
        save_atomically({"epoch": 2, "weights": torch.zeros(100_000)}, path)
    assert str(error.value).startswith(f"{path} must be writable: ")
    assert read(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_at_any_write_of_a_checkpoint_is_no_error_of_the_disk(tmp_path, monkeypatch):
    path, content = tmp_path / "model.pth", [torch.zeros(10**5) for _ in range(3)]

    class Interrupted(io.FileIO):
        """A file in which the write of that number, from 1, is interrupted."""

        number = count = 0

        def write(self, part):
            Interrupted.count += 1
            if Interrupted.count == Interrupted.number:
                raise KeyboardInterrupt
            return super().write(part)

    monkeypatch.setattr(Path, "open", lambda *args: Interrupted(*args))
    save_atomically(content, path)
    num_writes = Interrupted.count
    assert num_writes > 3
    save_atomically(1, path)
    for number in range(1, num_writes + 1):
        Interrupted.number, Interrupted.count = number, 0
        with pytest.raises(KeyboardInterrupt):
            save_atomically(content, path)
        assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    assert read(path) == 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_steps_lead_to_the_same_line(precision):
    trainer = fitted(num_epochs=40, precision=precision)
    assert trainer.model.weight.item() == pytest.approx(2.0, abs=0.05)
    assert trainer.model.weight.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_learns_the_same_line():
    trainer = fitted(num_epochs=40, device="auto")
    assert trainer.device.type == "cuda"
    assert trainer.model.weight.item() == pytest.approx(2.0, abs=0.05)


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


def test_auto_is_a_device_and_a_precision_of_this_machine():
    assert torch.ones(1, device=choose_device("auto")).item() == 1
    assert choose_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16


def test_a_device_that_is_not_here_is_a_clear_error():
    with pytest.raises(TrainingError, match=r"must be a device of this machine, got cuda:99"):
        choose_device("cuda:99")


def test_hardware_is_described_by_processor_and_instructions():
    hardware = describe_hardware(torch.device("cpu"))
    assert set(hardware) == {"cpu", "instructions"}
    assert hardware["cpu"]
    assert hardware["instructions"].split(", ")[0] == torch.backends.cpu.get_cpu_capability()


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
