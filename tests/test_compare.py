import shutil
import subprocess
from pathlib import Path

import pytest
from scratch import environment

from tools.compare import CompareError, compare, main, print_table

ROOT = Path(__file__).parent.parent


def rows(scores: dict[str, float], threshold: float = 0.5) -> dict[str, dict[str, str]]:
    """Predictions by image; names that start with `bad` are anomalous."""
    return {
        path: {
            "path": path,
            "sha256": f"hash of {path}",
            "label": str(int(path.startswith("bad"))),
            "score": str(score),
            "pred_label": str(int(score > threshold)),
        }
        for path, score in scores.items()
    }


FIRST = {"bad1": 0.9, "bad2": 0.8, "bad3": 0.2, "good1": 0.1, "good2": 0.7, "good3": 0.3}
SECOND = {"bad1": 0.9, "bad2": 0.4, "bad3": 0.6, "good1": 0.55, "good2": 0.2, "good3": 0.3}


def test_changed_verdicts_are_listed_by_direction():
    result = compare(rows(FIRST), rows(SECOND), "bolt")
    assert result["new_misses"] == ["bad2"]
    assert result["fixed_misses"] == ["bad3"]
    assert result["new_false_rejects"] == ["good1"]
    assert result["fixed_false_rejects"] == ["good2"]
    assert result["mcnemar_p_value"] == pytest.approx(1.0)  # two against two
    assert result["num_images"] == 6


def test_all_changes_for_the_worse_have_a_small_p_value():
    worse = rows({f"bad{i}": 0.1 for i in range(5)} | {"good": 0.0})
    result = compare(rows({f"bad{i}": 0.9 for i in range(5)} | {"good": 0.0}), worse, "bolt")
    assert len(result["new_misses"]) == 5
    assert result["mcnemar_p_value"] == pytest.approx(2 * 0.5**5)


def test_the_difference_of_auroc_is_second_minus_first():
    result = compare(rows(FIRST), rows(SECOND), "bolt")
    assert result["image_auroc"] == pytest.approx([7 / 9, 8 / 9])
    assert result["image_auroc_difference"] == pytest.approx(1 / 9)
    low, high = result["image_auroc_difference_interval"]
    assert low < 1 / 9 < high


def test_one_class_has_verdicts_and_no_auroc():
    good = {path: score for path, score in FIRST.items() if path.startswith("good")}
    result = compare(rows(good), rows(good, threshold=0.8), "bolt")
    assert result["fixed_false_rejects"] == ["good2"]
    assert "image_auroc" not in result


def test_different_test_sets_are_refused():
    fewer = {path: score for path, score in FIRST.items() if path != "good3"}
    with pytest.raises(CompareError, match=r"bolt: both must have the same .* got 6 and 5"):
        compare(rows(FIRST), rows(fewer), "bolt")


def renamed(first):
    first["other"] = first.pop("good3")


def exchanged(first):
    first["bad1"], first["good1"] = first["good1"], first["bad1"]


@pytest.mark.parametrize("change", [renamed, exchanged])
def test_other_names_of_the_same_images_are_refused(change):
    other = rows(FIRST)
    change(other)
    with pytest.raises(CompareError, match="got 6 and 6 that differ in name or content"):
        compare(rows(FIRST), other, "bolt")


def test_more_than_two_revisions_are_refused(capsys):
    with pytest.raises(SystemExit):
        main("one", "two", "three")
    assert "REV must be given twice at most, got one two three" in capsys.readouterr().err


def test_the_table_shows_new_misses_first(capsys):
    print_table("bolt", "HEAD", "workspace", compare(rows(FIRST), rows(SECOND), "bolt"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bolt: HEAD -> workspace, 6 test images"
    assert "0.7778 -> 0.8889, difference +0.1111" in lines[1]
    assert [line.split() for line in lines[2:4]] == [["new", "misses", "1"], ["bad2"]]


@pytest.fixture
def project(tmp_path):
    """A repository whose stage copies its scores from a file."""
    scores = "path,sha256,defect_type,label,score,pred_label\na,1,x,1,0.9,1\nb,2,good,0,0.1,0\n"
    (tmp_path / "params.yaml").write_text("data:\n  categories:\n    - bolt\n")
    (tmp_path / "scores.csv").write_text(scores)
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  evaluate:\n"
        "    cmd: mkdir -p predictions/bolt && cp scores.csv predictions/bolt/scores.csv\n"
        "    deps: [scores.csv]\n    outs: [predictions/bolt]\n"
    )
    for command in (
        "git init -q",
        "git config user.email someone@example.com",
        "git config user.name Someone",
        "dvc init -q",
        "dvc repro -q",
        "git add -A",
        "git commit -qm first",
    ):
        call(tmp_path, *command.split())
    (tmp_path / "scores.csv").write_text(scores.replace("0.9,1", "0.2,0"))
    call(tmp_path, "dvc", "repro", "-q")
    return tmp_path


def call(folder: Path, *command: str, ok: bool = True) -> subprocess.CompletedProcess:
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_revision_is_compared_with_the_workspace_and_faults_are_one_line(project):
    output = call(project, "python", "-m", "tools.compare").stdout
    assert "bolt: HEAD -> workspace, 2 test images" in output
    assert "new misses            1\n    a" in output
    assert (
        '"new_misses": [\n      "a"'
        in call(project, "python", "-m", "tools.compare", "HEAD", "--json").stdout
    )
    unknown = call(project, "python", "-m", "tools.compare", "nowhere", ok=False)
    assert unknown.stderr.startswith("nowhere must be a revision or an experiment")
    shutil.rmtree(project / ".dvc" / "cache")
    missing = call(project, "python", "-m", "tools.compare", ok=False)
    assert (
        "predictions/bolt/scores.csv of HEAD must be in DVC's cache or a remote" in missing.stderr
    )
    assert "Traceback" not in missing.stderr
