"""`tools.repro`: categories one after the other, each with a dvc.lock of its own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders.images import write_category
from builders.projects import Project, environment, wait_until

from anomaly_detection.errors import UserError
from tools.cluster.dvc import settings, write_settings
from tools.cluster.dvcfiles import (
    cut_lock,
    cut_params,
    parse_lock,
    read_lock,
    read_yaml,
    write_lock,
)
from tools.cluster.view import Project as Whole
from tools.cluster.view import View
from tools.repro import FEW

ROOT = Path(__file__).parent.parent
NAMES = [f"part{number}" for number in range(FEW + 1)]
LOCK = """\
schema: '2.0'
stages:
  check:
    cmd: python -m stages.check
    params:
      params.yaml:
        data:
          crop:
  'train@a b':
    cmd: python -m stages.train a b
    deps:
    - path: x
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One that has more categories than are few, and has run."""
    project = Project(tmp_path_factory.mktemp("project"))
    for name in NAMES:
        write_category(project.folder / "parts" / name, num_test=2)
    project.change("data", categories=NAMES)
    project.change("model", name="gaussian", backbone="test_resnet", weights="random")
    project.change("training", num_epochs="auto", batch_size="auto")
    project.change("plots", gallery_size=1)
    project.commit("many categories")
    assert repro(project).returncode == 0
    return project


def repro(project: Project) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.repro"]
    return subprocess.run(
        command, cwd=project.folder, env=environment(), capture_output=True, text=True
    )


def test_a_lock_is_cut_and_put_together_in_its_very_bytes(tmp_path):
    lock = parse_lock(LOCK)
    assert list(lock) == ["check", "train@a b"]
    assert "".join(lock.values()) == LOCK.removeprefix("schema: '2.0'\nstages:\n")
    write_lock(tmp_path / "dvc.lock", lock)
    assert (tmp_path / "dvc.lock").read_text() == LOCK
    assert list(cut_lock(lock, ["report", "check"])) == ["check"]


def test_no_entries_are_no_file_as_dvc_has_it(tmp_path):
    write_lock(tmp_path / "dvc.lock", {})
    assert not (tmp_path / "dvc.lock").exists()
    assert read_lock(tmp_path / "dvc.lock") == {}


def test_the_projects_own_lock_survives_cutting(tmp_path):
    write_lock(tmp_path / "dvc.lock", read_lock(ROOT / "dvc.lock"))
    assert (tmp_path / "dvc.lock").read_bytes() == (ROOT / "dvc.lock").read_bytes()


def test_a_lock_that_dvc_has_not_written_is_refused():
    with pytest.raises(UserError, match=r"dvc\.lock must be as DVC writes it.*git checkout"):
        parse_lock("<<<<<<< HEAD\nschema: '2.0'\n")


def test_parameters_are_cut_to_a_category_in_their_order(tmp_path):
    params = read_yaml(ROOT / "params.yaml")
    params["data"]["categories"] = ["a", "b"]
    params["overrides"] = {"a": {"model": {"name": "gaussian"}}, "b": {}}
    (tmp_path / "params.yaml").write_text(cut_params(params, "a"))
    cut = read_yaml(tmp_path / "params.yaml")
    assert cut["data"]["categories"] == ["a"]
    assert cut["overrides"] == {"a": {"model": {"name": "gaussian"}}}
    assert cut | {"data": 0, "overrides": 0} == params | {"data": 0, "overrides": 0}
    assert list(cut["evaluation"]) == list(params["evaluation"])


@pytest.mark.slow
@pytest.mark.cluster
def test_it_leaves_what_dvc_repro_leaves(project):
    assert project.dvc("status").strip() == "Data and pipelines are up to date."
    assert project.repro() == []
    assert (project.folder / "times" / NAMES[0] / "train.json").is_file()
    names = set(read_lock(project.folder / "dvc.lock"))
    steps = ("prepare", "pretrain", "train", "evaluate", "export", "plot")
    expected = {f"{step}@{name}" for step in steps for name in NAMES}
    assert names == expected | {"check", "fetch", "report"}
    before = (project.folder / "dvc.lock").read_bytes()
    project.dvc("repro", "--force", "--single-item", f"prepare@{NAMES[0]}")
    after = (project.folder / "dvc.lock").read_bytes()
    assert len(before.splitlines()) == len(after.splitlines())  # DVC's own way of writing it


@pytest.mark.slow
@pytest.mark.cluster
def test_a_second_run_runs_nothing(project):
    done = repro(project)
    assert done.returncode == 0
    assert "Running stage" not in done.stdout
    assert not list((project.folder / ".work/repro").rglob("*dvc.lock"))


@pytest.mark.slow
@pytest.mark.cluster
def test_a_changed_parameter_runs_what_it_affects(project):
    project.change("plots", gallery_size=2)
    output = repro(project).stdout
    ran = {line.split("'")[1] for line in output.splitlines() if line.startswith("Running")}
    assert ran == {"check", *(f"plot@{name}" for name in NAMES)}
    assert project.repro() == []


@pytest.mark.slow
@pytest.mark.cluster
def test_a_category_that_fails_is_named_and_the_others_finish(project):
    picture = project.folder / "parts" / NAMES[1] / "train/good/000.png"
    good = picture.read_bytes()
    picture.write_bytes(b"no picture")
    (project.folder / "parts" / NAMES[2] / "train/good/001.png").unlink()
    done = repro(project)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"1 of {len(NAMES)} failed: {NAMES[1]}."
    assert f"Running stage 'plot@{NAMES[2]}'" in done.stdout
    picture.write_bytes(good)
    ran = {x.split("'")[1] for x in repro(project).stdout.splitlines() if x.startswith("Running")}
    assert f"prepare@{NAMES[1]}" in ran
    assert not any(stage.endswith(NAMES[2]) for stage in ran)
    assert project.repro() == []


@pytest.mark.slow
@pytest.mark.cluster
def test_what_has_finished_survives_a_kill(project):
    project.change("evaluation", synthetic_images=2)
    process = project.start(sys.executable, "-m", "tools.repro")
    kept = project.folder / ".work/repro/finished"
    wait_until(lambda: (kept / f"prepare@{NAMES[0]}.lock").exists(), seconds=300)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not running_in(project.folder))
    output = repro(project).stdout
    assert f"Running stage 'evaluate@{NAMES[0]}'" not in output
    assert f"Running stage 'evaluate@{NAMES[-1]}'" in output
    assert project.repro() == []


def running_in(folder: Path) -> list[str]:
    """The processes whose working directory is in a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            target = link.readlink()
        except OSError:
            continue
        if target.is_relative_to(folder):
            found.append(link.parent.name)
    return found


