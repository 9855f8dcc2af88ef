"""What readers and other code rely on: the docs, the public names, the notebook."""

import re
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
import torch

from anomaly_detection.trainer import loop

ROOT = Path(__file__).parent.parent
TRAINER = (ROOT / "docs/trainer.md").read_text()
PUBLIC = {
    "anomaly_detection": "Detector Prediction",
    "anomaly_detection.config": "load_config load_experiment_config",
    "anomaly_detection.data": (
        "MVTecDataset create_dataloader get_test_transforms get_train_transforms"
    ),
    "anomaly_detection.evaluation": "false_reject_threshold",
    "anomaly_detection.evaluator": "evaluate",
    "anomaly_detection.features": "FeaturePyramid available_levels",
    "anomaly_detection.cli": "main",
    "anomaly_detection.export": "export_detector measure_parity",
    "anomaly_detection.inference": "Detector DetectorError p_value save_detector",
    "anomaly_detection.metrics": (
        "compute_auroc compute_auroc_per_class plot_confusion_matrix plot_roc_curve"
    ),
    "anomaly_detection.models": "ModelSpec load_model restore snapshot",
    "anomaly_detection.models.ensemble": "EnsembleModel",
    "anomaly_detection.models.gaussian": "GaussianModel",
    "anomaly_detection.models.patchcore": "PatchCoreModel",
    "anomaly_detection.models.stfpm": "STFPMLoss STFPMModel STFPMTrainer",
    "anomaly_detection.trainer": "BaseTrainer Callback EarlyStopping",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_importable(module):
    for name in PUBLIC[module].split():
        assert callable(getattr(import_module(module), name))


def test_the_code_in_trainer_md_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TRAINER, flags=re.DOTALL)
    assert len(blocks) == 4
    torch.manual_seed(0)  # what a new process would draw; here, other tests have drawn before
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/trainer.md", "exec"), names)
    assert (tmp_path / "checkpoints/best_model.pth").exists()
    assert "epoch 3: loss" in capsys.readouterr().out


def test_the_order_in_trainer_md_is_that_of_the_loops_docstring():
    hooks, documented = (re.findall(r"\bon_\w+\(.*?\)", x) for x in (TRAINER, loop.__doc__))
    assert documented
    assert hooks[: len(documented)] == documented


def test_links_in_the_docs_lead_to_files():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    ]
    assert len(pages) > 10
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_the_notebook_is_committed_without_outputs():
    for cell in nbformat.read(ROOT / "notebooks/eval_stfpm.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
