"""`anomaly-detection feedback`, as a user calls it, with the real git and dvc."""

import csv
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile
from builders.images import random_pixels, write_category, write_image
from builders.layouts import write_btad, write_table, write_visa
from builders.projects import Project, environment, read_json, read_rows

from anomaly_detection.cli import main
from anomaly_detection.data import scan_category
from anomaly_detection.data.arrays import read_index
from anomaly_detection.data.decode import content_hash


def image(name: str, seed: int) -> Path:
    return write_image(Path("line") / name, random_pixels(64, 64, 3, seed=seed))


def write_rows(*rows: str, heads: str = "path,score,verdict,label,defect_type") -> str:
    Path("corrections.csv").write_text("\n".join([heads, *rows]) + "\n")
    return "corrections.csv"


def feedback(*arguments: str, category: str = "parts/bolt", status: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["feedback", "corrections.csv", "--category", category, *arguments])
    assert ended.value.code == status


def refusal(category: str = "parts/bolt") -> str:
    with pytest.raises(SystemExit) as ended:
        main(["feedback", "corrections.csv", "--category", category])
    assert isinstance(ended.value.code, str)
    return ended.value.code


def run(*command: str | Path) -> str:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: str = ".") -> dict[str, bytes]:
    return {str(x): x.read_bytes() for x in sorted(Path(folder).rglob("*")) if x.is_file()}


