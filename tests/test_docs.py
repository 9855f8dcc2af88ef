import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_the_code_in_trainer_md_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "trainer.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    torch.manual_seed(0)  # what a new process would draw; here, other tests have drawn before
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/trainer.md", "exec"), names)
    assert (tmp_path / "checkpoints" / "best_model.pth").exists()
    assert "epoch 3: loss" in capsys.readouterr().out


def test_the_order_in_trainer_md_is_that_of_the_loops_docstring():
    from anomaly_detection.trainer import loop

    hooks = re.findall(r"\bon_\w+\(.*?\)", (ROOT / "docs" / "trainer.md").read_text())
    documented = re.findall(r"\bon_\w+\(.*?\)", loop.__doc__)
    assert hooks[: len(documented)] == documented


@pytest.mark.parametrize(
    "page",
    sorted(
        path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    ),
)
def test_links_and_files_named_in_the_docs_exist(page):
    path = ROOT / page
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link