def test_two_runs_at_once_are_refused(tmp_path):
    whole = Whole(tmp_path)
    with (
        whole.exclusively(),
        pytest.raises(UserError, match="must have one run at a time"),
        Whole(tmp_path).exclusively(),
    ):
        pass


def test_a_folder_in_the_project_must_be_relative(tmp_path):
    project = Project(tmp_path)
    project.change("data", root=str(tmp_path / "parts"))
    with pytest.raises(UserError, match=r"data.root must be relative.*, parts, got"):
        View(Whole(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        LOCK.replace("  'train@a b':", "<<<<<<< HEAD\n  'train@a b':"),
        LOCK + LOCK.removeprefix("schema: '2.0'\nstages:\n"),
    ],
    ids=["conflict", "twice"],
)
def test_a_lock_with_a_conflict_is_refused(text):
    with pytest.raises(UserError, match=r"dvc\.lock must be as DVC writes it, each stage once"):
        parse_lock(text)


def test_of_a_lock_that_was_being_written_only_whole_entries_are_taken(tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    whole = (ROOT / "dvc.lock").read_text()
    entries = parse_lock(whole)
    view = tmp_path / ".work/repro/views/0/dvc.lock"
    view.parent.mkdir(parents=True)
    start = whole.index(entries["train@mono"])
    end = start + len(entries["train@mono"])
    for cut in (0, 20, start, start + 200, end - 120, end - 30, end - 1, end):
        view.write_text(whole[:cut])
        (tmp_path / "dvc.lock").unlink(missing_ok=True)
        with Whole(tmp_path).exclusively():
            pass
        taken = read_lock(tmp_path / "dvc.lock")
        assert all(entries[name] == entry for name, entry in taken.items())
        assert ("train@mono" in taken) == (cut == end)
        assert not view.exists()


def test_settings_come_back_as_they_were(tmp_path):
    values = {"url": "https://x", "password": "a#b,c 'd'", "user": '"quoted"'}
    write_settings(tmp_path, {'remote "store"': values, "core": {"no_scm": True}})
    read = settings(tmp_path)['remote "store"']
    assert {name: read[name] for name in values} == values


@pytest.mark.parametrize("above", ["../parts", "../images/parts", "../../images/parts"])
def test_images_may_be_beside_the_project(tmp_path, above):
    project = Project(tmp_path / "work/project")
    target = (project.folder / above).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    (project.folder / "parts").rename(target)
    project.change("data", root=above)
    view = View(Whole(project.folder))
    assert (view.folder / above / "bolt").resolve() == target / "bolt"


def test_images_far_above_the_project_are_refused(tmp_path):
    project = Project(tmp_path)
    project.change("data", root="../../../../parts")
    with pytest.raises(UserError, match=r"data.root must be an absolute path, or not as far above"):
        View(Whole(tmp_path))
