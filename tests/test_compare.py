import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_image
from builders.projects import environment

from anomaly_detection import models
from anomaly_detection.data.decode import content_hash
from anomaly_detection.errors import DataError
from anomaly_detection.inference import save_detector
from anomaly_detection.models import snapshot
from tools.compare import CHANGES, CompareError, compare, judged, main, paired, print_table

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
    result = compare(rows(FIRST), rows(SECOND))
    assert result["new_misses"] == ["bad2"]
    assert result["fixed_misses"] == ["bad3"]
    assert result["new_false_rejects"] == ["good1"]
    assert result["fixed_false_rejects"] == ["good2"]
    assert result["mcnemar_p_value"] == pytest.approx(1.0)  # two against two
    assert result["num_images"] == 6


def test_all_changes_for_the_worse_have_a_small_p_value():
    worse = rows({f"bad{i}": 0.1 for i in range(5)} | {"good": 0.0})
    result = compare(rows({f"bad{i}": 0.9 for i in range(5)} | {"good": 0.0}), worse)
    assert len(result["new_misses"]) == 5
    assert result["mcnemar_p_value"] == pytest.approx(2 * 0.5**5)


def test_the_difference_of_auroc_is_second_minus_first():
    result = compare(rows(FIRST), rows(SECOND))
    assert result["image_auroc"] == pytest.approx([7 / 9, 8 / 9])
    assert result["image_auroc_difference"] == pytest.approx(1 / 9)
    low, high = result["image_auroc_difference_interval"]
    assert low < 1 / 9 < high


def test_one_class_has_verdicts_and_no_auroc():
    good = {path: score for path, score in FIRST.items() if path.startswith("good")}
    result = compare(rows(good), rows(good, threshold=0.8))
    assert result["fixed_false_rejects"] == ["good2"]
    assert "image_auroc" not in result


def test_only_the_images_of_the_second_are_compared_and_new_ones_are_apart():
    shared, new = paired(
        rows({"bad1": 0.9, "good1": 0.1}), rows({"bad1": 0.8, "good2": 0.2}), "nut"
    )
    assert list(shared) == ["bad1"]
    assert shared["bad1"]["score"] == "0.9"
    assert list(new) == ["good2"]


def test_an_image_of_another_name_or_label_is_the_same_image():
    first, second = rows(FIRST), rows(FIRST)
    moved = second.pop("good3")
    second["bad/moved"] = moved | {"label": "1"}
    shared, new = paired(first, second, "bolt")
    assert (len(shared), new) == (6, {})
    result = compare(shared, {path: row | {"pred_label": "1"} for path, row in second.items()})
    assert "bad/moved" in result["fixed_misses"]


def test_an_image_with_another_content_is_refused():
    first = rows(FIRST)
    first["bad1"], first["good1"] = first["good1"], first["bad1"]
    with pytest.raises(CompareError, match=r"bolt: an image must .* but bad1 has another .* of 2;"):
        paired(first, rows(FIRST), "bolt")


def test_more_than_two_revisions_are_refused(capsys):
    with pytest.raises(SystemExit):
        main("one", "two", "three")
    assert "REV must be given twice at most, got one two three" in capsys.readouterr().err


