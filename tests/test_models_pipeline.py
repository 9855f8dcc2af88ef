"""A model runs through the pipeline by its name, and no other code of the library names it."""

import csv
import shutil
from pathlib import Path

import pytest
from builders.images import write_category
from builders.models import toy_model, write_autoencoder
from builders.projects import ROOT, Project, read_json
from ruamel.yaml import YAML

from anomaly_detection import Detector, models
from stages import check, evaluate, export, fetch, plot, prepare, pretrain, report, train

SIZE = 32


@pytest.fixture(autouse=True)
def toy(tmp_path):
    with toy_model(tmp_path / "models"):
        yield


def assert_reported(folder: Path, category: str, name: str) -> None:
    """The model's results are there, and its detector gives the verdicts of the evaluation."""
    training = read_json(folder / "metrics" / category / "train.json")
    assert training["model"] == name
    default = models.parameters(name).model_fields["batch_size"].default
    assert training["parameters"]["training"]["batch_size"] == default
    detector = Detector.load(folder / "detectors" / f"{category}.pt")
    with (folder / "predictions" / category / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        prediction = detector.predict(folder / "parts" / category / row["path"])
        assert prediction.verdict == ("anomalous" if row["pred_label"] == "1" else "normal")
    assert name in (folder / "report" / "index.html").read_text()


def change_params(path: Path, **sections) -> None:
    yaml = YAML()
    params = yaml.load(path)
    for section, values in sections.items():
        params[section].update(values)
    yaml.dump(params, path)


def test_the_toy_model_runs_through_the_stages_by_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_category(tmp_path / "parts" / "bolt", size=SIZE)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    change_params(
        tmp_path / "params.yaml",
        data={"root": "parts", "categories": ["bolt"], "image_size": SIZE},
        model={"name": "autoencoder"},
        evaluation={"false_reject_rate": 0.25, "synthetic_images": 1},
        export={"formats": []},
    )
    check.main()
    fetch.main()
    for stage in (prepare, pretrain, train, evaluate, export, plot):
        stage.main("bolt")
    report.main()
    assert_reported(tmp_path, "bolt", "autoencoder")


@pytest.mark.exhaustive
def test_every_model_runs_through_the_pipeline_by_its_name_alone(tmp_path):
    project = Project(tmp_path / "project")
    write_autoencoder(project.folder / "anomaly_detection" / "models")
    names = models.names()
    for category in names:
        write_category(project.folder / "parts" / category, size=SIZE)
    project.change("data", categories=names, image_size=SIZE)
    project.change("training", num_epochs="auto", batch_size="auto")
    project.change("efficientad", num_steps=10)
    project.change(
        "overrides", **{name: {"model": {"name": name}} for name in names if name != "autoencoder"}
    )
    project.commit("a model more")
    project.dvc("exp", "run", "-S", "model.name=autoencoder")
    for name in names:
        assert_reported(project.folder, name, name)