@pytest.fixture
def bolt(tmp_path, monkeypatch) -> Path:
    """A category in the working directory, and images from the line."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        image(f"{i}.png", i)
    return write_category(Path("parts/bolt"), num_train=3, num_test=1)


def start_repository(*ignored: str) -> None:
    run("git", "init", "-q")
    run("git", "config", "user.email", "someone@example.com")
    run("git", "config", "user.name", "Someone")
    Path(".gitignore").write_text("\n".join(["/line", "corrections.csv", *ignored]))


def commit_all() -> None:
    run("git", "add", "-A")
    run("git", "commit", "-qm", "start")


@pytest.fixture
def repository(bolt) -> Path:
    """The same, in git, with the images of the line ignored."""
    start_repository()
    return bolt


CORRECTIONS = (
    "line/0.png,3.1,anomalous,normal,",
    "line/1.png,0.2,normal,anomalous,",
    "line/2.png,0.2,normal,1,scratch",
    "line/3.png,0.2,normal,,",
)


@pytest.mark.parametrize(
    ("write", "normal"),
    [(lambda root: write_category(root / "bolt"), "good"), (write_btad, "ok")],
    ids=["mvtec", "btad"],
)
def test_normal_images_are_for_training_and_defects_for_the_test(bolt, write, normal):
    folder = write(Path("others"))
    before = files(folder)
    write_rows(*CORRECTIONS)
    feedback(category=str(folder))
    added = {name: content for name, content in files(folder).items() if name not in before}
    hashes = [content_hash(Path(f"line/{i}.png").read_bytes()) for i in range(3)]
    places = [f"train/{normal}/0-", "test/anomalous/1-", "test/scratch/2-"]
    assert added == {
        f"{folder}/{place}{sha256[:12]}.png": Path(f"line/{i}.png").read_bytes()
        for i, (place, sha256) in enumerate(zip(places, hashes, strict=True))
    }
    assert files(folder).items() >= before.items()
    _, samples, findings = scan_category(folder.parent, folder.name)
    assert findings == []
    new = sorted((x.split, x.defect_type) for x in samples if str(x.path) in added)
    assert new == [("test", "anomalous"), ("test", "scratch"), ("train", "good")]


def test_a_folder_of_good_images_takes_good_ones_only(bolt):
    shutil.copytree(bolt / "train/good", "parts/nut")
    write_rows(CORRECTIONS[0])
    feedback(category="parts/nut")
    assert len(scan_category(Path("parts"), "nut")[1]) == 4
    write_rows(*CORRECTIONS)
    assert refusal("parts/nut").splitlines() == [
        f"corrections.csv, line {line}: parts/nut must have MVTec AD's layout to take defects, but "
        "has normal images and nothing else; move these to parts/nut/train/good."
        for line in (3, 4)
    ]


@pytest.mark.parametrize(
    ("heads", "end"),
    [("path,label", "\r\n"), ("label;defect_type;path", ""), ("\ufeffpath\tlabel", "\r\n")],
)
def test_a_table_gets_rows_in_its_own_columns_and_keeps_its_bytes(bolt, heads, end):
    separator = next(x for x in ",;\t" if x in heads)
    row = {"path": "good one.png", "label": "normal"}
    names = heads.lstrip("\ufeff").split(separator)
    line = separator.join(row.get(name, "") for name in names)
    folder = write_table(Path("parts"), line, heads=heads)
    table = folder / "samples.csv"
    before = table.read_bytes().replace(b"\n", end.encode() or b"\n") + end.encode()
    table.write_bytes(before)
    write_rows(*CORRECTIONS[:2])
    feedback(category=str(folder))
    content = table.read_bytes()
    assert content.startswith(before)
    assert len(content.splitlines()) == 4
    assert content.count(b"\r") == content.count(b"\n") * bool(end)
    _, samples, findings = scan_category(Path("parts"), "part")
    assert findings == []
    assert sorted((x.path.name.split("-")[0], x.split, x.label) for x in samples) == [
        ("0", "train", 0),
        ("1", "test", 1),
        ("good one.png", "train", 0),
    ]


def test_a_table_without_defect_types_takes_none_that_has_a_name(bolt):
    write_table(Path("parts"), "good one.png,normal", heads="path,label")
    write_rows(CORRECTIONS[2])
    assert refusal("parts/part") == (
        "corrections.csv, line 2: parts/part/samples.csv must have a column defect_type to take "
        "'scratch'; add it."
    )


def test_visa_is_refused_with_what_helps(bolt):
    write_visa(Path("visa"))
    write_rows(CORRECTIONS[0])
    assert refusal("visa/candle") == (
        "visa/candle must have another layout to take images, got VisA's, whose split is fixed; "
        "list its images in visa/candle/samples.csv (see docs/data.md), which then counts instead."
    )


FAULTS = {
    "line/0.png,,,good,": "label must be one of 0, 1, normal, anomalous, got 'good'.",
    "line/0.png,,,normal,scratch": "defect_type must be empty or good for normal images and",
    "line/0.png,,,anomalous,../bolt": "defect_type must be a folder's name other than good,",
    "line/0.png,,,anomalous,OK": "defect_type must be a folder's name other than good, got 'OK'",
    "line/0.png,,,anomalous,dark": "images of defect_type 'dark' must have masks,",
    "line/9.png,,,normal,": "line/9.png: must be readable: No such file",
    "line/damaged.png,,,normal,": "line/damaged.png: must be a whole image, but cannot be decoded",
    "line/0.webp,,,normal,": "line/0.webp must end with one of .png, .jpg,",
    "line/four.tif,,,normal,": "line/four.tif: must have 3 channels like the images of its",
    "parts/bolt/train/good/000.png,,,1,": "parts/bolt/train/good/000.png is anomalous, but the "
    "same picture is good in the data set; correct the label, or remove parts/bolt/train/good/000",
    "line/copy.png,,,normal,": "line/copy.png is good, but the same picture is dark in the data",
}


def test_all_faults_are_listed_by_line_and_nothing_is_written(bolt):
    shutil.copy("line/0.png", "line/0.webp")
    shutil.copy(bolt / "test/dark/000.png", "line/copy.png")
    Path("line/damaged.png").write_bytes(b"no image")
    four = np.zeros((8, 8, 4), np.uint8)
    tifffile.imwrite("line/four.tif", four, photometric="rgb", extrasamples=[0])
    write_rows(CORRECTIONS[1], *FAULTS)
    before = files()
    lines = refusal().splitlines()
    for number, (line, text) in enumerate(zip(lines, FAULTS.values(), strict=True), 3):
        assert line.startswith(f"corrections.csv, line {number}: {text}")
    assert files() == before


def test_the_same_image_with_two_labels_is_refused(bolt):
    shutil.copy("line/0.png", "line/again.png")
    write_rows("line/0.png,,,normal,", "line/again.png,,,anomalous,")
    assert refusal() == (
        "corrections.csv, line 3: line/again.png is anomalous, but the same picture is good as "
        "line/0.png; correct one of them."
    )


def test_an_image_that_has_changed_since_its_verdict_is_refused(bolt):
    sha256 = content_hash(Path("line/0.png").read_bytes())
    write_rows(f"line/0.png,normal,{sha256}", heads="path,label,sha256")
    feedback("--dry-run")
    write_rows(f"line/1.png,normal,{sha256}", heads="path,label,sha256")
    assert refusal() == (
        "corrections.csv, line 2: line/1.png must be the picture that was judged, but is another "
        "one now."
    )


def test_a_file_without_labels_and_a_category_that_is_not_there_are_refused(bolt):
    assert "corrections.csv must be a CSV file of `predict`: [Errno 2] No such file" in refusal()
    write_rows(heads="path,verdict")
    assert "columns must be path, label, and may be defect_type, verdict, sha256," in refusal()
    write_rows("line/0.png,", heads="path,label")
    assert "corrections.csv must have a label in some row, but has" in refusal()
    write_rows(*CORRECTIONS)
    assert "categories in parts: bolt." in refusal("parts/boIt")


def test_what_the_data_set_has_is_skipped_and_counted(bolt, capsys):
    shutil.copy(bolt / "test/good/000.png", "line/same.png")
    shutil.copy(bolt / "test/dark/000.png", "line/dark.png")
    shutil.copy("line/0.png", "line/twice.png")
    before = files("parts")
    write_rows(
        "line/same.png,,,normal,",
        "line/dark.png,,,anomalous,bright",
        "line/0.png,,,normal,",
        "line/twice.png,,,normal,",
    )
    feedback()
    first = capsys.readouterr().out.splitlines()[0]
    assert (
        first == "1 inspected images: 1 normal to train, 0 anomalous to test; 2 were there before"
    )
    assert len(files("parts")) == len(before) + 1


def test_a_dry_run_lists_the_copies_and_writes_nothing(repository, capsys):
    commit_all()
    write_rows(*CORRECTIONS)
    before = files()
    feedback("--dry-run")
    assert files() == before
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub("-[0-9a-f]{12}", "-HASH", line) for line in lines] == [
        "line/0.png -> parts/bolt/train/good/0-HASH.png",
        "line/1.png -> parts/bolt/test/anomalous/1-HASH.png",
        "line/2.png -> parts/bolt/test/scratch/2-HASH.png",
        "3 inspected images: 1 normal to train, 2 anomalous to test; 0 were there before",
    ]


@pytest.mark.parametrize(
    ("verdicts", "warns"),
    [(["anomalous"] * 5, True), (["anomalous"] * 4, False), (["anomalous", "normal"] * 3, False)],
)
def test_false_rejects_alone_are_no_random_sample(bolt, capsys, verdicts, warns):
    for i in range(len(verdicts)):
        image(f"{i}.png", i)
    write_rows(*(f"line/{i}.png,,{x},normal," for i, x in enumerate(verdicts)))
    feedback("--dry-run")
    assert ("so they are no random sample" in capsys.readouterr().out) == warns


def test_without_git_or_where_git_ignores_the_folder_there_is_no_commit(bolt, capsys):
    write_rows(*CORRECTIONS)
    feedback()
    said = [
        "no commit, since neither git nor DVC tracks parts/bolt: `dvc add parts/bolt` and "
        "`git commit` keep a state of it",
        "next: dvc repro",
    ]
    assert capsys.readouterr().out.splitlines()[1:] == said
    assert len(list(bolt.glob("train/good/0-*.png"))) == 1
    start_repository("/parts")
    commit_all()
    feedback()
    assert capsys.readouterr().out.splitlines()[1] == said[0]
    assert run("git", "rev-list", "--count", "HEAD") == "1\n"


def test_git_commits_these_files_and_nothing_else_of_the_users(repository, capsys):
    Path("notes.txt").write_text("old")
    commit_all()
    Path("notes.txt").write_text("changed")
    run("git", "add", image("../parts/bolt/train/good/mine.png", 7))
    image("../parts/bolt/train/good/m*.png", 8)  # a pattern that fits the other
    write_rows(*CORRECTIONS, "parts/bolt/train/good/m*.png,,,normal,")
    feedback()
    assert run("git", "log", "-1", "--format=%B").strip() == (
        "4 inspected images: 2 normal to train, 2 anomalous to test\n\nFrom corrections.csv"
    )
    changed = run("git", "show", "--format=", "--name-only").splitlines()
    assert sorted(re.sub("-[0-9a-f]{12}", "", name) for name in changed) == [
        "parts/bolt/test/anomalous/1.png",
        "parts/bolt/test/scratch/2.png",
        "parts/bolt/train/good/0.png",
        "parts/bolt/train/good/m*.png",
    ]
    assert run("git", "status", "--porcelain").splitlines() == [
        " M notes.txt",
        "A  parts/bolt/train/good/mine.png",
    ]
    head = run("git", "rev-parse", "--short", "HEAD").strip()
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"committed as {head}",
        f"next: dvc repro, then python -m tools.compare {head}",
    ]
    feedback()
    assert "nothing to commit: HEAD has them" in capsys.readouterr().out
    assert run("git", "rev-list", "--count", "HEAD") == "2\n"


def test_a_table_in_git_is_committed_with_its_images(repository):
    write_table(Path("parts"))
    commit_all()
    write_rows(CORRECTIONS[0])
    feedback(category="parts/part")
    assert "parts/part/samples.csv" in run("git", "show", "--format=", "--name-only")
    assert run("git", "status", "--porcelain") == ""


def test_when_a_hook_refuses_the_images_stay_and_the_same_command_commits(repository, capfd):
    commit_all()
    hook = Path(".git/hooks/pre-commit")
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho not on a Friday >&2\nexit 1\n")
    hook.chmod(0o755)
    write_rows(*CORRECTIONS)
    assert refusal() == (
        "git and DVC must take the images, but one has refused, as it says above. They are "
        "copied; mend what it says, and the same command commits them."
    )
    assert "not on a Friday" in capfd.readouterr().err
    hook.unlink()
    feedback()
    assert "3 were there before" in capfd.readouterr().out
    assert "3 inspected images: 1 normal" in run("git", "log", "-1", "--format=%s")
    assert run("git", "status", "--porcelain") == ""


@pytest.fixture
def tracked(repository) -> Path:
    """The same with parts/ tracked by DVC."""
    run("dvc", "init", "-q")
    run("dvc", "add", "-q", "parts")
    commit_all()
    return repository


def test_an_interrupted_run_is_completed_in_a_folder_that_dvc_tracks(tracked, monkeypatch):
    Path("staged.txt").write_text("staged")
    run("git", "add", "staged.txt")
    write_rows(*CORRECTIONS)
    copyfile = shutil.copyfile

    def interrupted(source: Path, path: Path) -> None:
        copyfile(source, path)
        if source.name == "1.png":
            raise KeyboardInterrupt

    before = files("parts")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", interrupted)
        feedback(status=130)
    assert len(files("parts")) == len(before) + 1
    feedback()
    assert len(files("parts")) == len(before) + 3
    assert run("git", "show", "--format=%s", "--name-only").split("\n")[:4] == [
        "3 inspected images: 1 normal to train, 2 anomalous to test",
        "",
        "parts.dvc",
        "",
    ]
    assert run("git", "status", "--porcelain") == "A  staged.txt\n"
    assert run("dvc", "status", "-q") == ""
    shutil.rmtree("parts")
    run("dvc", "checkout", "-q")
    assert len(list(tracked.glob("test/scratch/2-*.png"))) == 1


def test_a_folder_that_a_stage_writes_is_refused(repository):
    run("dvc", "init", "-q")
    Path("dvc.yaml").write_text("stages:\n  fetch:\n    cmd: cp -r parts made\n    outs: [made]\n")
    run("dvc", "repro", "-q")
    write_rows(*CORRECTIONS)
    assert refusal("made/bolt") == (
        "made/bolt must not be written by a stage, but 'fetch' writes made, and DVC would delete "
        "what is added; copy that to a folder of your own, such as parts, and set data.root to it."
    )


@pytest.mark.exhaustive
def test_corrected_verdicts_become_a_new_detector_that_is_compared_as_advised(
    tmp_path, monkeypatch, capsys
):
    project = Project(tmp_path)
    monkeypatch.chdir(tmp_path)
    project.change("data", categories=["bolt"])
    project.use_small_model("patchcore", num_epochs="auto")
    Path(".git/info/exclude").write_text("/line\n/corrections.csv\n")
    project.dvc("add", "-q", "parts")
    project.repro()
    project.commit("first detector")
    write_category(Path("line"), num_train=4, num_test=2, masks=False)
    with pytest.raises(SystemExit):
        main(["predict", "--detector", "detectors/bolt.pt", "--output", "corrections.csv", "line"])
    rows = read_rows(Path("corrections.csv"))
    for row in rows:
        row["label"] = "normal" if "good" in row["path"] else "anomalous"
    with Path("corrections.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    capsys.readouterr()

    feedback()
    advice = re.fullmatch("next: (.*), then (.*)", capsys.readouterr().out.splitlines()[-1])
    assert advice

    assert "Running stage 'prepare@bolt'" in run(*advice[1].split())
    index = read_index(Path("data/prepared/bolt"))
    added = [row for row in index if re.search("-[0-9a-f]{12}.png", row["path"])]
    of_test = [row["path"].split("/")[1] for row in added if row["split"] == "test"]
    assert of_test == ["anomalous"] * 4
    assert sum(row["split"] in ("fit", "validation", "calibration") for row in added) == 6
    assert read_json(Path("metrics/bolt/audit.json"))["num_images"]["test"] == 16

    project.commit("second detector")  # before or after, the advice holds
    table = run(*advice[2].split())
    head = advice[2].split()[-1]
    assert f"bolt: {head} -> workspace, 12 test images\n" in table
    assert f"bolt: {head} -> workspace, 4 new test images; if they are there" in table