def test_the_table_shows_new_misses_first(capsys):
    result = compare(rows(FIRST), rows(SECOND)) | {"num_seen": 0, "num_dropped": 0}
    print_table("bolt", "HEAD", "workspace", result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bolt: HEAD -> workspace, 6 test images"
    assert "0.7778 -> 0.8889, difference +0.1111" in lines[1]
    assert [line.split() for line in lines[2:4]] == [["new", "misses", "1"], ["bad2"]]


def write_detector(path: Path, **preprocessing: str) -> None:
    """A detector for which bright pictures are anomalous."""
    options = {"backbone": "test_resnet", "weights": "random"}
    torch.manual_seed(0)
    model = models.spec("patchcore").build(models.parameters("patchcore")(**options)).eval()
    images = torch.randint(100, 140, (20, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        model.bank = model.extract(images[:4]).permute(0, 2, 3, 1).flatten(0, 2).clone()
        model.standardise([{"image": images[4:12]}], torch.device("cpu"))
        threshold = 2 * float(model(images[12:])["pred_score"].max())
    save_detector(
        path,
        model=snapshot("patchcore", model),
        threshold=threshold,
        calibration_scores=[0.0],
        preprocessing={"bit_depth": 16, "image_size": 64, **preprocessing},
        precision="float32",
        parameters={},
        provenance={},
    )


def test_where_pictures_have_masks_new_ones_are_judged_with_theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("detectors").mkdir()
    write_detector(Path("detectors/bolt.pt"), mask="each")
    values = np.random.default_rng(0).integers(100, 140, (64, 64, 3), np.uint8)
    values[:16, :16] = 255
    images = {}
    for name, start in (("whole.png", 0), ("below.png", 40)):
        path = write_image(Path("parts/bolt/test") / name, values)
        images[f"test/{name}"] = {"sha256": content_hash(path.read_bytes())}
        judged_there = np.zeros((64, 64), np.uint8)
        judged_there[start:] = 255
        write_image(Path("parts/bolt/judged") / name, judged_there)
    found = judged("bolt", "workspace", images, {"root": "parts", "mask": "judged"})
    assert found["test/whole.png"]["score"] > 2 * found["test/below.png"]["score"]
    with pytest.raises(DataError, match=r"whole.png: must have a mask, since the detector was"):
        judged("bolt", "workspace", images, {"root": "parts", "mask": None})


HEADS = "path,sha256,defect_type,label,score,pred_label\n"


@pytest.fixture
def project(tmp_path):
    """A repository whose stage copies what it has found from a folder.

    The first revision was fitted to `seen.png` and has tested `a.png` and `b.png`; the workspace,
    `a.png`, `seen.png`, and two that are new: `bad.png` and `good.png`.
    """
    rng = np.random.default_rng(0)
    rows = {}
    for name in ("a", "b", "seen", "bad", "good"):
        values = rng.integers(100, 140, (64, 64, 3), np.uint8)
        if name == "bad":
            values[20:50, 20:50] = 255
        path = write_image(tmp_path / "parts" / "bolt" / f"{name}.png", values)
        is_bad = name in ("a", "bad")
        kind = "x,1" if is_bad else "good,0"
        rows[name] = f"{path.name},{content_hash(path.read_bytes())},{kind},0.{int(is_bad)}"
    made = tmp_path / "made"
    for folder in ("predictions", "prepared", "detectors"):
        (made / folder).mkdir(parents=True)
    (made / "prepared" / "train").mkdir()
    (made / "predictions" / "scores.csv").write_text(f"{HEADS}{rows['a']},1\n{rows['b']},0\n")
    (made / "prepared" / "train" / "index.csv").write_text(
        f"path,sha256,split\nold.png,{rows['seen'].split(',')[1]},fit\n"
    )
    write_detector(made / "detectors" / "bolt.pt")
    (tmp_path / "params.yaml").write_text("data:\n  root: parts\n  categories:\n    - bolt\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  evaluate:\n"
        "    cmd: mkdir -p data/prepared predictions detectors &&"
        " cp -r made/predictions predictions/bolt && cp -r made/prepared data/prepared/bolt &&"
        " cp made/detectors/bolt.pt detectors\n"
        "    deps: [made]\n"
        "    outs: [predictions/bolt, data/prepared/bolt, detectors/bolt.pt]\n"
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
    found = "\n".join(f"{rows[name]},{int(name == 'bad')}" for name in ("a", "seen", "bad", "good"))
    (made / "predictions" / "scores.csv").write_text(f"{HEADS}{found}\n")
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
    shared, new = output.split("bolt: HEAD -> workspace, 2 new test images; if they are there ")
    assert shared.startswith("bolt: HEAD -> workspace, 1 test images\n")
    assert "new misses            1\n    a.png" in shared
    assert new.startswith("because HEAD was wrong, they favour workspace\n  image AUROC 1.0000 ->")
    assert "left out: 1 that HEAD was fitted or calibrated with\n" in new
    assert "left out: 1 that only HEAD has tested\n" in new
    result = json.loads(call(project, "python", "-m", "tools.compare", "HEAD", "--json").stdout)
    assert result["bolt"]["new_misses"] == ["a.png"]
    assert result["bolt"]["new"]["num_images"] == 2
    assert [result["bolt"]["new"][change] for change in CHANGES] == [[]] * 4
    unknown = call(project, "python", "-m", "tools.compare", "nowhere", ok=False)
    assert unknown.stderr.startswith("nowhere must be a revision or an experiment")
    (project / "parts/bolt/bad.png").write_bytes(b"another")
    changed = call(project, "python", "-m", "tools.compare", ok=False)
    assert changed.stderr == (
        "parts/bolt/bad.png must be the image that was tested; check it out.\n"
    )
    shutil.rmtree(project / ".dvc" / "cache")
    missing = call(project, "python", "-m", "tools.compare", ok=False)
    assert (
        "predictions/bolt/scores.csv of HEAD must be in DVC's cache or a remote" in missing.stderr
    )
    assert "Traceback" not in missing.stderr
