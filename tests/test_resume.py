"""A real training, killed for real, ends with the bytes of one that was not."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_image
from builders.projects import ROOT, Workspace, environment, wait_until

from anomaly_detection.errors import TrainingError
from anomaly_detection.files import fingerprint, replacing, write_text
from anomaly_detection.trainer.resume import (
    MAX_AGE,
    latest_checkpoint,
    resumable,
    seconds_before,
)

OUTPUTS = ("checkpoints", "metrics", "dvclive")

# Importing takes longer than this training, so that each attempt is a fork of one process that has
# imported everything. Signals come at random moments: early, or some epochs later.
KILL_AND_TRY_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
from stages import run, train

def attempt():
    pid = os.fork()
    if pid == 0:
        sys.argv = ["train", "bolt"]
        run(train.main)
        os._exit(0)
    return pid

def epoch():
    return max((int(path.stem[6:]) for path in Path(".work").glob("bolt-*/epoch_*.pth")), default=0)

def ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

chance = random.Random(0)
for epochs in sys.argv[1:]:
    target = epoch() + int(epochs)
    pid = attempt()
    while epoch() < target and not ended(pid):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(pid, chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]))
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)  # it may have swallowed a KeyboardInterrupt
    if os.waitpid(pid, 0)[1] == 0:
        raise SystemExit("completed before the last kill; train for longer")
_, status = os.waitpid(attempt(), 0)
sys.exit(status != 0)
"""


def workspace(folder: Path, name: str = "stfpm", num_workers: int = 0, **training) -> Workspace:
    """One in which a small model is ready to be trained."""
    made = Workspace(folder, "bolt")
    made.use_small_model(name, **training)
    made.change("hardware", num_workers=num_workers)
    made.stages("prepare")
    (made.folder / "pretrained").mkdir()
    return made


def train(made: Workspace, **variables: str) -> subprocess.CompletedProcess:
    return made.python("-m", "stages.train", "bolt", **variables)


