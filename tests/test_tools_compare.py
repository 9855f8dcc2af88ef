"""`tools.compare`, image by image, and `tools.select`, by synthetic defects alone."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from builders.detectors import SIZE, pictures, write_detector
from builders.images import write_image
from builders.projects import ROOT, Project, environment, read_json
from ruamel.yaml import YAML

import stages.check
import stages.prepare
from anomaly_detection import models
from anomaly_detection.config import ConfigError
from anomaly_detection.data.decode import content_hash
from anomaly_detection.errors import DataError
from anomaly_detection.evaluation.synthetic import FAMILIES
from anomaly_detection.evaluation.synthetic import SIZES as DEFECT_SIZES
from anomaly_detection.selection import OPACITIES, areas_by_family, choose, family_cases, mean_areas
from tools import select, trial
from tools.compare import CHANGES, CompareError, compare, judged, main, paired, print_table


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


def test_changes_are_listed_by_direction_and_the_table_shows_new_misses_first(capsys):
    result = compare(rows(FIRST), rows(SECOND))
    changes = {name: result[name] for name in CHANGES}
    assert changes == {
        "new_misses": ["bad2"],
        "fixed_misses": ["bad3"],
        "new_false_rejects": ["good1"],
        "fixed_false_rejects": ["good2"],
    }
    assert result["mcnemar_p_value"] == pytest.approx(1)  # two against two
    assert result["num_images"] == 6
    assert result["image_auroc"] == pytest.approx([7 / 9, 8 / 9])
    assert result["image_auroc_difference"] == pytest.approx(1 / 9)  # second minus first
    low, high = result["image_auroc_difference_interval"]
    assert low < 1 / 9 < high
    print_table("bolt", "HEAD", "workspace", result | {"num_seen": 0, "num_dropped": 0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bolt: HEAD -> workspace, 6 test images"
    assert "0.7778 -> 0.8889, difference +0.1111" in lines[1]
    assert [line.split() for line in lines[2:4]] == [["new", "misses", "1"], ["bad2"]]


def test_all_changes_for_the_worse_have_a_small_p_value():
    before, after = ({f"bad{i}": score for i in range(5)} | {"good": 0} for score in (0.9, 0.1))
    result = compare(rows(before), rows(after))
    assert len(result["new_misses"]) == 5
    assert result["mcnemar_p_value"] == pytest.approx(2 * 0.5**5)


def test_one_class_has_verdicts_and_no_auroc():
    good = {path: score for path, score in FIRST.items() if path.startswith("good")}
    result = compare(rows(good), rows(good, threshold=0.8))
    assert result["fixed_false_rejects"] == ["good2"]
    assert "image_auroc" not in result


def test_only_the_images_of_the_second_are_compared_and_new_ones_are_apart():
    before, after = {"bad1": 0.9, "good1": 0.1}, {"bad1": 0.8, "good2": 0.2}
    shared, new = paired(rows(before), rows(after), "nut")
    assert {path: row["score"] for path, row in shared.items()} == {"bad1": "0.9"}
    assert list(new) == ["good2"]


def test_an_image_of_another_name_or_label_is_the_same_image_unlike_one_of_another_content():
    first, second = rows(FIRST), rows(FIRST)
    second["bad/moved"] = second.pop("good3") | {"label": "1"}
    shared, new = paired(first, second, "bolt")
    assert (len(shared), new) == (6, {})
    result = compare(shared, {path: row | {"pred_label": "1"} for path, row in second.items()})
    assert "bad/moved" in result["fixed_misses"]
    first["bad1"], first["good1"] = first["good1"], first["bad1"]
    with pytest.raises(CompareError, match=r"bolt: an image must .* but bad1 has another .* of 2;"):
        paired(first, rows(FIRST), "bolt")


def test_more_than_two_revisions_are_refused(capsys):
    with pytest.raises(SystemExit):
        main("one", "two", "three")
    assert "REV must be given twice at most, got one two three" in capsys.readouterr().err


def test_where_images_have_masks_new_ones_are_judged_with_theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("detectors").mkdir()
    with_masks = {"bit_depth": 16, "image_size": SIZE, "mask": "each"}
    write_detector(Path("detectors/bolt.pt"), preprocessing=with_masks)
    values = pictures(1)[0].transpose(1, 2, 0).copy()
    values[:8, :8] = 255
    images = {}
    for name, start in (("whole.png", 0), ("below.png", 20)):
        path = write_image(Path("parts/bolt/test") / name, values)
        images[f"test/{name}"] = {"sha256": content_hash(path.read_bytes())}
        judged_there = np.zeros((SIZE, SIZE), np.uint8)
        judged_there[start:] = 255
        write_image(Path("parts/bolt/judged") / name, judged_there)
    found = judged("bolt", "workspace", images, {"root": "parts", "mask": "judged"})
    assert found["test/whole.png"]["score"] > 2 * found["test/below.png"]["score"]
    with pytest.raises(DataError, match=r"whole.png: must have a mask, since the detector was"):
        judged("bolt", "workspace", images, {"root": "parts", "mask": None})


HEADS = "path,sha256,defect_type,label,score,pred_label\n"


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """The current folder is a repository whose stage copies what it has found from `made`.

    The first revision was fitted to `seen.png` and has tested `a.png` and `b.png`; the workspace,
    `a.png`, `seen.png`, and two that are new: `bad.png` and `good.png`.
    """
    rows = {}
    images = pictures(5, seed=3).transpose(0, 2, 3, 1)
    images[0, 8:24, 8:24] = 255
    for name, values in zip(("bad", "good", "a", "b", "seen"), images, strict=True):
        path = write_image(tmp_path / "parts/bolt" / f"{name}.png", values)
        is_bad = name in ("a", "bad")
        kind = "x,1" if is_bad else "good,0"
        rows[name] = f"{path.name},{content_hash(path.read_bytes())},{kind},0.{int(is_bad)}"
    found = [f"{rows[name]},{int(name == 'bad')}" for name in ("a", "seen", "bad", "good")]
    hash_of_seen = rows["seen"].split(",")[1]
    scores = "made/predictions/scores.csv"
    texts = {
        scores: f"{HEADS}{rows['a']},1\n{rows['b']},0\n",
        "made/prepared/train/index.csv": f"path,sha256,split\nold.png,{hash_of_seen},fit\n",
        "params.yaml": "data:\n  root: parts\n  categories:\n    - bolt\n",
        "dvc.yaml": "stages:\n  evaluate:\n"
        "    cmd: mkdir -p data/prepared predictions detectors &&"
        " cp -r made/predictions predictions/bolt && cp -r made/prepared data/prepared/bolt &&"
        " cp made/detectors/bolt.pt detectors\n"
        "    deps: [made]\n"
        "    outs: [predictions/bolt, data/prepared/bolt, detectors/bolt.pt]\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "made/detectors").mkdir()
    write_detector(tmp_path / "made/detectors/bolt.pt", threshold=8.0)
    monkeypatch.chdir(tmp_path)
    for command in (
        "git init -q",
        "git config user.email someone@example.com",
        "git config user.name Someone",
        "dvc init -q",
        "dvc repro -q",
        "git add -A",
        "git commit -qm first",
    ):
        subprocess.run(command.split(), env=environment(), check=True)
    Path(scores).write_text(HEADS + "\n".join(found) + "\n")
    subprocess.run(["dvc", "repro", "-q"], env=environment(), check=True)
    return tmp_path


def test_a_revision_is_compared_with_the_workspace_and_faults_are_one_line(repository, capsys):
    main()
    shared, new = capsys.readouterr().out.split(
        "bolt: HEAD -> workspace, 2 new test images; if they are there "
    )
    assert shared.startswith("bolt: HEAD -> workspace, 1 test images\n")
    assert "new misses            1\n    a.png" in shared
    assert new.startswith("because HEAD was wrong, they favour workspace\n  image AUROC 1.0000 ->")
    assert "left out: 1 that HEAD was fitted or calibrated with\n" in new
    assert "left out: 1 that only HEAD has tested\n" in new
    main("HEAD", "--json")
    result = json.loads(capsys.readouterr().out)["bolt"]
    assert result["new_misses"] == ["a.png"]
    assert result["new"]["num_images"] == 2
    assert [result["new"][change] for change in CHANGES] == [[]] * 4
    with pytest.raises(CompareError, match=r"^nowhere must be a revision or an experiment"):
        main("nowhere")
    (repository / "parts/bolt/bad.png").write_bytes(b"another")
    rule = r"^parts/bolt/bad.png must be the image that was tested; check it out\.$"
    with pytest.raises(CompareError, match=rule):
        main()
    shutil.rmtree(repository / ".dvc/cache")
    done = subprocess.run(
        [sys.executable, "-m", "tools.compare"],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    rule = "predictions/bolt/scores.csv of HEAD must be in DVC's cache or a remote"
    assert rule in done.stderr
    assert "Traceback" not in done.stderr


DEFAULT = {"blob": 0.9, "scratch": 0.8, "noise": 0.7}


def test_the_areas_are_those_of_each_family():
    areas = areas_by_family([0.1, 0.3], [0.2, 0.4, 0.0], ["blob", "blob", "scratch"])
    assert areas == {"blob": 0.75, "scratch": 0.0}
    assert mean_areas([areas, {"blob": 0.25, "scratch": 1.0}]) == {"blob": 0.5, "scratch": 0.5}


@pytest.mark.parametrize(
    ("rival", "is_chosen"),
    [
        ({"blob": 0.91, "scratch": 0.81, "noise": 0.71}, True),
        ({"blob": 0.91, "scratch": 0.79, "noise": 0.71}, True),  # two of three, and the worst
        ({"blob": 0.99, "scratch": 0.99, "noise": 0.69}, False),  # worse in the worst
        ({"blob": 0.89, "scratch": 0.79, "noise": 0.75}, False),  # better in one alone
        (DEFAULT, False),
    ],
)
def test_a_rival_must_win_most_families_and_the_worst(rival, is_chosen):
    chosen = choose({"default": DEFAULT, "rival": rival}, "default")
    assert chosen == ("rival" if is_chosen else "default")


def test_of_several_rivals_the_best_in_the_worst_family_is_chosen():
    strong = {"blob": 1.0, "scratch": 1.0, "noise": 0.72}
    even = {"blob": 0.91, "scratch": 0.81, "noise": 0.75}
    assert choose({0: DEFAULT, 1: strong, 2: even}, 0) == 2


def test_every_family_gets_every_size_and_opacity_before_any_comes_twice():
    images = [{"image": np.zeros((3, 16, 16), np.uint8), "position": 0}] * 3
    cases = family_cases(images, len(DEFECT_SIZES) * len(OPACITIES), seed=0)
    assert max(Counter((case.kind, case.size, case.opacity) for case in cases).values()) == 1
    assert {case.kind for case in cases} == set(FAMILIES)
    assert len(FAMILIES) >= 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Project:
    """A project with two prepared categories, without their test images, and one more."""
    project = Project(tmp_path_factory.mktemp("project"))
    project.change("data", image_size=32, validation_fraction=0.3)
    project.change("model", name="gaussian", backbone="test_resnet", weights="random")
    project.change("training", num_epochs="auto", batch_size="auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        for category in ("bolt", "nut"):
            stages.prepare.main(category)
            shutil.rmtree(f"data/prepared/{category}/test")  # which judge and choose nothing
    return project


@pytest.fixture
def project(prepared, monkeypatch) -> Project:
    """The same, as the current folder, with its parameters put back afterwards."""
    monkeypatch.chdir(prepared.folder)
    for module in (select, trial):
        monkeypatch.setattr(module, "NUM_DEFECTS", 12)
    before = Path("params.yaml").read_bytes()
    yield prepared
    Path("params.yaml").write_bytes(before)


def test_candidates_are_ranked_without_test_images_and_their_overrides_are_valid(project, capsys):
    select.main("--models", "gaussian", "patchcore")
    output = capsys.readouterr().out
    assert Path("selection.png").stat().st_size > 10_000
    result = read_json(Path("selection.json"))
    assert list(result) == ["bolt", "nut"]
    block = {}
    for category, one in result.items():
        candidates = one["candidates"]
        assert candidates[0]["override"] == {}
        content = read_json(Path("metrics") / category / "audit.json")["content"]
        assert one["content"] == {x: content[x] for x in ("fit", "validation")}
        assert {x["model"] for x in candidates} == {"gaussian", "patchcore"}
        chosen = choose({i: x["areas"] for i, x in enumerate(candidates)}, 0)
        assert one["chosen"] == chosen
        if chosen:
            block[category] = candidates[chosen]["override"]
        assert f"{category}: AUROC in % of 24 defects of each family" in output
    printed = output.partition("for these categories:\n")[2].partition("Picture:")[0]
    assert (YAML(typ="safe").load(printed) or {}).get("overrides", {}) == block
    for candidate in result["bolt"]["candidates"]:  # each could have been chosen
        project.change("overrides", bolt=candidate["override"])
        stages.check.main()


def test_the_same_images_give_the_same_table_and_other_categories_are_kept(project, capsys):
    path = Path("selection.json")
    path.write_text('{"nut": "as it was"}')
    tables = []
    for _ in range(2):
        select.main("bolt", "--models", "gaussian")
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert "gaussian" in tables[0]
    assert read_json(path)["nut"] == "as it was"
    assert "candidates" in read_json(path)["bolt"]


def test_mistakes_are_one_line(project, capsys):
    rule = r"^CATEGORY must be one of data.categories, bolt, nut, got blot\.$"
    with pytest.raises(ConfigError, match=rule):
        select.main("blot")
    with pytest.raises(SystemExit):
        select.main("--models", "resnet")
    choices = f"invalid choice: 'resnet' (choose from {models.names()[0]!r}"
    assert choices in capsys.readouterr().err
    project.change("data", categories=["bolt", "nut", "washer"])
    done = project.run(sys.executable, "-m", "tools.select", "washer", ok=False)
    assert "run `dvc repro prepare@washer`" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
