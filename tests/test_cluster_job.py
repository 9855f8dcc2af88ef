"""What a category's job on a cluster saves, and what of that comes back."""

import json

import pytest
from scratch import Project

from tools.cluster.dvc import environment, write_settings
from tools.cluster.job import Job
from tools.cluster.view import Project as Whole

PIPELINE = """\
stages:
  make:
    cmd: mkdir -p times/a && echo 1 > times/a/make.json && cp source result
    deps:
      - source
    outs:
      - result
"""


def test_a_job_saves_the_times_of_its_stages_which_dvc_does_not_know(tmp_path, monkeypatch, capfd):
    core = {"no_scm": True, "analytics": False, "check_update": False, "remote": "store"}
    write_settings(tmp_path, {"core": core, 'remote "store"': {"url": str(tmp_path / "store")}})
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "source").write_text("2")
    monkeypatch.chdir(tmp_path)
    Job(["make"], environment()).run(save_every=60)
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last == {"saved": ["dvc.lock", "times/a/make.json"]}


def test_metrics_and_times_that_a_job_has_saved_come_back(tmp_path):
    pytest.importorskip("ray")
    from tools.cluster.runs import Run

    project = Project(tmp_path / "project")
    parts = tmp_path / "parts"
    (project.folder / "parts").rename(parts)
    project.change("data", root=str(parts))
    project.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    run = Run(Whole(project.folder), threads=1, cpus=1, save_every=60)
    saved = {"times/bolt/train.json": b"1", "metrics/bolt/train.json": b"2", "params.yaml": b"3"}
    run.bases["bolt"] = b"1"
    run.save("bolt", saved)
    assert run.finish("bolt", {"failed": "export has failed"}) == "export has failed"
    assert (project.folder / "times/bolt/train.json").read_bytes() == b"1"
    assert (project.folder / "metrics/bolt/train.json").read_bytes() == b"2"
    assert (project.folder / "params.yaml").read_bytes() != b"3"