def killed(folder: Path, whole: Workspace, num_epochs: int, after: list[int]) -> set[int]:
    """Kill a training each time after some more epochs; returns the epochs after which it went on.

    It ends with the bytes of the whole one.
    """
    made = workspace(folder, num_epochs=num_epochs)
    done = made.python("-c", KILL_AND_TRY_AGAIN, *map(str, after))
    assert made.digests(*OUTPUTS) == whole.digests(*OUTPUTS)
    assert not list((made.folder / ".work").glob("bolt-*"))
    return set(map(int, re.findall(r"going on after epoch (\d+)", done.stderr)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Workspace:
    """Trained without an interruption."""
    made = workspace(tmp_path_factory.mktemp("whole") / "project", num_epochs=40)
    train(made)
    assert len(made.digests(*OUTPUTS)) == 7
    assert [x.name for x in (made.folder / "checkpoints/bolt").iterdir()] == ["best_model.pth"]
    return made


def test_a_killed_training_ends_with_the_same_bytes(whole, tmp_path):
    assert len(killed(tmp_path / "killed", whole, 40, after=[0, 1, 3])) > 1


@pytest.mark.exhaustive
def test_a_training_killed_at_many_moments_ends_with_the_same_bytes(tmp_path):
    whole = workspace(tmp_path / "whole", num_epochs=80)
    train(whole)
    assert len(killed(tmp_path / "killed", whole, 80, after=3 * [0, 1, 3, 7])) > 3


def test_loader_workers_do_not_change_a_byte_of_the_checkpoint(whole, tmp_path):
    made = workspace(tmp_path / "workers", num_workers=2, num_epochs=40)
    train(made)
    assert made.digests(*OUTPUTS) == whole.digests(*OUTPUTS)


def fitted(folder: Path, processes: int, name: str, **options) -> tuple[list[dict], dict]:
    """The history and the tensors of a model trained in so many processes."""
    made = workspace(folder, name, num_processes=processes, **options)
    if name == "efficientad":
        made.change(name, num_steps=12)
        image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        write_image(made.folder / "data/photographs/a.png", image)
    done = train(made)
    assert (made.folder / "times/bolt/train.json").exists()
    history = made.json("metrics/bolt/train.json")["history"]
    assert done.stderr.count(f"epoch 1/{len(history)}: ") == 1
    content = torch.load(made.folder / "checkpoints/bolt/best_model.pth", weights_only=True)
    return history, content["model_state_dict"]


def test_two_processes_give_the_loss_curve_and_the_scales_of_one(tmp_path):
    options = {"num_epochs": 2, "learning_rate": 1e-4}
    one, alone = fitted(tmp_path / "1", 1, "stfpm", **options)
    two, together = fitted(tmp_path / "2", 2, "stfpm", **options)
    for name, value in alone.items():
        if name.startswith(("standardisations", "scales")):
            torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert len(one) == len(two) == 2
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, abs=1e-4)


@pytest.mark.exhaustive
def test_two_processes_count_steps_and_standardise_as_one(tmp_path):
    """EfficientAD drops values at random, so the losses differ."""
    runs = [fitted(tmp_path / str(n), n, "efficientad", batch_size=2) for n in (1, 2)]
    assert [[row["epoch"] for row in history] for history, _ in runs] == [[1, 2], [1, 2]]
    (_, alone), (_, together) = runs
    for name in ("standardisation.mean", "standardisation.deviation"):
        torch.testing.assert_close(together[name], alone[name])


def test_another_number_of_processes_than_asked_for_is_refused(whole):
    command = ("-m", "stages.train", "bolt")
    done = whole.python(*command, ok=False, WORLD_SIZE="2", RANK="0")
    assert done.stderr.strip() == (
        "training.num_processes must be the number of processes started, 2, got 1."
    )


def test_the_cost_of_a_resumed_training_is_that_of_the_whole(tmp_path):
    made = workspace(tmp_path / "project", num_epochs=60)
    variables = {"PYTHONPATH": str(made.folder), "OMP_NUM_THREADS": "1"}
    training = made.start(sys.executable, "-m", "stages.train", "bolt", **variables)
    states = made.folder / ".work"
    wait_until(lambda: list(states.glob("bolt-*/epoch_*.pth")) or training.poll() is not None)
    assert training.poll() is None
    training.kill()
    training.wait()
    (note,) = states.glob("bolt-*/seconds.txt")
    note.write_text("100000\n")
    train(made)
    assert made.json("times/bolt/train.json")["seconds"] > 100000


def test_a_training_folder_goes_when_training_completes_and_stays_when_it_fails(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def interrupted():
        with resumable("bolt", "abc", tmp_path) as state:
            (state / "epoch_3.pth").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    state = tmp_path / ".work" / "bolt-abc"
    assert latest_checkpoint(state) == state / "epoch_3.pth"
    with resumable("bolt", "abc", tmp_path) as state:
        pass
    assert not state.exists()


def left(folder: Path) -> list[str]:
    """What trainings have left in a working directory."""
    return sorted(path.name for path in (folder / ".work").iterdir())


def make_old(path: Path) -> None:
    for x in (path, *path.rglob("*")):
        os.utime(x, (0, time.time() - MAX_AGE - 60))


def test_a_completed_training_leaves_no_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with resumable("bolt", "abc", tmp_path):
        assert left(tmp_path) == [
            *("bolt-abc", "bolt-abc.lock", "bolt-abc.pid", "bolt.lock", "bolt.pid", "guard")
        ]
    assert left(tmp_path) == ["guard"]


def test_what_interrupted_trainings_leave_goes_after_a_month(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for state in ("nut-old", "nut-recent", "nut-resumed"):
        write_text(tmp_path / ".work" / state / "members" / "epoch_1.pth", "")
        write_text(tmp_path / ".work" / f"{state}.lock", "")
    for name in ("nut-old", "nut-old.lock", "nut-resumed"):
        make_old(tmp_path / ".work" / name)
    with resumable("nut", "resumed", tmp_path):
        make_old(tmp_path / ".work" / "nut-resumed")
        with resumable("bolt", "abc", tmp_path):
            pass
        assert (tmp_path / ".work" / "nut-resumed" / "members" / "epoch_1.pth").exists()
        assert not (tmp_path / ".work" / "nut-old").exists()
    assert left(tmp_path) == ["guard", "nut-recent", "nut-recent.lock"]


FIGHT = """
import os, pathlib, sys
from anomaly_detection.errors import TrainingError
from anomaly_detection.trainer.resume import resumable

def train():
    mine = 0
    while mine < 40:
        try:
            with resumable("bolt", "abc", pathlib.Path()):
                os.close(os.open("alone", os.O_CREAT | os.O_EXCL))
                os.unlink("alone")
                mine += 1
        except TrainingError:
            pass

children = []
for _ in range(3):
    if (child := os.fork()) == 0:
        train()
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def python(code: str, folder: Path) -> str:
    """Run code with the library; returns what it prints."""
    variables = environment(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, check=True
    ).stdout


def test_a_lock_that_comes_and_goes_is_never_held_twice(tmp_path):
    python(FIGHT, tmp_path)
    assert left(tmp_path) == ["guard"]


def test_the_time_of_interrupted_attempts_is_that_of_their_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def attempt(*ends: float, completes: bool = False) -> float:
        """Write checkpoints so many seconds after its start; an hour passes after a kill."""
        with contextlib.suppress(KeyboardInterrupt), resumable("bolt", "abc", tmp_path) as state:
            started = (state / "seconds.txt").stat().st_mtime
            for number, end in enumerate(ends):
                path = state / "members" / f"epoch_{number}.pth"
                write_text(path, "")
                os.utime(path, (0, started + end))
            before = seconds_before(state)
            if not completes:
                raise KeyboardInterrupt
        for path in state.rglob("*"):
            os.utime(path, (0, path.stat().st_mtime - 3600))
        return before

    assert attempt(10, 20) == 0
    assert attempt() == pytest.approx(20, abs=0.01)  # killed before its first epoch is complete
    assert attempt(3) == pytest.approx(20, abs=0.01)
    assert attempt(completes=True) == pytest.approx(23, abs=0.01)
    assert attempt(completes=True) == 0


def test_the_latest_checkpoint_is_that_of_the_highest_number(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for epoch in (9, 10, 2):
        (tmp_path / f"epoch_{epoch}.pth").touch()
    assert latest_checkpoint(tmp_path).name == "epoch_10.pth"


@pytest.mark.parametrize(
    ("category", "key", "refused"),
    [("bolt", "a", True), ("bolt", "b", True), ("nut", "a", False)],
)
def test_a_trainer_that_still_runs_is_noticed(tmp_path, monkeypatch, category, key, refused):
    monkeypatch.chdir(tmp_path)
    orphan = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from anomaly_detection.trainer.resume import resumable\n"
            "with resumable('bolt', 'a', pathlib.Path()): print('ready', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert orphan.stdout.readline() == b"ready\n"
    try:
        if refused:
            text = f"process {orphan.pid} is at it; .* kill {orphan.pid}"
            with pytest.raises(TrainingError, match=text), resumable(category, key, tmp_path):
                pass
        else:
            with resumable(category, key, tmp_path):
                pass
    finally:
        orphan.kill()
        orphan.wait()
    with resumable(category, key, tmp_path):
        pass


def test_a_training_depends_on_the_code_that_it_loads_and_on_no_other():
    """So that a change of the report, or of another model, discards no interrupted training."""
    code = (
        "__file__ = 'stages/train.py'  # as if it was run as one\n"
        "from anomaly_detection import models; models.spec('stfpm')\n"
        "from stages import fitting; print(*fitting.loaded_code(), sep='\\n')"
    )
    paths = {Path(line).relative_to(ROOT).as_posix() for line in python(code, ROOT).split()}
    needed = {"models/stfpm/stfpm.py", "models/maps.py", "trainer/loop.py", "data/prepared.py"}
    assert paths >= {"stages/train.py", *(f"anomaly_detection/{name}" for name in needed)}
    foreign = ("report/", "evaluation/", "inference/", "models/patchcore/model")
    assert not [
        path for path in paths if path.startswith(tuple(f"anomaly_detection/{x}" for x in foreign))
    ]


def test_the_fingerprint_changes_with_values_contents_and_names(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("1")
    second.write_text("1")
    names = {
        fingerprint({"x": 1}, [first]),
        fingerprint({"x": 2}, [first]),
        fingerprint({"x": 1}, [second]),
        fingerprint({"x": 1}, [first, second]),
    }
    first.write_text("2")
    names.add(fingerprint({"x": 1}, [first]))
    assert len(names) == 5
    first.write_text("1")
    assert fingerprint({"x": 1}, [first]) in names


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_that_cannot_be_completed_leaves_the_old_one_and_nothing_else(tmp_path, error, old):
    path = tmp_path / "model.pth"
    if old:
        path.write_text(old)

    def fails():
        with replacing(path) as partial:
            partial.write_text("half of the n")
            raise error

    with pytest.raises(error):
        fails()
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == ({path.name: old} if old else {})


def test_a_completed_file_takes_the_place_of_the_old_one_also_in_a_new_folder(tmp_path):
    path = tmp_path / "new" / "model.pth"
    for text in ("old", "new"):
        with replacing(path) as partial:
            partial.write_text(text)
            assert partial != path
        assert [x.name for x in path.parent.iterdir()] == ["model.pth"]
        assert path.read_text() == text
    write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
