"""A real training, killed for real, ends with the bytes of one that was not."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_category, write_image
from builders.projects import environment, wait_until
from ruamel.yaml import YAML

from anomaly_detection.data import prepare_category
from anomaly_detection.errors import TrainingError
from anomaly_detection.files import fingerprint, replacing, write_text
from anomaly_detection.trainer.resume import (
    MAX_AGE,
    latest_checkpoint,
    resumable,
    seconds_before,
)

ROOT = Path(__file__).parent.parent
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

chance = random.Random(int(sys.argv[2]))
for _ in range(int(sys.argv[1])):
    target = epoch() + chance.choice([0, 1, 3, 7])
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


def make_project(folder: Path, model: str = "stfpm", *, num_workers: int = 0, **training) -> Path:
    """A folder in which the train stage runs: params.yaml, code and one prepared category."""
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params["data"] |= {"categories": ["bolt"], "image_size": 64}
    params["model"] |= {"name": model, "backbone": "test_resnet", "weights": "random"}
    params["training"] |= {"batch_size": 8, "precision": "float32"}
    params["training"] |= {"early_stopping_patience": None} | training
    params["hardware"] |= {"device": "cpu", "num_workers": num_workers}
    folder.mkdir()
    yaml.dump(params, folder / "params.yaml")
    for package in ("anomaly_detection", "stages"):
        (folder / package).symlink_to(ROOT / package)
    write_category(folder / "parts" / "bolt")
    prepare_category(
        folder / "parts",
        "bolt",
        folder / "data" / "prepared" / "bolt",
        image_size=64,
        bit_depth=16,
        validation_fraction=0.15,
        calibration_fraction=0.15,
        seed=0,
    )
    return folder


def run_python(
    folder: Path, *arguments: str, path: Path | None = None
) -> subprocess.CompletedProcess:
    variables = environment() | {"PYTHONPATH": str(path or folder), "OMP_NUM_THREADS": "1"}
    variables.pop("DVC_ROOT", None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True
    )


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
        for output in OUTPUTS
        for path in sorted((folder / output).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A project trained without an interruption."""
    folder = make_project(tmp_path_factory.mktemp("whole") / "project", num_epochs=80)
    done = run_python(folder, "-m", "stages.train", "bolt")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_training_killed_at_random_moments_ends_with_the_same_bytes(whole, tmp_path):
    folder = make_project(tmp_path / "killed", num_epochs=80)
    done = run_python(folder, "-c", KILL_AND_TRY_AGAIN, "12", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    resumed_after = [int(epoch) for epoch in re.findall(r"going on after epoch (\d+)", done.stderr)]
    assert len(set(resumed_after)) > 3
    assert digests(folder) == digests(whole)
    assert len(digests(folder)) == 6
    assert [path.name for path in (folder / "checkpoints/bolt").iterdir()] == ["best_model.pth"]
    assert not list((folder / ".work").glob("bolt-*"))


@pytest.mark.slow
def test_loader_workers_do_not_change_a_byte_of_the_checkpoint(whole, tmp_path):
    folder = make_project(tmp_path / "workers", num_epochs=80, num_workers=2)
    assert run_python(folder, "-m", "stages.train", "bolt").returncode == 0
    assert digests(folder) == digests(whole)


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_and_the_scales_of_one(tmp_path):
    histories, fitted = [], []
    for processes in (1, 2):
        folder = make_project(
            tmp_path / str(processes), num_epochs=4, num_processes=processes, learning_rate=1e-3
        )
        done = run_python(folder, "-m", "stages.train", "bolt")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("epoch 1/4: ") == 1
        assert (folder / "times/bolt/train.json").exists()
        histories.append(json.loads((folder / "metrics/bolt/train.json").read_text())["history"])
        content = torch.load(folder / "checkpoints/bolt/best_model.pth", weights_only=True)
        fitted.append(content["model"]["state_dict"])
    for name, value in fitted[0].items():
        if name.startswith(("standardisations", "scales")):
            torch.testing.assert_close(fitted[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    one, two = histories
    assert len(one) == len(two) == 4
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.slow
def test_two_processes_count_steps_and_standardise_as_one(tmp_path):
    """EfficientAD drops values at random, so the losses differ."""
    fitted = []
    for processes in (1, 2):
        folder = make_project(
            tmp_path / str(processes), "efficientad", batch_size=2, num_processes=processes
        )
        write_image(
            folder / "data/photographs/a.png", np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        )
        text = (folder / "params.yaml").read_text()
        text = re.sub(r"num_steps: \w+", "num_steps: 12", text)
        write_text(folder / "params.yaml", text)
        done = run_python(folder, "-m", "stages.train", "bolt")
        assert done.returncode == 0, done.stderr
        content = torch.load(folder / "checkpoints/bolt/best_model.pth", weights_only=True)
        history = json.loads((folder / "metrics/bolt/train.json").read_text())["history"]
        assert [row["epoch"] for row in history] == [1, 2]
        fitted.append(content["model"]["state_dict"])
    alone, together = fitted
    for name in ("standardisation.mean", "standardisation.deviation"):
        torch.testing.assert_close(together[name], alone[name])


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


def test_a_lock_that_comes_and_goes_is_never_held_twice(tmp_path):
    done = run_python(tmp_path, "-c", FIGHT, path=ROOT)
    assert done.returncode == 0, done.stderr
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


@pytest.mark.slow
def test_the_cost_of_a_resumed_training_is_that_of_the_whole(tmp_path):
    folder = make_project(tmp_path / "project", num_epochs=30)
    variables = environment() | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    variables.pop("DVC_ROOT", None)
    command = [sys.executable, "-m", "stages.train", "bolt"]
    training = subprocess.Popen(command, cwd=folder, env=variables)
    wait_until(lambda: list(folder.glob(".work/bolt-*/epoch_*.pth")) or training.poll() is not None)
    assert training.poll() is None
    training.kill()
    training.wait()
    (note,) = folder.glob(".work/bolt-*/seconds.txt")
    note.write_text("100000\n")
    assert run_python(folder, *command[1:]).returncode == 0
    cost = json.loads((folder / "times/bolt/train.json").read_text())
    assert cost["seconds"] > 100000


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
    done = run_python(ROOT, "-c", code)
    paths = {Path(line).relative_to(ROOT).as_posix() for line in done.stdout.split()}
    needed = {"models/stfpm/model.py", "models/maps.py", "trainer/loop.py", "data/prepared.py"}
    assert paths >= {"stages/train.py", *(f"anomaly_detection/{name}" for name in needed)}
    foreign = ("report/", "evaluation/", "inference/", "models/patchcore/model")
    assert not [
        path for path in paths if path.startswith(tuple(f"anomaly_detection/{x}" for x in foreign))
    ]


def test_another_number_of_processes_than_asked_for_is_refused(tmp_path):
    folder = make_project(tmp_path / "project", num_epochs=1)
    variables = environment() | {"PYTHONPATH": str(folder), "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", "bolt"],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "training.num_processes must be the number of processes started, 2, got 1."
    )


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
