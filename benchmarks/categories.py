"""What DVC costs besides the stages' own work, by the number of categories.

python -m benchmarks.categories [--counts 1 10 100 1000] [--sample 10]

The pipeline is this project's, with stages that only write a few bytes. For each count, dvc.lock
has the entries of all categories. Stages of a sample are run by `tools.repro` and by DVC alone;
the table has the seconds for each stage.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages import run
from tools.cluster.dvc import COMMAND, environment
from tools.cluster.runs import tracked_files
from tools.cluster.view import OUTPUTS, Project, View

WRITE = """\
import sys
from pathlib import Path

for out in map(Path, sys.argv[1:]):
    file = out if out.suffix else out / "file"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(str(out))
"""
CHECK = """\
from pathlib import Path
from ruamel.yaml import YAML

for name in ["params", *YAML(typ="safe").load(Path("params.yaml"))["data"]["categories"]]:
    for path in (name, f"{name}.json", f"pretrain/{name}.json"):
        file = Path("checked") / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
"""


def main(*arguments: str) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.categories", description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--sample", type=int, default=10)
    options = parser.parse_args(arguments)
    print("| categories | tools.repro | dvc repro |\n|---|---|---|")
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            own, theirs = costs(Path(folder), count, min(count, options.sample))
        print(f"| {count} | {own:.2f} s | {theirs:.2f} s |", flush=True)


def costs(folder: Path, count: int, sample: int) -> tuple[float, float]:
    """Seconds for each stage, by `tools.repro` and by DVC alone."""
    names = [f"part{number:04}" for number in range(count)]
    write_project(folder, names)
    project = Project(folder)
    with project.exclusively():
        view = View(project)
        view.reproduce(None, project.first)
        view.reproduce(names[0], project.stages_of(names[0]))
        lock = {
            stage.replace(names[0], name): entry.replace(names[0], name)
            for name in names[sample:]
            for stage, entry in project.lock.items()
            if "@" in stage
        }
        project.keep(lock)
        started = time.monotonic()
        for name in names[:sample]:
            touch(folder, name, "ours")
            view.reproduce(name, project.stages_of(name))
        own = (time.monotonic() - started) / sample
    touch(folder, names[0], "theirs")
    stages = project.stages_of(names[0])[: 1 if count > 100 else None]  # one may take minutes
    started = time.monotonic()
    command = [*COMMAND, "repro", "--quiet", "--single-item", *stages]
    subprocess.run(command, cwd=folder, env=environment(), check=True)
    return own / len(project.steps), (time.monotonic() - started) / len(stages)


def touch(folder: Path, name: str, text: str) -> None:
    """Change a category's data, so that all its stages are stale."""
    (folder / "parts" / name / "picture").write_text(text)
    (folder / "write.py").write_text(WRITE + f"# {text}\n")


def write_project(folder: Path, names: list[str]) -> None:
    """This project with stages that write their outputs, and nothing in them."""
    for name in tracked_files(Path.cwd()):
        if name.startswith(("anomaly_detection/", "stages/", "params.yaml", "dvc.yaml", ".dvc")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(Path(name).read_bytes())
    yaml = YAML()
    pipeline: dict[str, Any] = yaml.load(folder / "dvc.yaml")
    for name, stage in pipeline["stages"].items():
        outs = [
            next(iter(o)) if isinstance(o, dict) else o for k in OUTPUTS for o in stage.get(k, [])
        ]
        stage["cmd"] = "python check.py" if name == "check" else f"python write.py {' '.join(outs)}"
        stage["deps"] = [*stage["deps"], *([] if name == "check" else ["write.py"])]
    yaml.dump(pipeline, folder / "dvc.yaml")
    params: dict[str, Any] = yaml.load(folder / "params.yaml")
    params["data"] |= {"root": "parts", "categories": names}
    yaml.dump(params, folder / "params.yaml")
    (folder / "check.py").write_text(CHECK)
    for name in names:
        (folder / "parts" / name).mkdir(parents=True)
        touch(folder, name, "first")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


if __name__ == "__main__":
    run(main)
