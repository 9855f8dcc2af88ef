"""`tools.repro`: categories one after the other, each with a dvc.lock of its own."""

import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.pipeline import running_in, simplify
from builders.projects import EVERY_CATEGORY, Project, stages, wait_until

from anomaly_detection.errors import UserError
from tools.cluster.dvc import insist, settings, write_settings
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
NAMES = ["a", "b"]
MANY = "from tools import repro; repro.FEW = 1; repro.run(repro.main)"  # two are many categories
BODY = """\
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
LOCK = f"schema: '2.0'\nstages:\n{BODY}"


@pytest.fixture(scope="module")
def simple(tmp_path_factory) -> Iterator[Project]:
    """A project with a pipeline that costs nothing; tests leave it up to date."""
    project = Project(tmp_path_factory.mktemp("project"))
    simplify(project, project.folder / "parts", NAMES)
    repro(project)
    yield project
    shutil.rmtree(project.folder / ".work/hold", ignore_errors=True)  # nothing waits any more


def repro(project: Project, ok: bool = True) -> tuple[set[str], str]:
    """Run `tools.repro`; the stages that ran, and what was printed as errors."""
    done = project.run(sys.executable, "-c", MANY, ok=ok)
    lines = done.stdout.splitlines()
    return {x.split("'")[1] for x in lines if x.startswith("Running stage")}, done.stderr


def kill(process: subprocess.Popen, project: Project) -> None:
    """Kill a run; its stages end with it."""
    process.kill()
    process.wait()
    wait_until(lambda: not running_in(project.folder))


def test_it_leaves_what_dvc_repro_leaves(simple):
    assert simple.dvc("status").strip() == "Data and pipelines are up to date."
    assert simple.repro() == []
    lock = simple.folder / "dvc.lock"
    assert sorted(read_lock(lock)) == stages(["check", "report"], ("prepare", "plot"), NAMES)
    num_lines = len(lock.read_text().splitlines())
    simple.dvc("repro", "--force", "--single-item", "prepare@a")
    assert len(lock.read_text().splitlines()) == num_lines  # DVC's own way of writing it
    assert repro(simple)[0] == set()
    assert not list((simple.folder / ".work/repro").rglob("*dvc.lock"))


def test_a_category_that_fails_is_named_and_the_others_finish(simple):
    (simple.folder / "parts/a/text").write_text("broken")
    (simple.folder / "parts/b/text").write_text("changed")
    ran, errors = repro(simple, ok=False)
    assert errors.splitlines()[-1] == "1 of 2 failed: a."
    assert ran == {"prepare@a", "prepare@b", "plot@b"}
    (simple.folder / "parts/a/text").write_text("whole")
    assert repro(simple)[0] == {"prepare@a", "plot@a", "report"}
    assert simple.repro() == []


def test_after_a_kill_the_next_run_goes_on_from_the_last_stage(simple):
    for name in NAMES:
        (simple.folder / "parts" / name / "text").write_text("before the kill")
    held = simple.folder / ".work/hold/plots/b"
    held.parent.mkdir(parents=True, exist_ok=True)
    held.touch()
    noted = simple.folder / "times/plots/b.json"
    noted.unlink()
    process = simple.start(sys.executable, "-c", MANY)
    wait_until(noted.exists)
    kill(process, simple)
    held.unlink()
    assert repro(simple)[0] == {"plot@b", "report"}
    assert simple.repro() == []


@pytest.mark.exhaustive
def test_the_whole_pipeline_runs_goes_on_after_a_kill_and_follows_parameters(tmp_path):
    project = Project(tmp_path)
    project.change("data", image_size=32)
    project.change("model", name="gaussian", backbone="test_resnet", weights="random")
    project.change("training", num_epochs="auto", batch_size="auto")
    project.change("plots", gallery_size=1)
    project.commit("small")
    process = project.start(sys.executable, "-c", MANY)
    wait_until(lambda: running_in(tmp_path, "stages.train nut"), seconds=300)
    kill(process, project)
    ran, _ = repro(project)
    assert "train@nut" in ran
    assert not any(stage.endswith("@bolt") for stage in ran)
    assert project.dvc("status").strip() == "Data and pipelines are up to date."
    assert project.repro() == []
    assert {x.partition("@")[0] for x in read_lock(tmp_path / "dvc.lock")} == {
        *("check", "fetch", "report"),
        *EVERY_CATEGORY,
    }
    assert (tmp_path / "times/bolt/train.json").is_file()
    project.change("plots", gallery_size=2)
    assert repro(project)[0] == {"check", "plot@bolt", "plot@nut"}
    assert project.repro() == []


def test_few_categories_run_as_dvc_itself_runs_them(simple):
    assert len(NAMES) <= FEW
    done = simple.run(sys.executable, "-m", "tools.repro")
    assert "Stage 'plot@a' didn't change, skipping" in done.stdout


def test_two_runs_at_once_are_refused(tmp_path):
    with (
        Whole(tmp_path).exclusively(),
        pytest.raises(UserError, match="must have one run at a time"),
        Whole(tmp_path).exclusively(),
    ):
        pass


def test_a_lock_is_cut_and_put_together_in_its_very_bytes(tmp_path):
    lock = parse_lock(LOCK)
    assert list(lock) == ["check", "train@a b"]
    assert "".join(lock.values()) == BODY
    assert list(cut_lock(lock, ["report", "check"])) == ["check"]
    path = tmp_path / "dvc.lock"
    for text in (LOCK, (ROOT / "dvc.lock").read_text()):
        write_lock(path, parse_lock(text))
        assert path.read_text() == text
    write_lock(path, {})  # without entries there is no file, as DVC has it
    assert not path.exists()
    assert read_lock(path) == {}


@pytest.mark.parametrize(
    "text",
    [f"<<<<<<< HEAD\n{LOCK}", LOCK.replace("  'train", "<<<<<<< HEAD\n  'train"), LOCK + BODY],
    ids=["conflict at the top", "conflict", "twice"],
)
def test_a_lock_that_dvc_has_not_written_is_refused(text):
    rule = r"dvc\.lock must be as DVC writes it, each stage once.*git checkout"
    with pytest.raises(UserError, match=rule):
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


def view(folder: Path, root: str) -> View:
    """A view of a project whose images are in another folder."""
    write_settings(folder, {"core": {"no_scm": True}})
    (folder / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    params = (ROOT / "params.yaml").read_text()
    assert "root: data/elpv" in params
    (folder / "params.yaml").write_text(params.replace("root: data/elpv", f"root: {root}"))
    return View(Whole(folder))


@pytest.mark.parametrize("above", ["../parts", "../images/parts", "../../images/parts"])
def test_images_may_be_beside_the_project(tmp_path, above):
    folder = tmp_path / "work/project"
    folder.mkdir(parents=True)
    (folder / above).mkdir(parents=True)
    made = view(folder, above)
    assert (made.folder / above).resolve() == (folder / above).resolve()


def test_images_far_above_the_project_and_absolute_paths_into_it_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.root must be an absolute path, or not as far above"):
        view(tmp_path, "../../../../parts")
    with pytest.raises(UserError, match=r"data.root must be relative.*, parts, got"):
        view(tmp_path, str(tmp_path / "parts"))


def test_settings_come_back_as_they_were(tmp_path):
    values = {"url": "https://x", "password": "a#b,c 'd'", "user": '"quoted"'}
    write_settings(tmp_path, {'remote "store"': values, "core": {"no_scm": True}})
    assert settings(tmp_path)['remote "store"'].items() >= values.items()


def test_settings_with_secrets_are_for_the_owner_alone(tmp_path):
    write_settings(tmp_path, {'remote "store"': {"url": "s3://x", "secret_access_key": "k"}})
    assert stat.S_IMODE((tmp_path / ".dvc/config").stat().st_mode) == 0o600


def test_an_action_is_insisted_on_with_growing_pauses_until_it_succeeds_or_is_given_up():
    answers, pauses = iter(["one", "two", None]), []
    assert insist(lambda: next(answers), lambda *pause: pauses.append(pause)) is None
    assert pauses == [(1, "one"), (2, "two")]
    assert insist(lambda: "no", lambda *_: True) == "no"
    pauses.clear()
    assert insist(lambda: "no", lambda *pause: pauses.append(pause)) == "no"
    assert [delay for delay, _ in pauses] == [1, 2, 4, 8, 16, 32]
