"""A pipeline that costs next to nothing, in place of a project's own: what is tested is DVC's part.

Its stages copy text, and end with the holder of their lease as the real ones do. One whose target
is named in `.work/hold` waits, one that reads `slow` takes two seconds, and one that reads `broken`
fails.
"""

from pathlib import Path

import psutil

from builders.projects import Project

PIPELINE = """\
stages:
  check:
    cmd: python -m stages.step stages/step.py checked/params
    deps: [stages/step.py]
    params: ["params.yaml": ]
    outs: [checked/params]
  prepare:
    matrix:
      category: ${data.categories}
    cmd: >-
      python -m stages.step ${data.root}/${item.category}
      prepared/${item.category} metrics/${item.category}/audit.json
    deps: ["${data.root}/${item.category}", checked/params]
    outs:
      - prepared/${item.category}
      - metrics/${item.category}/audit.json:
          cache: false
  plot:
    matrix:
      category: ${data.categories}
    cmd: python -m stages.step prepared/${item.category} plots/${item.category}
    deps: ["prepared/${item.category}"]
    params: [plots]
    outs: ["plots/${item.category}"]
  report:
    cmd: python -m stages.step plots report/text
    deps: [plots]
    params: [data.categories]
    outs: [report/text]
"""

STEP = """\
import time
from pathlib import Path

from anomaly_detection.errors import UserError
from stages import run, write_json


def main(source, *targets):
    files = sorted(path for path in Path(source).rglob("*") if path.is_file())
    text = "".join(path.read_text() for path in files or [Path(source)])
    if text == "broken":
        raise UserError(f"{source} must be whole.")
    write_json(Path("times") / f"{targets[0]}.json", {})
    time.sleep(2 * text.startswith("slow"))
    while (Path(".work/hold") / targets[0]).exists():
        time.sleep(0.02)
    for target in map(Path, targets):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


run(main)
"""


def simplify(project: Project, parts: Path, categories: list[str]) -> None:
    """Give a project this pipeline, and categories whose one file is `<parts>/<category>/text`."""
    (project.folder / "dvc.yaml").write_text(PIPELINE)
    (project.folder / "stages" / "step.py").write_text(STEP)
    (project.folder / ".gitignore").open("a").write("/prepared\n")
    for name in categories:
        (parts / name).mkdir(parents=True)
        (parts / name / "text").write_text(name)
    project.change("data", categories=categories)
    project.commit("a pipeline that costs nothing")


def running_in(folder: Path, command: str = "") -> list[psutil.Process]:
    """The processes whose working directory is in a folder and whose command has this in it."""
    return [
        process
        for process in psutil.process_iter(["cwd", "cmdline"])
        if Path(process.info["cwd"] or "/").is_relative_to(folder)
        and command in " ".join(process.info["cmdline"] or [])
    ]
